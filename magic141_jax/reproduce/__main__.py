"""`python -m magic141_jax.reproduce`: makes a file of sample.py again, from what its metadata say.

    python -m magic141_jax.reproduce out.mp4              writes out-again.mp4, with its image and sidecar
    python -m magic141_jax.reproduce out.mp4 --check      writes nothing; exits with 1 unless all frames are equal
    python -m magic141_jax.reproduce out.mp4 --weights runs/student/weights --image photo.png

FILE is the mp4, gif, webp or png; of a video's .png its first image is made. Without metadata the .json beside it is
read. Frames are equal on the same kind of device with the same versions of jax and of the encoders.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from magic141_jax import processes
from magic141_jax.errors import OneLineParser, UserError, run_entry_point
from magic141_jax.pipelines import media, provenance

DIFFERS = 1  # the exit code


def _parser() -> OneLineParser:
    about = (__doc__ or "").partition("\n")[0]
    parser = OneLineParser(prog="python -m magic141_jax.reproduce", description=about, allow_abbrev=False)
    add = parser.add_argument
    add("file", metavar="FILE", type=Path, help="made by sample.py, or its .json")
    add("--check", action="store_true", help="compare the frames with FILE's; nothing is kept unless --output is given")
    add("--output", type=Path, help="what to write; FILE's name with -again unless given")
    add("--weights", help="where the weights are now: a folder, a Hub id")
    add("--image_weights", help="where those of the first image are")
    add("--lora", type=Path, help="where the adapters are")
    add("--image", type=Path, help="where the picture is that the video begins with")
    add("--other_weights", action="store_true", help="go on if weights are not those that made it")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line `arguments`; raises `UserError` for what the user can mend."""
    args = _parser().parse_args(arguments)
    about = provenance.read(args.file)
    target = _target(args, about)
    processes.start()
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: sys.stderr.write(f"warning: {message}\n")
        image = provenance.picture(about, args.image)
        places = {name: getattr(args, name) for name in ("weights", "image_weights", "lora")}
        pipeline = provenance.load(about, other_weights=args.other_weights, **places)
        _warn_of_other_machine(about)
        with tempfile.TemporaryDirectory() as folder:
            path = target or Path(folder) / f"again{args.file.suffix.lower()}"
            with tqdm(total=about["frames"], unit="frame", disable=None if processes.leads() else True) as bar:
                made = provenance.make(pipeline, about, path, image=image, progress=lambda _, n: bar.update(n))
            if target and made:
                print(f"wrote {', '.join(map(str, made))}")
            return _compared(args.file, path, about) if args.check and made else 0


def _target(args: argparse.Namespace, about: Mapping[str, Any]) -> Path | None:
    """What to write; None where nothing is to stay."""
    if args.file.suffix.lower() == ".json" and (args.check or args.output is None):
        raise UserError(f"{args.file} has no frames: name the video itself, or what to write with --output")
    if args.check and args.output is None:
        return None
    target = args.output or args.file.with_stem(f"{args.file.stem}-again")
    media.check_output(target, about["frames"])
    if args.file.with_suffix("").resolve() == target.with_suffix("").resolve():
        raise UserError(f"--output {target} would replace what is made again; choose another name")
    if args.check and target.suffix.lower() != args.file.suffix.lower():
        raise UserError(f"--check compares files of one kind: end --output in {args.file.suffix}")
    return target


def _warn_of_other_machine(about: Mapping[str, Any]) -> None:
    here = {"device": jax.local_devices()[0].device_kind, "jax": jax.__version__}
    other = [f"{name} {about[name]}, here {now}" for name, now in here.items() if about.get(name) not in (None, now)]
    if other:
        warnings.warn(f"made with {'; '.join(other)}: frames may differ a little", stacklevel=2)


def _compared(original: Path, made: Path, about: Mapping[str, Any]) -> int:
    """Says whether decoded frames are equal, as an exit code too."""
    count, difference = provenance.compare(original, made)
    if difference is None:
        print(f"equal: all {count} frames of {original}")
        return 0
    seconds = difference.first / about["fps"]
    print(
        f"different: {difference.frames} of {count} frames of {original}, first frame {difference.first} "
        f"({seconds:.3g} s), by at most {difference.largest} of 255"
    )
    return DIFFERS


if __name__ == "__main__":
    run_entry_point(main)
