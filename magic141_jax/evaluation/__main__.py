"""`python -m magic141_jax.evaluation`: measures weights on the emoji set: one sampler, or several side by side.

    python -m magic141_jax.evaluation --weights DIR [--samples N] [--steps N] [--guidance G] [--seed S]
        [--minute K] [--output evaluation.json] [--card CARD.md] [--sheet contact_sheet.png]
    python -m magic141_jax.evaluation compare --row "teacher=DIR:steps=50,guidance=1.5"
        --row "student=DIR:steps=4,guidance=1" [--samples N] [--seeds 0,1,2] [--splits train,triples] [--draws K]
        [--output comparison.json]
    python -m magic141_jax.evaluation drift --row "default=default" --row "no anchor=default:anchor=false"
        [--seconds 60] [--samples N] [--seed S] [--split triples] [--output drift.json] [--plot drift.svg]
    python -m magic141_jax.evaluation page docs/results/distillation docs
    python -m magic141_jax.evaluation report A B --output DIR [--samples N] [--seeds 0,1,2] [--clip DIR]
    python -m magic141_jax.evaluation vbench --images DIR [--prompts vbench2_i2v_full_info.json] [--weights DIR] OUT

The first prints the card's table; with --card, it replaces what stands between the card's evaluation markers. The
second holds all rows against the first one; see `magic141_jax.evaluation.compare` for rows and measures. Its output
is written after every seed: started again, it goes on with the seeds that are missing. The third follows long videos
window by window (`magic141_jax.evaluation.drift`), and goes on with the rows that are missing. The fourth makes a page
of comparisons; see `magic141_jax.evaluation.page`. The fifth compares two folders and
writes a report of it, with videos (`magic141_jax.evaluation.versus`). The sixth makes the videos that VBench's tool
judges (`magic141_jax.evaluation.vbench`).
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from magic141_jax import weights
from magic141_jax.data.emoji import DEFAULT_PACK, EmojiPack
from magic141_jax.errors import OneLineParser, UserError, run_entry_point
from magic141_jax.evaluation import (
    compare,
    drift,
    networks,
    page,
    plots,
    protocol,
    record,
    report,
    standing,
    vbench,
    versus,
)
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
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] and argv[0] in COMMANDS:
        return COMMANDS[argv[0]](argv[1:])
    args = parse(argv)
    card = None if args.card is None else _read_card(args.card)
    report.require_folders(args.output, args.sheet)
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
        progress = _teller(bar)
        for split in protocol.SPLITS:
            clips[split] = protocol.make_clips(
                pipeline, pack, split, args.samples, options=options, seed=args.seed, progress=progress
            )
            results["splits"][split] = protocol.evaluate_clips(clips[split], search, progress=progress)
        if args.minute:
            scenes = protocol.draw_scenes(pack, "train", args.minute, seed=args.seed)
            followed = drift.measure_drift(pipeline, pack, search, scenes, options=options, progress=progress)
            results["minute"] = followed["windows"]
    return results, clips


def _plan_flags(parser: OneLineParser, plan: compare.Plan, *, seeds: str) -> None:
    """Adds the flags that say on what rows are compared, and by what."""
    parser.add_argument("--samples", type=int, default=plan.samples, metavar="N", help="captions a split and seed")
    parser.add_argument("--seeds", default=seeds, metavar="LIST", help="draw captions, first frames and noise: 0,1,2")
    parser.add_argument("--splits", default=",".join(plan.splits), metavar="LIST", help=", ".join(protocol.SPLITS))
    parser.add_argument("--kinds", default=",".join(plan.kinds), metavar="LIST", help=", ".join(standing.KINDS))
    parser.add_argument("--draws", type=int, default=plan.draws, metavar="K", help="noises a caption, for diversity")
    parser.add_argument("--pack", type=Path, default=DEFAULT_PACK, metavar="ZIP", help="the emoji pack")
    parser.add_argument("--clip", type=Path, metavar="DIR", help="a published CLIP that measures too (both towers)")
    parser.add_argument("--videomae", type=Path, metavar="DIR", help="a published, fine-tuned VideoMAE that does")
    parser.add_argument("--i3d", type=Path, metavar="FILE", help="a published I3D that does, as FVD has it")


def _read_plan(args: argparse.Namespace) -> compare.Plan:
    """The plan of `_plan_flags`; raises `UserError` for what is wrong with it."""
    for name in ("samples", "draws"):
        if not 2 <= getattr(args, name) <= MAX_SAMPLES:
            raise UserError(f"--{name} is {getattr(args, name)}; it must be from 2 to {MAX_SAMPLES}")
    splits = compare.read_names(args.splits, "--splits", protocol.SPLITS)
    kinds = compare.read_names(args.kinds, "--kinds", tuple(standing.KINDS))
    return compare.Plan(compare.read_seeds(args.seeds), splits, args.samples, args.draws, kinds)


def parse_compare(argv: Sequence[str]) -> tuple[argparse.Namespace, tuple[compare.Row, ...], compare.Plan]:
    """Reads the command line after `compare`; raises `UserError` for what is wrong with it."""
    parser = OneLineParser(
        prog="python -m magic141_jax.evaluation compare",
        description="Holds samplers against the first of them, on the same captions, first frames and noise.",
    )
    row = "label=FOLDER[:KEY=VALUE,...] with steps, guidance, shift, sampler, lora (a file) or transformer (a folder); "
    row += "the others are held against the first"
    parser.add_argument("--row", action="append", default=[], metavar="ROW", help=row)
    _plan_flags(parser, compare.Plan(), seeds="0")
    parser.add_argument("--output", type=Path, metavar="JSON", help="all values; goes on with what is there")
    args = parser.parse_args(argv)
    plan = _read_plan(args)
    return args, compare.read_rows(args.row), plan


def main_compare(argv: Sequence[str]) -> int:
    """Runs `compare`; raises `UserError` for what the user can mend."""
    args, rows, plan = parse_compare(argv)
    report.require_folders(args.output)
    found = _compared(args, plan, compare.load_rows(rows), args.output, _compare_command(args, rows))
    print(standing.section(found))
    print(f"\n{sum(made['seconds'] for made in found['made'].values()):.0f} s")
    return 0


def _compared(
    args: argparse.Namespace,
    plan: compare.Plan,
    loaded: Sequence[compare.Loaded],
    output: Path | None,
    command: str,
    **show: Any,
) -> dict[str, Any]:
    """The record of a comparison, gone on with where `output` holds a part, and written there after every seed."""
    before = record.read(output) if output and output.exists() else None
    judges = {name: getattr(args, name) for name in networks.NAMES}
    published = networks.Networks.from_paths(judges)
    pack, rows = EmojiPack(args.pack), [x.row for x in loaded]
    settings = {**dataclasses.asdict(plan), "pack": weights.digest(args.pack), **networks.identity(judges)}
    found = record.begin({x.row.label: compare.identity(x) for x in loaded}, settings, command)
    if before is not None:
        found = record.resume(before, found, output)
    left = dataclasses.replace(plan, seeds=tuple(s for s in plan.seeds if s not in found["settings"]["seeds"]))
    start = time.perf_counter()
    with tqdm(total=compare.progress_steps(rows, left), unit="step") as bar:
        told = {"networks": published, "progress": _teller(bar), **show}
        for seed, values in compare.compare(loaded, pack, left, **told):
            found = record.add(found, seed, values, seconds=time.perf_counter() - start)
            if output:
                output.parent.mkdir(parents=True, exist_ok=True)
                report.write(output, report.to_json(found))
            start = time.perf_counter()
    return found


def main_report(argv: Sequence[str]) -> int:
    """Runs `report`; raises `UserError` for what the user can mend."""
    parser = OneLineParser(
        prog="python -m magic141_jax.evaluation report",
        description="A report on two weights folders: tables, intervals, plots and videos side by side.",
    )
    row = "FOLDER or label=FOLDER, each with :KEY=VALUE,... as a --row of compare; B is held against A"
    parser.add_argument("a", metavar="A", help=row)
    parser.add_argument("b", metavar="B", help="as A")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder; goes on with what is there")
    parser.add_argument("--videos", type=int, default=4, metavar="N", help="captions of each kind that are shown")
    _plan_flags(parser, compare.Plan(samples=16, draws=2), seeds="0,1,2")
    args = parser.parse_args(argv)
    if not 0 <= args.videos <= args.samples:
        raise UserError(f"--videos is {args.videos}; it must be from 0 to --samples, {args.samples}")
    plan, rows = _read_plan(args), compare.read_rows(compare.with_labels((args.a, args.b)))
    versus.require_packages()
    if args.output.is_file():
        raise UserError(f"{args.output} is a file; name a folder")
    loaded = compare.load_rows(rows)
    fps = loaded[0].pipeline.components.sampling.fps
    shown = [dataclasses.replace(row, weights=record.shown(row.weights)) for row in rows]
    command = ["python -m magic141_jax.evaluation report", *(shlex.quote(compare.write_row(row)) for row in shown)]
    command += [f"--output={record.shown(str(args.output))} --videos={args.videos}", _plan_command(args)]
    videos = versus.Videos(args.output, [row.label for row in rows], seed=plan.seeds[0], count=args.videos, fps=fps)
    found = _compared(args, plan, loaded, args.output / versus.RECORD, " ".join(command), show=videos)
    for path in versus.write(args.output, found, {row.label: row.weights for row in shown}):
        print(f"wrote {path}")
    return 0


def _compare_command(args: argparse.Namespace, rows: Sequence[compare.Row]) -> str:
    """The command line that makes the same comparison, without the paths of this machine."""
    given = []
    for row in rows:
        paths = {name: record.shown(getattr(row, name)) for name in ("weights", *compare.PARTS)}
        given.append(f"--row={compare.write_row(dataclasses.replace(row, **paths))}")
    return f"python -m magic141_jax.evaluation compare {shlex.join(given)} {_plan_command(args)}"


def _plan_command(args: argparse.Namespace) -> str:
    """The flags of `_plan_flags`, without the paths of this machine."""
    given = [f"--{name}={getattr(args, name)}" for name in ("samples", "draws", "seeds", "splits", "kinds")]
    given += [f"--{name}={record.shown(str(path))}" for name in networks.NAMES if (path := getattr(args, name))]
    return shlex.join(given)


def main_drift(argv: Sequence[str]) -> int:
    """Runs `drift`; raises `UserError` for what the user can mend."""
    parser = OneLineParser(
        prog="python -m magic141_jax.evaluation drift", description="Follows long videos window by window."
    )
    row = "label=FOLDER[:KEY=VALUE,...] with the keys of compare, or " + ", ".join(compare.WINDOWS)
    parser.add_argument("--row", action="append", default=[], metavar="ROW", help=row)
    parser.add_argument("--samples", type=int, default=16, metavar="N", help="captions, a video each")
    parser.add_argument("--seconds", type=float, default=60.0, metavar="S", help="length of a video")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="draws the captions")
    parser.add_argument("--split", default="triples", choices=("train", "triples"), help="of captions")
    parser.add_argument("--pack", type=Path, default=DEFAULT_PACK, metavar="ZIP", help="the emoji pack")
    parser.add_argument("--output", type=Path, metavar="JSON", help="all values; goes on with what is there")
    parser.add_argument("--plot", type=Path, metavar="SVG", help="curves over time")
    args = parser.parse_args(argv)
    for name, low, high in (("samples", 1, MAX_SAMPLES), ("seconds", 1, 3600), ("seed", 0, protocol.MAX_SEED)):
        if not low <= getattr(args, name) <= high:
            raise UserError(f"--{name} is {getattr(args, name)}; it must be from {low} to {high}")
    rows = compare.read_rows(args.row, fewest=1)
    report.require_folders(args.output, args.plot)
    loaded, pack = compare.load_rows(rows), EmojiPack(args.pack)
    settings = {name: getattr(args, name) for name in ("samples", "seconds", "seed", "split")}
    found = weights.read_json(args.output) if args.output and args.output.exists() else {"settings": settings}
    if found["settings"] != settings:
        raise UserError(f"{args.output} holds videos of {found['settings']}, not of {settings}; name another --output")
    side, _ = protocol.frame_side(loaded[0].pipeline), found.setdefault("rows", {})
    search, scenes = Search(pack, side), protocol.draw_scenes(pack, args.split, args.samples, seed=args.seed)
    with tqdm(total=args.samples * len(rows), unit="video") as bar:
        for x in loaded:
            found = _follow_row(found, x, pack=pack, search=search, scenes=scenes, bar=bar)
            if args.output:
                report.write(args.output, report.to_json(found))
    if "vae" not in found:
        images = protocol.render_clips(pack, scenes, side=side, num_frames=1)[:, 0]
        found["vae"] = drift.vae_drift(
            loaded[0].pipeline, images, trips=len(found["rows"][rows[0].label]["windows"]["motion"])
        )
    shown = {row.label: found["rows"][row.label] for row in rows}
    if args.output:
        report.write(args.output, report.to_json(found))
    if args.plot:
        labels = {name: name.replace("_", " ") for name in drift.MEASURES if name not in ("subject_psnr", "sharpness")}
        curves = {label: row["windows"] for label, row in shown.items()}
        report.write(args.plot, plots.over_time(curves, args.seconds, labels=labels))
    print(report.drift_summary(shown, found["vae"]))
    return 0


def _follow_row(
    found: dict[str, Any],
    row: compare.Loaded,
    *,
    pack: EmojiPack,
    search: Search,
    scenes: Sequence[Any],
    bar: tqdm,
) -> dict[str, Any]:
    """`found` with a row that it lacks, or that was of other weights."""
    label, identity = row.row.label, compare.identity(row)
    before = found["rows"].get(label)
    if before is not None and before["identity"] == identity:
        bar.update(len(scenes))
        return found
    start = time.perf_counter()
    values = drift.measure_drift(
        row.pipeline,
        pack,
        search,
        scenes,
        seconds=found["settings"]["seconds"],
        options=row.row.options,
        progress=_teller(bar),
    )
    made = {**record.stamp(), "seconds": round(time.perf_counter() - start, 1)}
    return {**found, "rows": {**found["rows"], label: {"identity": identity, "made": made, **values}}}


def main_page(argv: Sequence[str]) -> int:
    """Runs `page`; raises `UserError` for what the user can mend."""
    parser = OneLineParser(
        prog="python -m magic141_jax.evaluation page",
        description="Writes the page of experiments, with tables and plots, from the comparisons in a folder.",
    )
    parser.add_argument("results", type=Path, metavar="RESULTS", help=f"folder with {page.INDEX} and its JSON files")
    parser.add_argument("docs", type=Path, metavar="DOCS", help=f"folder to write {page.PAGE} and {page.PLOTS}/ into")
    args = parser.parse_args(argv)
    for path in page.write(args.results, args.docs):
        print(f"wrote {path}")
    return 0


def main_vbench(argv: Sequence[str]) -> int:
    """Runs `vbench`; raises `UserError` for what the user can mend."""
    parser = OneLineParser(
        prog="python -m magic141_jax.evaluation vbench", description="Samples for VBench's image-to-video suite."
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of the videos; goes on with what is there")
    parser.add_argument("--weights", default=DEFAULT, metavar="DIR", help="weights folder (default: the embedded one)")
    parser.add_argument(
        "--images", type=Path, required=True, metavar="DIR", help="pictures: of the suite, data/crop/RATIO"
    )
    parser.add_argument(
        "--prompts", type=Path, metavar="JSON", help="vbench2_i2v_full_info.json; else the names of the pictures"
    )
    parser.add_argument(
        "--dimensions", default="", metavar="LIST", help="of the prompts: i2v_subject,camera_motion,..."
    )
    parser.add_argument(
        "--samples", type=int, default=5, metavar="N", help="videos of a prompt, each with its own seed"
    )
    parser.add_argument("--steps", type=int, metavar="N", help="sampling steps (default: the weights' own)")
    parser.add_argument("--guidance", type=float, metavar="G", help="guidance scale (default: the weights' own)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="draws the samples' seeds")
    args = parser.parse_args(argv)
    for name, low, high in (("samples", 1, 100), ("seed", 0, protocol.MAX_SEED)):
        if not low <= getattr(args, name) <= high:
            raise UserError(f"--{name} is {getattr(args, name)}; it must be from {low} to {high}")
    tasks = vbench.read_tasks(args.images, args.prompts, [d for d in args.dimensions.split(",") if d])
    given = {"num_inference_steps": args.steps, "guidance_scale": args.guidance}
    options = {k: v for k, v in given.items() if v is not None}
    pipeline = TextToVideoPipeline.from_pretrained(args.weights)
    about = vbench.describe(pipeline, tasks, options, samples=args.samples, seed=args.seed)
    paths = vbench.write(pipeline, tasks, args.out, about, options=options)
    for _ in tqdm(paths, total=len(about["samples"]), unit="video"):
        pass
    ratio = vbench.nearest_ratio(about["made"]["height"], about["made"]["width"])
    custom = "" if args.prompts else f" --mode custom_input --custom_image_folder {args.images}"
    print(f"{len(about['samples'])} videos of {len(tasks)} prompts in {args.out}; where VBench is installed:")
    print(f"python evaluate_i2v.py --videos_path {args.out} --dimension i2v_subject --ratio {ratio}{custom}")
    return 0


def _teller(bar: tqdm) -> protocol.Progress:
    """Tells a progress bar what has just been done."""

    def progress(text: str) -> None:
        bar.set_postfix_str(text, refresh=False)
        bar.update()

    return progress


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


COMMANDS = {
    "compare": main_compare,
    "report": main_report,
    "drift": main_drift,
    "page": main_page,
    "vbench": main_vbench,
}

if __name__ == "__main__":
    run_entry_point(main)
