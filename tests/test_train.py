"""train.py as a user runs it: killed and resumed to the bit, stopped by SIGTERM, one line for every mistake."""

import dataclasses
import json
import os
import random
import re
import runpy
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from magic141_jax.data.emoji import COLOURS, EmojiPack, caption, poster
from magic141_jax.experiment import Experiment
from magic141_jax.pipelines import media

ROOT = Path(__file__).parents[1]
TINY = ["--config.data.image_batch=0", "--config.data.height=16", "--config.data.width=16", "--noprogress"]


def start(*arguments, script="train.py"):
    environment = os.environ | {
        "MAGIC141_JAX_CACHE": str(Path(tempfile.gettempdir()) / "magic141-jax-train-test-cache"),
        "XLA_FLAGS": "--xla_backend_optimization_level=0",  # compiles three times faster
        "JAX_PLATFORMS": "cpu",
    }
    command = [sys.executable, script, *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes)


def finish(process):
    output, errors = process.communicate(timeout=900)
    return process.returncode, output, errors


def lines(workdir):
    text = (workdir / "metrics.jsonl").read_text()
    return [{k: v for k, v in json.loads(line).items() if k != "time"} for line in text.splitlines()]


def wait_for_step(workdir, step, process):
    """Waits until the run has written the metrics of a step."""
    path = workdir / "metrics.jsonl"
    while process.poll() is None:
        if path.exists() and path.read_text().count("\n") >= step:
            return
        time.sleep(0.05)
    raise AssertionError(f"ended early: {process.communicate()[1]}")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """Random weights of the networks of configs/debug.py, as the teacher of configs/debug_dmd.py: its samples move."""
    folder = tmp_path_factory.mktemp("weights") / "teacher"
    experiment = Experiment.from_config(
        runpy.run_path(str(ROOT / "configs/debug.py"))["get_config"](), folder, devices=jax.devices()[:1]
    )
    state, rng = experiment.initial_state(), np.random.default_rng(0)
    experiment.export(
        dataclasses.replace(state, ema=jax.tree.map(lambda x: x + 0.2 * rng.standard_normal(x.shape), state.ema)),
        folder,
    )
    return folder


@pytest.mark.heavy
@pytest.mark.parametrize("config", ["debug", "debug_dmd"])
def test_a_killed_run_ends_with_the_same_losses(config, teacher, tmp_path):
    def debug(workdir, *more):
        given = [f"--config.teacher={teacher}"] * (config == "debug_dmd")
        return start(f"--config=configs/{config}.py", f"--workdir={workdir}", *TINY, *given, *more)

    steps = "--config.train.steps=40"
    code, output, errors = finish(debug(tmp_path / "whole", steps))
    assert code == 0 and "40 steps done" in output, errors
    assert (tmp_path / "whole" / "weights" / "transformer" / "model.safetensors").exists()

    killed_at = random.randint(4, 30)
    process = debug(tmp_path / "killed", steps)
    wait_for_step(tmp_path / "killed", killed_at, process)
    process.kill()
    assert finish(process)[0] == -signal.SIGKILL
    assert not (tmp_path / "killed" / "weights").exists()

    process = debug(tmp_path / "killed", steps)
    wait_for_step(tmp_path / "killed", 33, process)
    process.terminate()
    code, output, errors = finish(process)
    assert code == 0, errors
    if "40 steps done" not in output:
        assert "stopped and saved at step" in output
        assert finish(debug(tmp_path / "killed", steps))[0] == 0

    whole, killed = lines(tmp_path / "whole"), lines(tmp_path / "killed")
    assert [line["step"] for line in whole] == list(range(1, 41))
    assert killed == whole, f"killed at step {killed_at}"
    weights = [(tmp_path / run / "weights/transformer/model.safetensors").read_bytes() for run in ("whole", "killed")]
    assert weights[0] == weights[1]

    if config == "debug_dmd":  # whose student rests at every second step, and may be the same at both checkpoints
        return
    earlier, last = sorted(int(path.name) for path in (tmp_path / "whole" / "checkpoints").glob("[0-9]*"))
    target = tmp_path / "earlier"
    code, output, errors = finish(debug(tmp_path / "whole", steps, f"--export={target}", f"--export_step={earlier}"))
    assert code == 0 and last == 40, errors
    assert (target / "transformer" / "model.safetensors").read_bytes() != weights[0]


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=configs/debug.py"], "--config and --workdir are needed"),
        (["--config=configs/none.py", "--workdir=W"], "can't read the --config file"),
        (["--config=configs/debug.py", "--workdir=W", "--export_step=3"], "which checkpoint --export=FOLDER writes"),
        (["--config=configs/debug.py", "--workdir=W", "--export=W/x", "--export_step=3"], "no checkpoint of step 3"),
        (["--config=configs/debug.py", "--workdir=W", "--config.train.stpes=3"], "unknown key config.train.stpes"),
        (["--config=configs/debug.py", "--workdir=W", "--config.train.steps=many"], "config.train.steps"),
        (["--config=configs/folder.py", "--workdir=W", "--config.data.path=nowhere"], "no data at nowhere"),
    ],
)
def test_mistakes_are_one_line(arguments, message, tmp_path):
    arguments = [argument.replace("=W", f"={tmp_path / 'run'}") for argument in arguments]
    code, _, errors = finish(start(*arguments))
    assert code == 2 and message in errors, errors
    assert [line for line in errors.splitlines() if line.startswith("error: ")] == errors.splitlines()
    assert not list(tmp_path.iterdir())


def commands(section):
    """The argument lists of the first block of commands of a section of README.md."""
    block = (ROOT / "README.md").read_text().split(f"\n## {section}\n")[1].split("```bash\n")[1].split("```")[0]
    return [shlex.split(line) for line in block.splitlines()]


def with_names(word, names):
    """A word of a command with the reader's own names in it."""
    for old, new in names.items():
        word = word.replace(old, new)
    return word


def write_clips(folder):
    """Twelve files as people have them: sizes, rates, endings and a spreadsheet's csv. Two can't be used."""
    pack, rows = EmojiPack(), ["file;caption"]
    (folder / "more").mkdir(parents=True)
    for i, (colour, suffix) in enumerate(zip([*COLOURS][:5] * 2, [".mp4", ".gif", ".webp", ".mp4", ".png"] * 2)):
        scene = poster(pack.held_out[i % 3], colour, "left")
        name, frames = f"{'more/' * (i % 2)}clip {i}{suffix}", pack.render(scene, size=80 + 16 * (i % 3), num_frames=30)
        media.write_video(folder / name, frames / 255, 8 + i % 5)
        rows.append(f"{name};{caption(pack, scene)}, number {i}")
    media.write_video(folder / "short.mp4", frames[:5] / 255, 8)
    (folder / "broken.mp4").write_bytes(b"not a video")
    rows += ["short.mp4;too short", "broken.mp4;broken"]
    (folder / "captions.csv").write_text("\n".join(rows), encoding="utf-8-sig")
    return rows[1].split(";")[1]


@pytest.mark.heavy
def test_a_newcomer_trains_on_own_clips_as_the_readme_says(tmp_path):
    words = write_clips(tmp_path / "my clips")
    mine = {"path/to/clips": str(tmp_path / "my clips"), "runs/mine": str(tmp_path / "mine")}
    train, sample = commands("Bring your own clips")
    brief = ["steps=2", "log_every=1", "sample_every=0"]
    train += [f"--config.train.{value}" for value in brief] + [
        "--config.data.video_batch=1",
        "--config.data.image_batch=1",
    ]
    sample = [words if word == "one of your captions" else word for word in sample] + [f"--output={tmp_path}/out.mp4"]
    told = []
    for program, script, *arguments in (train, sample):
        code, output, errors = finish(start(*(with_names(word, mine) for word in arguments), script=script))
        assert program == "python" and code == 0, errors
        told.append(output)
    assert re.search(r"kept +8 +videos", told[0]) and re.search(r"kept +2 +images", told[0])
    assert re.search(r"left out: too short +1 +short.mp4", told[0]) and "broken.mp4" in told[0]
    assert "2 steps done" in told[0] and all(np.isfinite(line["i2v"]) for line in lines(tmp_path / "mine"))
    about = media.read_metadata(tmp_path / "out.mp4")
    assert (about["prompt"], about["frames"]) == (words, 17)

    mine["path/to/clips"] = str(tmp_path / "my clips" / "more")  # the run has others
    code, _, errors = finish(start(*(with_names(word, mine) for word in train[2:])))
    assert code == 2 and "was prepared from" in errors, errors


@pytest.mark.heavy
def test_a_collapse_is_one_line_that_names_it(teacher, tmp_path):
    collapse = ["student.learning_rate=0.3", "fake.learning_rate=1e-30"]  # a critic that learns nothing
    # colours shift by chance at this size
    watch = ["every=2", "warmup=2", "critic=loss/fake", "colour_shift=0"]
    code, output, errors = finish(
        start(
            "--config=configs/debug_dmd.py",
            f"--workdir={tmp_path}",
            *TINY,
            f"--config.teacher={teacher}",
            *(f"--config.role_optimizers.{value}" for value in collapse),
            *(f"--config.watch.{value}" for value in watch),
            "--config.train.save_every=2",
        )
    )
    assert code == 2, errors
    assert "teacher (frozen)" in output and "steps done" not in output
    (said,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert re.match(r"error: step 4: .*(motion|diversity|first-frame error) \S+ .* is (above|below) ", said), said
    assert re.search(r"the last good checkpoint is \S+/checkpoints/2\.", said), said
