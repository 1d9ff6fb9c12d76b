"""Makes videos from text, or from text and a picture.

    python sample.py --prompt "a shark moves left on a yellow background"
    python sample.py --prompt "a star moves left on a blue background" --image photo.png --duration 4 --output star.gif
    python sample.py --prompt_schedule story.jsonl --duration 60
    python sample.py --prompt "a small red boat" --weights owner/name --mesh fsdp=2,context=4

Writes the video (mp4, gif or webp, by extension; png: the image alone), the first image and a JSON sidecar beside it.
Prompt, seed, options and the weights' digest are in the metadata of each. The last line says what took how long.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args

from tqdm import tqdm

from magic141_jax import processes
from magic141_jax.aot import dry, preflight
from magic141_jax.errors import UserError, nearest, run_entry_point
from magic141_jax.pipelines import media, provenance
from magic141_jax.pipelines.components import DEFAULT, Carry, default_dtype
from magic141_jax.pipelines.options import parse_size, resolve
from magic141_jax.pipelines.schedule import opening, read_schedule
from magic141_jax.pipelines.text_to_video import TextToVideoPipeline
from magic141_jax.sharding import AXES, make_mesh, parse_mesh

MAX_SECONDS = 3600.0
MAX_VIDEOS = 10_000


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are `UserError`s."""

    def error(self, message: str) -> NoReturn:
        """Raises instead of printing the usage."""
        raise UserError(message.removeprefix("argument "))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv`; raises `UserError` for what the user can mend."""
    args = parse(argv)
    processes.start()
    with one_line_warnings():
        image = None if args.image is None else media.read_image(args.image)
        mesh = None if args.mesh is None else make_mesh(args.mesh)
        loading = {name: getattr(args, name) for name in provenance.LOADING} | {"dtype": args.dtype or default_dtype()}
        opened = {**loading, "mesh": mesh, "text_cache": args.text_cache}
        if args.preflight:
            pipeline = dry.pipeline(dry.Book(), **opened)
        else:
            pipeline = TextToVideoPipeline.from_pretrained(opened.pop("weights"), **opened)
        options = sampling_options(args)
        resolved = resolve(options, pipeline.components)
        args.upscale = media.upscale_factor(args.upscale, resolved.height, resolved.width)
        sampling = pipeline.components.sampling
        fps = sampling.fps
        window = max(resolved.num_frames - sampling.dropped_frames, 1)
        frames = window if args.duration is None else max(1, round(args.duration * fps))
        frames = 1 if args.output.suffix.lower() == ".png" else frames
        media.check_output(args.output, frames)
        if args.preflight:
            told = {**options, "total_frames": frames, "image": image, "schedule": args.schedule}
            pixels = frames * args.num_videos * resolved.height * resolved.width * args.upscale**2
            place = {"pixels": pixels, "place": args.output.parent}
            report = preflight.sampling(opened, args.prompt, told, videos=args.num_videos, **place)
            print(report.text())
            return 0 if report.fits else 1
        loading["mesh"] = None if mesh is None else dict(mesh.shape)
        start = time.perf_counter()
        with tqdm(total=frames * args.num_videos, unit="frame", disable=None if processes.leads() else True) as bar:
            for i, path in enumerate(output_paths(args.output, args.num_videos)):
                about = provenance.describe(
                    pipeline,
                    args.prompt,
                    {**options, "seed": options["seed"] + i},
                    schedule=args.schedule,
                    frames=frames,
                    upscale=args.upscale,
                    loading=loading,
                    image=args.image,
                )
                made = provenance.make(pipeline, about, path, image=image, progress=shown_on(bar))
                if made:
                    bar.write(f"wrote {', '.join(map(str, made))}", file=sys.stdout)
    if processes.leads():
        seconds = frames / fps * args.num_videos
        print(timing_line(pipeline.engine.seconds, time.perf_counter() - start, seconds))
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the flags and checks all that needs no weights."""
    parser = Parser(prog="sample.py", description=str(__doc__).splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--prompt", help="what to show (required, but for a schedule that begins at 0)")
    add("--prompt_schedule", type=Path, help='other prompts: a file of lines {"time": seconds, "prompt": "..."}')
    add("--negative_prompt", help="what to avoid; counts with --guidance other than 1")
    add("--image", type=Path, help="the first frame; made from the prompt unless given")
    add("--duration", type=float, help="seconds of video; one window unless given")
    add("--match_colors", type=float, default=0.0, help="0 to 1: holds border colours over a long video's windows")
    add(
        "--carry", choices=get_args(Carry), help="what a long video's next window knows of the last: docs/long_video.md"
    )
    add("--overlap_latents", type=int, help="latent frames that two windows of a long video share")
    add("--blend", action=argparse.BooleanOptionalAction, help="fades from window to window of a long video")
    add("--steps", type=int, help="sampling steps; as the weights were made for unless given, as below")
    add("--guidance", type=float, help="guidance scale; 1 is none, and twice as fast")
    add("--num_frames", type=int, help="frames of a clip, or of a window of a longer video: 4k + 1")
    add("--size", help="64, or WIDTHxHEIGHT, in pixels")
    add("--seed", type=int, default=0, help="video i of --num_videos has seed + i")
    add("--weights", default=DEFAULT, help='a weights folder, ours or in diffusers\' layout, a Hub id, or "default"')
    add("--image_weights", help="other weights that make the first image, such as FLUX; a folder or a Hub id")
    add("--revision", help="branch, tag or commit of --weights on the Hub")
    add("--lora", type=Path, help="a safetensors file of adapters for the transformer, in PEFT's naming")
    add("--lora_scale", type=float, default=1.0, help="how strongly the adapters count")
    add("--dtype", choices=("float32", "bfloat16"), help="of the large networks; by default bfloat16 but on a CPU")
    add("--mesh", help=f"devices along {', '.join(AXES)}, such as fsdp=2,context=4; one device unless given")
    add(
        "--offload",
        action="store_true",
        help="one network on the devices at a time; a window then moves two",
    )
    add("--text_cache", type=Path, help="a folder that keeps encoded prompts; for those no text encoder is read")
    add("--vae_tiles", type=int, help="squares of pixels, such as 256, in which the VAE works on larger pictures")
    add("--output", type=Path, default=Path("out.mp4"), help=", ".join(media.FORMATS))
    add("--num_videos", type=int, default=1, help="how many; out-0.mp4 and so on if more than 1")
    add("--upscale", type=int, help="enlarges what is written (Lanczos); by default to some 256 pixels, 1 keeps them")
    add("--preflight", action="store_true", help="only tell what this takes: memory, time, disk; 1 if it can't fit")
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        flag = unknown[0].split("=")[0]
        if not flag.startswith("--"):
            raise UserError(f"unexpected argument {flag!r}; put the prompt in quotes")
        raise UserError(f"unknown flag {flag}.{nearest(flag, [f'--{name}' for name in vars(args)])}")
    args.schedule = () if args.prompt_schedule is None else read_schedule(args.prompt_schedule)
    if args.prompt is None and not args.schedule:
        raise UserError('--prompt is missing; try --prompt "a shark moves left on a yellow background"')
    args.prompt, _ = opening(args.prompt, args.schedule)
    if args.duration is not None and not 0 < args.duration <= MAX_SECONDS:
        raise UserError(f"--duration is {args.duration} seconds; it must be above 0 and at most {MAX_SECONDS:.0f}")
    if args.steps is not None and args.steps < 1:
        raise UserError(f"--steps is {args.steps}; it must be at least 1")
    args.mesh = None if args.mesh is None else parse_mesh(args.mesh)
    if not 1 <= args.num_videos <= MAX_VIDEOS:
        raise UserError(f"--num_videos is {args.num_videos}; it must be from 1 to {MAX_VIDEOS}")
    media.check_output(args.output, 1)
    if args.image is not None and args.output.suffix.lower() == ".png":
        raise UserError("with --image, a .png would hold that picture alone; name an .mp4, .gif or .webp")
    return args


def sampling_options(args: argparse.Namespace) -> dict[str, Any]:
    """The pipelines' keyword options for the flags."""
    options = {
        "negative_prompt": args.negative_prompt,
        "num_inference_steps": args.steps,
        "guidance_scale": args.guidance,
        "seed": args.seed,
        "num_frames": args.num_frames,
        "match_colors": args.match_colors,
        "carry": args.carry,
        "overlap_latents": args.overlap_latents,
        "blend": args.blend,
    }
    if args.size is not None:
        options["width"], options["height"] = parse_size(args.size, "--size")
    return options


def output_paths(output: Path, count: int) -> list[Path]:
    """The output itself, or for several videos its name numbered."""
    return [output] if count == 1 else [output.with_stem(f"{output.stem}-{i}") for i in range(count)]


def shown_on(bar: tqdm) -> provenance.Progress:
    """Shows on a bar what is made, and how many frames of it there are."""

    def show(label: str, frames: int) -> None:
        bar.set_description(label)
        bar.update(frames)

    return show


def timing_line(seconds: dict[str, float], elapsed: float, length: float) -> str:
    """Seconds by stage, and the real-time factor: seconds of work, compilation apart, per second of video.

    "video" is the wait for windows, each with its decoding, but with --offload; "decode" is then that of the image.
    """
    names = ("text", "image", "video", "decode", "compile", *(name for name in ("move",) if name in seconds))
    stages = ", ".join(f"{name} {seconds[name]:.2f} s" for name in names)
    working = elapsed - seconds["compile"]
    return (
        f"{stages}; {length:.1f} s of video in {working:.2f} s without compilation: "
        f"real-time factor {working / length:.3f}"
    )


@contextlib.contextmanager
def one_line_warnings() -> Iterator[None]:
    """Warnings on one line of stderr, without file names."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: sys.stderr.write(f"warning: {message}\n")
        yield


if __name__ == "__main__":
    run_entry_point(main)
