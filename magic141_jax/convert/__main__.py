"""`python -m magic141_jax.convert`: looks into published weights, and writes ours for diffusers.

    python -m magic141_jax.convert check SRC [--dtype bfloat16] [--fsdp 8] [--reference REF.safetensors]
    python -m magic141_jax.convert export OURS DST [--format diffusers] [--dtype bfloat16]

SRC is a repository, one of its component folders, or "owner/name" on the Hugging Face Hub. `check` compares names and
shapes with the networks here and tells parameters, bytes and memory without reading any weights; with a reference
(made by tests/reference_activations.py, where torch and diffusers are installed) it runs the transformer and names
the first layer whose output differs.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from magic141_jax.convert import check, repository
from magic141_jax.convert.export import DTYPES, FORMATS, export
from magic141_jax.convert.tensors import open_file
from magic141_jax.errors import OneLineParser, UserError, run_entry_point
from magic141_jax.pipelines.components import default_dtype, find_folder
from magic141_jax.sharding import MeshConfig, make_mesh

TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}


def _parser() -> OneLineParser:
    parser = OneLineParser(prog="python -m magic141_jax.convert", description="Published weights in and out.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    checked = commands.add_parser("check", help="compare a repository with our networks; tell sizes and memory")
    checked.add_argument("source", metavar="SRC", help="a repository, a component folder, or owner/name on the Hub")
    checked.add_argument("--revision", help="branch, tag or commit on the Hub")
    checked.add_argument("--dtype", choices=tuple(TOLERANCE), help="of the parameters in memory (default: by device)")
    checked.add_argument("--fsdp", type=int, metavar="N", help="over how many devices the parameters are split")
    checked.add_argument("--reference", type=Path, metavar="REF", help="activations to compare the transformer with")
    checked.add_argument(
        "--tolerance", type=float, help="largest error relative to the largest value (default by dtype)"
    )
    made = commands.add_parser("export", help="write a weights folder of ours in a published layout")
    made.add_argument("source", metavar="OURS", type=Path, help="our weights folder, or one component of it")
    made.add_argument("target", metavar="DST", type=Path, help="folder to make")
    made.add_argument("--format", choices=FORMATS, default=FORMATS[0])
    made.add_argument("--dtype", choices=DTYPES, help="of the tensors written (default: as stored)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the command line (or `arguments`), runs the command and returns the exit code."""
    args = _parser().parse_args(arguments)
    return COMMANDS[args.command](args)


def _check(args: argparse.Namespace) -> int:
    dtype = args.dtype or default_dtype()
    mesh = make_mesh(MeshConfig(fsdp=args.fsdp)) if args.fsdp else None
    folder = find_folder(args.source, args.revision)
    misfits = []
    for part in check.component_folders(folder):
        try:
            component = repository.open_component(part)
            print("\n".join(check.describe(component, dtype, mesh)))
        except UserError as error:
            misfits.append(part.name)
            print(f"{part}: NOT READABLE, {error}")
    if args.reference:
        part = folder / "transformer" if (folder / "transformer").is_dir() else folder
        network, params = repository.load(part, mesh=mesh, compute_dtype=dtype)
        reference = open_file(args.reference)
        return _compare(check.compare(network, params, reference), args.tolerance or TOLERANCE[dtype])
    if misfits:
        raise UserError(f"{', '.join(misfits)} of {folder} can't be read here; see above")
    return 0


def _compare(differences: Iterator[check.Difference], tolerance: float) -> int:
    """Prints every difference and tells the first that is too large; 1 if there is one."""
    first = None
    for name, error in differences:
        wrong = not error <= tolerance  # so that NaN is wrong
        first = first or (wrong and name) or None
        print(f"  {name:24} {error:.2e}{'  <-' if wrong else ''}")
    print(f"the first layer that differs is {first}" if first else f"all layers agree within {tolerance:g}")
    return 1 if first else 0


def _export(args: argparse.Namespace) -> int:
    export(args.source, args.target, format=args.format, dtype=args.dtype)
    print(f"wrote {args.target}")
    return 0


COMMANDS = {"check": _check, "export": _export}

if __name__ == "__main__":
    run_entry_point(lambda: main())
