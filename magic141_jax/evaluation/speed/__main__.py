"""`python -m magic141_jax.evaluation.speed`: how fast weights sample on this machine, stage by stage and as a whole.

    python -m magic141_jax.evaluation.speed [--weights default] [--duration 60] [--repeats 5] [--json FILE]
        [--steps N] [--guidance G] [--num_frames N] [--size 64x64] [--dtype float32] [--mesh fsdp=2] [--no-starts]

Prints a table: for every number the size, frames, steps, guidance, devices and dtype that it holds for, and whether
programs were compiled before (warm) or not (cold). The rate of the transformer is held against that of a plain matrix
product in the same run. Last come starts of sample.py, cold and warm, for one clip.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from magic141_jax import __version__
from magic141_jax.errors import OneLineParser, UserError, run_entry_point
from magic141_jax.evaluation import report
from magic141_jax.evaluation.speed import clock, stages, table
from magic141_jax.pipelines.components import DEFAULT
from magic141_jax.pipelines.options import parse_size, resolve
from magic141_jax.pipelines.text_to_video import TextToVideoPipeline
from magic141_jax.sharding import make_mesh, parse_mesh

PROMPT = "a shark moves left on a yellow background"
MAX_REPEATS = 1000
MAX_SECONDS = 3600.0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line; raises `UserError` for what is wrong with it."""
    parser = OneLineParser(prog="python -m magic141_jax.evaluation.speed", description="Measures the speed of weights.")
    parser.add_argument("--weights", default=DEFAULT, metavar="DIR", help="weights folder (default: the embedded one)")
    parser.add_argument("--duration", type=float, default=60.0, metavar="S", help="seconds of a long video; 0: none")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="timed runs of each stage")
    parser.add_argument("--long_repeats", type=int, default=1, metavar="N", help="of the long video, and of starts")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--steps", type=int, metavar="N", help="sampling steps (default: the weights' own)")
    parser.add_argument("--guidance", type=float, metavar="G", help="guidance scale (default: the weights' own)")
    parser.add_argument("--num_frames", type=int, metavar="N", help="frames of a window (default: the weights' own)")
    parser.add_argument("--size", metavar="WxH", help="pixels (default: the weights' own)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the transformer")
    parser.add_argument("--mesh", help="devices along the mesh's axes, such as fsdp=2,context=4; one unless given")
    parser.add_argument("--no-starts", action="store_true", help="leave out the processes of sample.py")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all values here")
    args = parser.parse_args(argv)
    for name, low, high in (
        ("repeats", 1, MAX_REPEATS),
        ("long_repeats", 1, MAX_REPEATS),
        ("duration", 0, MAX_SECONDS),
    ):
        if not low <= getattr(args, name) <= high:
            raise UserError(f"--{name} is {getattr(args, name)}; it must be from {low} to {high}")
    args.size = None if args.size is None else parse_size(args.size, "--size")
    report.require_folders(args.json)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv`; raises `UserError` for what the user can mend."""
    args = parse(argv)
    given = options(args)
    mesh = None if args.mesh is None else make_mesh(parse_mesh(args.mesh))
    pipeline = TextToVideoPipeline.from_pretrained(args.weights, dtype=args.dtype, mesh=mesh)
    found = measure(pipeline, args, given)
    if args.json:
        report.write(args.json, report.to_json(found))
    print(table.table(found))
    return 0


def options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of a pipeline call that the flags give."""
    given = {"num_inference_steps": args.steps, "guidance_scale": args.guidance, "num_frames": args.num_frames}
    if args.size is not None:
        given["width"], given["height"] = args.size
    return {name: value for name, value in given.items() if value is not None}


def measure(pipeline: TextToVideoPipeline, args: argparse.Namespace, given: Mapping[str, Any]) -> dict[str, Any]:
    """Everything, as `table.table` takes it."""
    resolved, settings = resolve(given, pipeline.components), setup(pipeline, given)
    ceiling = clock.matmul(jnp.dtype(settings["dtype"]), args.repeats)
    made = stages.pieces(pipeline, args.prompt, given)
    found = clock.in_turns({name: piece.run for name, piece in made.items()}, args.repeats)
    if args.duration:
        frames = max(1, round(args.duration * settings["fps"]))
        made["video"] = stages.video(pipeline, args.prompt, given, frames)
        found["video"] = clock.timing([clock.lap(made["video"].run) for _ in range(args.long_repeats)])
    rows = [table.row(name, piece, found[name], ceiling, settings) for name, piece in made.items()]
    memory = clock.peak_memory()
    if not args.no_starts:
        runs = [
            stages.starts(start_arguments(args, resolved.num_frames / settings["fps"]))
            for _ in range(args.long_repeats)
        ]
        rows += table.start_rows(runs, resolved.num_frames, settings)
    return {
        "version": __version__,
        "settings": settings,
        "matmul": dataclasses.asdict(ceiling[0]) | {"operations": ceiling[1]},
        "rows": rows,
        "peak_memory_megabytes": memory,
    }


def setup(pipeline: TextToVideoPipeline, given: Mapping[str, Any]) -> dict[str, Any]:
    """What all numbers hold for."""
    components, resolved = pipeline.components, resolve(given, pipeline.components)
    count = 1 if components.mesh is None else components.mesh.size
    device = jax.devices()[0]
    return {
        "weights": components.folder.name,
        "weights_digest": components.digest,
        "size": f"{resolved.width}x{resolved.height}",
        "fps": components.sampling.fps,
        "window_frames": resolved.num_frames,
        "steps": resolved.num_inference_steps,
        "guidance": resolved.guidance_scale,
        "overlap_latents": resolved.overlap_latents,
        "dtype": components.transformer.network.config.compute_dtype,
        "devices": f"{count} {device.device_kind}",
        "device_count": count,
        "cores": os.cpu_count(),
        "jax": jax.__version__,
    }


def start_arguments(args: argparse.Namespace, seconds: float) -> list[str]:
    """The flags of sample.py for one clip of what is measured."""
    flags = {name: getattr(args, name) for name in ("weights", "steps", "guidance", "num_frames", "dtype", "mesh")}
    size = None if args.size is None else "x".join(map(str, args.size))
    flags |= {"size": size, "prompt": args.prompt, "duration": seconds}
    return [f"--{name}={value}" for name, value in flags.items() if value is not None]


if __name__ == "__main__":
    run_entry_point(main)
