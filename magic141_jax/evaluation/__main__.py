"""`python -m magic141_jax.evaluation`: measures a weights folder on the emoji set and prints the card's table.

    python -m magic141_jax.evaluation --weights DIR [--samples N] [--steps N] [--guidance G] [--seed S]
        [--minute K] [--output evaluation.json] [--card CARD.md] [--sheet contact_sheet.png]

With --card, the table replaces what stands between the card's evaluation markers.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from magic141_jax.data.emoji import DEFAULT_PACK, EmojiPack
from magic141_jax.errors import OneLineParser, UserError, run_entry_point
from magic141_jax.evaluation import drift, protocol, report
from magic141_jax.evaluation.templates import Search
from magic141_jax.pipelines.components import DEFAULT
from magic141_jax.pipelines.options import resolve
from magic141_jax.pipelines.text_to_video import TextToVideoPipeline

SHEET_ROWS = {"train": ("t2v", 6), "triples": ("t2v", 4), "subjects": ("i2v", 4)}
STEPS_PER_SPLIT = {"train": 10, "triples": 10, "subjects": 7}  # of the progress bar
MAX_SAMPLES = 4096


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line; raises `UserError` for what is wrong with it."""
    parser = OneLineParser(prog="python -m magic141_jax.evaluation", description="Measures weights on the emoji set.")
    parser.add_argument("--weights", default=DEFAULT, metavar="DIR", help="weights folder (default: the embedded one)")
    parser.add_argument("--samples", type=int, default=32, metavar="N", help="captions of each of the three sets")
    parser.add_argument("--steps", type=int, metavar="N", help="sampling steps (default: the weights' own)")
    parser.add_argument("--guidance", type=float, metavar="G", help="guidance scale (default: the weights' own)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="draws the captions and the noise")
    parser.add_argument("--minute", type=int, default=0, metavar="K", help="also follow K videos of one minute")
    parser.add_argument("--pack", type=Path, default=DEFAULT_PACK, metavar="ZIP", help="the emoji pack")
    parser.add_argument("--output", type=Path, metavar="JSON", help="write all values here")
    parser.add_argument("--card", type=Path, metavar="MD", help="put the table between this card's markers")
    parser.add_argument("--sheet", type=Path, metavar="PNG", help="write a contact sheet here")
    args = parser.parse_args(argv)
    for name, low, high in (("samples", 1, MAX_SAMPLES), ("minute", 0, MAX_SAMPLES), ("seed", 0, protocol.MAX_SEED)):
        if not low <= getattr(args, name) <= high:
            raise UserError(f"--{name} is {getattr(args, name)}; it must be from {low} to {high}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv`; raises `UserError` for what the user can mend."""
    args = parse(argv)
    card = None if args.card is None else _read_card(args.card)
    for path in filter(None, (args.output, args.sheet)):
        if not path.absolute().parent.is_dir():
            raise UserError(f"no folder {path.parent} to write {path.name} into")
    start = time.perf_counter()
    given = {"num_inference_steps": args.steps, "guidance_scale": args.guidance}
    options = {k: v for k, v in given.items() if v is not None}
    pipeline = TextToVideoPipeline.from_pretrained(args.weights)
    resolved = resolve(options, pipeline.components)
    pack = EmojiPack(args.pack)
    results, clips = evaluate(pipeline, pack, args, options)
    results |= {
        "weights": pipeline.components.digest,
        "command": _command(args),
        "settings": {
            "samples": args.samples,
            "seed": args.seed,
            "minute": args.minute,
            "subjects": len(pack.subjects),
            "num_inference_steps": resolved.num_inference_steps,
            "guidance_scale": resolved.guidance_scale,
        },
        "seconds": round(time.perf_counter() - start, 1),
    }
    body = report.section(results)
    if args.output:
        report.write(args.output, report.to_json(results))
    if card is not None:
        report.write(args.card, report.update_card(card, body))
    if args.sheet:
        rows = [(clips[s].made[way][:n], clips[s].captions[:n]) for s, (way, n) in SHEET_ROWS.items()]
        frames, captions = zip(*rows, strict=True)
        report.write(args.sheet, report.contact_sheet(np.concatenate(frames), sum(captions, ())))
    print(body)
    print(f"\n{results['seconds']:.0f} s")
    return 0


def evaluate(
    pipeline: TextToVideoPipeline, pack: EmojiPack, args: argparse.Namespace, options: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, protocol.Clips]]:
    """All values of the report, and the clips of each split."""
    search = Search(pack, protocol.frame_side(pipeline))
    results: dict[str, Any] = {"splits": {}}
    clips = {}
    with tqdm(total=sum(STEPS_PER_SPLIT.values()) + args.minute, unit="step") as bar:

        def progress(text: str) -> None:
            bar.set_postfix_str(text, refresh=False)
            bar.update()

        for split in protocol.SPLITS:
            clips[split] = protocol.make_clips(
                pipeline, pack, split, args.samples, options=options, seed=args.seed, progress=progress
            )
            results["splits"][split] = protocol.evaluate_clips(clips[split], search, progress=progress)
        if args.minute:
            scenes = protocol.draw_scenes(pack, "train", args.minute, seed=args.seed)
            results["minute"] = drift.measure_drift(pipeline, pack, search, scenes, options=options, progress=progress)
    return results, clips


def _read_card(path: Path) -> str:
    try:
        text = path.read_text()
    except OSError as error:
        raise UserError(f"can't read the card {path}: {error.strerror}") from None
    report.update_card(text, "")
    return text


def _command(args: argparse.Namespace) -> str:
    names = ("weights", "samples", "steps", "guidance", "seed", "minute")
    given = [f"--{n} {getattr(args, n)}" for n in names if getattr(args, n) not in (None, 0, DEFAULT)]
    return " ".join(["python -m magic141_jax.evaluation", *given])


if __name__ == "__main__":
    run_entry_point(main)
