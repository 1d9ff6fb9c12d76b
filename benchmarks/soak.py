"""Many clients at a running server, for minutes: is any job lost, or any video somebody else's?

    python -m magic141_jax.serve --port 8000 --state runs/soak
    python benchmarks/soak.py --url http://127.0.0.1:8000 --clients 50 --minutes 10

Every client asks for videos of its own prompt and seed through OpenAI's client, waits, and compares what is written in
the mp4 with what it asked for. Some of them are deleted while they wait or are made, and some readers of events leave
in the middle. Ends with a line of JSON, and with exit code 1 if a job was lost or mixed up.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import random
import re
import statistics
import sys
import tempfile
import threading
import time
import urllib.request
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from magic141_jax.pipelines.media import read_metadata

SUBJECTS = ("a shark", "a bee", "a bus", "a rocket", "a star")
COLOURS = ("red", "blue", "yellow", "green", "purple")
SECONDS = ("1", "2", "4")
DELETED, LEFT = 0.1, 0.2  # shares of jobs that are cancelled, and whose events are read but not to their end


@dataclasses.dataclass
class Tally:
    """What became of the jobs of all clients."""

    counts: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    made: list[str] = dataclasses.field(default_factory=list)
    waits: list[float] = dataclasses.field(default_factory=list)
    wrong: list[str] = dataclasses.field(default_factory=list)
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    def add(self, outcome: str) -> None:
        """Counts one."""
        with self.lock:
            self.counts[outcome] += 1


def soak(url: str, *, clients: int, seconds: float, lengths: tuple[str, ...] = SECONDS) -> dict[str, Any]:
    """Runs the clients until the time is over, each at least one job, and returns the report."""
    tally, start, memory = Tally(), time.monotonic(), resident(url)
    with ThreadPoolExecutor(clients) as pool:
        running = [
            pool.submit(_client, url, tally, number=i, until=start + seconds, lengths=lengths) for i in range(clients)
        ]
    for client in running:
        client.result()
    elapsed = time.monotonic() - start
    listed = {
        video.id: video.status for video in openai.OpenAI(base_url=f"{url}/v1", api_key="-").videos.list(limit=100)
    }
    lost = [id for id in tally.made if listed.get(id) != "completed"]
    waits = sorted(tally.waits) or [0.0]
    return {
        **tally.counts,
        "clients": clients,
        "seconds": round(elapsed, 1),
        "jobs_per_second": round(len(tally.made) / elapsed, 2),
        "median_wait": round(statistics.median(waits), 2),
        "longest_wait": round(waits[-1], 2),
        "resident_mib": [round(memory / 2**20), round(resident(url) / 2**20)],
        "lost": len(lost),
        "wrong": tally.wrong,
    }


def resident(url: str) -> float:
    """The server's memory in bytes."""
    with urllib.request.urlopen(f"{url}/metrics") as answer:
        return float(re.search(rb"^process_resident_memory_bytes (\S+)", answer.read(), re.MULTILINE)[1])


def _client(url: str, tally: Tally, *, number: int, until: float, lengths: tuple[str, ...]) -> None:
    rng = random.Random(number)
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0, timeout=120)
    first = True
    while first or time.monotonic() < until:
        first = False
        prompt = f"{rng.choice(SUBJECTS)} moves left on a {rng.choice(COLOURS)} background"
        asked = {"prompt": prompt, "seconds": rng.choice(lengths), "seed": rng.randrange(2**32)}
        video = _create(client, asked, tally)
        if rng.random() < DELETED:
            time.sleep(rng.random())
            client.videos.delete(video.id)
            tally.add("deleted")
            continue
        if rng.random() < LEFT:
            with urllib.request.urlopen(f"{url}/v1/videos/{video.id}/events") as events:
                events.readline()
        start = time.monotonic()
        while video.status not in ("completed", "failed"):
            time.sleep(0.2)
            video = client.videos.retrieve(video.id)
        _check(client, video, asked, tally)
        with tally.lock:
            tally.waits.append(time.monotonic() - start)


def _create(client: openai.OpenAI, asked: dict[str, Any], tally: Tally) -> Any:
    """Asks until the queue has room, waiting as long as the server says."""
    while True:
        try:
            extra = {"seed": asked["seed"]}
            return client.videos.create(prompt=asked["prompt"], seconds=asked["seconds"], extra_body=extra)
        except openai.RateLimitError as error:
            tally.add("refused")
            time.sleep(float(error.response.headers["Retry-After"]))


def _check(client: openai.OpenAI, video: Any, asked: dict[str, Any], tally: Tally) -> None:
    """Whether the video is the one that was asked for."""
    if video.status != "completed":
        tally.add("failed")
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "video.mp4")
        path.write_bytes(client.videos.download_content(video.id).content)
        about = read_metadata(path)
    same = (about["prompt"], about["seed"], about["id"]) == (asked["prompt"], asked["seed"], video.id)
    tally.add("completed")
    with tally.lock:
        tally.made.append(video.id)
        if not same or about["frames"] != round(float(asked["seconds"]) * about["fps"]):
            tally.wrong.append(video.id)


def main() -> int:
    """Reads the flags, runs and prints the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--minutes", type=float, default=10.0)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=DeprecationWarning)  # of OpenAI's own service
    report = soak(args.url, clients=args.clients, seconds=60 * args.minutes)
    print(json.dumps(report))
    return 1 if report["lost"] or report["wrong"] or report.get("failed") else 0


if __name__ == "__main__":
    raise SystemExit(main())
