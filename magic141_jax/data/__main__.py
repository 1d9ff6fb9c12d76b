"""`python -m magic141_jax.data`: makes prepared data sets, and examines them.

    python -m magic141_jax.data prepare SRC DST [--size 64] [--num_frames 17] [--fps 8] [--weights DIR] ...
    python -m magic141_jax.data doctor DIR [--weights DIR] [--limit N]
    python -m magic141_jax.data emoji-pack FOLDER TARGET.zip

SRC is a folder with captions.csv or captions.jsonl, a manifest (.jsonl), `tfds:NAME[:SPLIT]` or `emoji[:SPLIT]`.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from magic141_jax import weights
from magic141_jax.convert import repository
from magic141_jax.data import cache, doctor, emoji_pack
from magic141_jax.data.buckets import Bucket, make_buckets, parse_size
from magic141_jax.data.emoji import DEFAULT_PACK, EmojiClips, EmojiConfig, EmojiPack
from magic141_jax.data.prepare import Encoders, in_windows, prepare
from magic141_jax.data.sources import FileClips, Joined, Source, TfdsClips
from magic141_jax.errors import OneLineParser, UserError, run_entry_point
from magic141_jax.models import MODELS, stored
from magic141_jax.models.text import TextEncoder
from magic141_jax.pipelines import published
from magic141_jax.pipelines.components import TEXT_ENCODERS, default_dtype, find_folder, load_model
from magic141_jax.settings import build

DEFAULTS = {"height": 64, "width": 64, "num_frames": 17, "fps": 8.0}
EMOJI_FPS = 8.0


def _parser() -> OneLineParser:
    parser = OneLineParser(prog="python -m magic141_jax.data", description="Makes prepared data sets.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    made = commands.add_parser("prepare", help="decode clips, cut them to size, encode them, store them for training")
    made.add_argument(
        "source", metavar="SRC", help="folder with captions.csv, manifest.jsonl, tfds:NAME[:SPLIT], emoji[:SPLIT]"
    )
    made.add_argument("target", metavar="DST", type=Path, help="folder to make")
    made.add_argument(
        "--size", nargs="+", metavar="HxW", help="one size or several: clips go to the nearest aspect ratio"
    )
    made.add_argument(
        "--num_frames", nargs="+", type=int, metavar="N", help="one length or several: the longest that fits"
    )
    made.add_argument(
        "--windows",
        type=int,
        default=1,
        metavar="N",
        help="store N windows of --num_frames in a row, each one's last"
        " frame the next one's first: clips are so much longer",
    )
    made.add_argument("--fps", type=float, help="frames a second; 0 keeps each file's own")
    made.add_argument(
        "--weights", metavar="DIR", help="store latents and text states made by this folder's vae and text_encoder"
    )
    made.add_argument(
        "--text_length", type=int, metavar="N", help="tokens kept of a caption (default: the text encoder's length)"
    )
    made.add_argument(
        "--limit",
        type=int,
        metavar="N",
        help="use at most N clips, drawn by --seed (emoji: N of each kind are composed)",
    )
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--overwrite", action="store_true", help="replace a prepared data set at DST")
    made.add_argument("--frames_key", help="tfds: feature with the frames")
    made.add_argument("--text_key", help="tfds: feature with the caption or label")
    made.add_argument("--data_dir", type=Path, help="tfds: where its data sets are kept")
    made.add_argument("--pack", type=Path, default=DEFAULT_PACK, help="emoji: the pack (default %(default)s)")
    made.add_argument("--kind", choices=("both", "video", "image"), default="both", help="emoji: what to compose")
    examined = commands.add_parser(
        "doctor", help="say what is wrong with a data set, and how to mend it; 1 if anything"
    )
    examined.add_argument(
        "folder", metavar="DIR", type=Path, help="prepared, or with captions.csv, or a manifest.jsonl"
    )
    examined.add_argument("--weights", metavar="DIR", help="that it is for: their encoders should have made it")
    examined.add_argument("--limit", type=int, metavar="N", help="read at most N records of each size and length")
    pack = commands.add_parser("emoji-pack", help="make the emoji pack from the unpacked npm packages")
    pack.add_argument("source", metavar="FOLDER", type=Path)
    pack.add_argument("target", metavar="TARGET", type=Path)
    return parser


def main(arguments: Sequence[str] | None = None) -> int | None:
    """Parses the command line (or `arguments`) and runs the command; returns its exit code, None being 0."""
    args = _parser().parse_args(arguments)
    return COMMANDS[args.command](args)


def _prepare(args: argparse.Namespace) -> None:
    for name, low in (("limit", 1), ("seed", 0), ("fps", 0), ("text_length", 3), ("windows", 1)):
        value = getattr(args, name)
        if value is not None and not (low <= value < 2**31 and math.isfinite(value)):
            raise UserError(f"--{name} is {value}; it must be {low} or more")
    cache.check_target(args.target, overwrite=args.overwrite)
    metadata: dict[str, Any] = {"source": args.source, "seed": args.seed}
    encoders, settings, factors = None, DEFAULTS, (8, 4)
    if args.weights:
        encoders, settings, factors, metadata["weights"] = _load_encoders(args.weights, args.text_length)
    fps = settings["fps"] if args.fps is None else args.fps
    sizes = [parse_size(text) for text in args.size] if args.size else [(settings["height"], settings["width"])]
    lengths = args.num_frames or [settings["num_frames"]]
    if args.windows > 1:
        if encoders is None or len(lengths) > 1:
            raise UserError("--windows takes --weights, which encode each window by itself, and one --num_frames")
        encoders = in_windows(encoders, lengths[0])
        lengths, metadata["windows"] = [(lengths[0] - 1) * args.windows + 1], args.windows
    buckets = make_buckets(sizes, lengths, spatial=factors[0], temporal=factors[1])
    source, limit = _open_source(args, buckets, fps or None)
    report = prepare(
        source,
        args.target,
        metadata={**metadata, "fps": fps or None},
        encoders=encoders,
        limit=limit,
        seed=args.seed,
        overwrite=args.overwrite,
        progress=True,
    )
    print(report.table())
    print(f"wrote {args.target}")


def _open_source(args: argparse.Namespace, buckets: tuple[Bucket, ...], fps: float | None) -> tuple[Source, int | None]:
    """The source that SRC names, and what is left of the limit."""
    kind, _, rest = args.source.partition(":")
    if kind == "tfds":
        name, _, split = rest.partition(":")
        keys = {"frames_key": args.frames_key, "text_key": args.text_key, "data_dir": args.data_dir}
        return TfdsClips(name, buckets=buckets, split=split or "train", **keys), args.limit
    if kind == "emoji":
        return _open_emoji(args, buckets, rest or "train", fps), None
    path = Path(args.source)
    if not path.exists():
        raise UserError(f"no folder or manifest {path}; SRC may also be tfds:NAME[:SPLIT] or emoji[:SPLIT]")
    return FileClips.open(path, buckets=buckets, fps=fps), args.limit


def _open_emoji(args: argparse.Namespace, buckets: tuple[Bucket, ...], split: str, fps: float | None) -> Source:
    """Composed emoji clips: one square size and one length, at the pack's own frame rate."""
    if len(buckets) != 1 or buckets[0].height != buckets[0].width:
        raise UserError("emoji clips are square and of one length; give one --size N and one --num_frames N")
    if fps != EMOJI_FPS:
        raise UserError(f"emoji clips have {EMOJI_FPS:g} frames a second; leave --fps out")
    pack = EmojiPack(args.pack)
    shape = {"size": buckets[0].height, "num_frames": buckets[0].num_frames, "split": split, "seed": args.seed}
    length = args.limit or EmojiConfig.length
    kinds = ("video", "image") if args.kind == "both" else (args.kind,)
    configs = [build(EmojiConfig, {**shape, "kind": kind, "length": length}, where="emoji") for kind in kinds]
    return Joined([EmojiClips(config, pack) for config in configs])


def _load_encoders(folder: str, text_length: int | None) -> tuple[Encoders, dict[str, Any], tuple[int, int], str]:
    """The encoders of a weights folder, the sizes it was made for, its (spatial, temporal) factors and its digest.

    Captions come to `text_length` tokens, or to the text encoder's own number of them: short captions train faster.
    Only vae/ and text_encoder/ are read, so that latents can be made before there is a transformer; a published
    folder's transformer is opened, which says how its prompts are read.
    """
    path = find_folder(folder)
    index = weights.read_config(path / "model_index.json") if (path / "model_index.json").exists() else {}
    theirs = published.is_published(index)
    network, params = load_model(weights.part(path, "vae"))
    text_encoder, sampling = (_published_text if theirs else _own_text)(path, index, text_length)

    @jax.jit
    def encode(params: Any, frames: jax.Array) -> jax.Array:
        return network(params, frames.astype(np.float32) / 255, method="encode_latents")

    encoders = Encoders(functools.partial(encode, params), text_encoder.encode, image_tokens=text_encoder.image_tokens)
    if theirs:
        encoders = encoders._replace(batch_size=1)  # a clip of published size fills a device
    settings = {key: sampling.get(key, value) for key, value in DEFAULTS.items()}
    factors = network.config.spatial_factor, network.config.temporal_factor
    return encoders, settings, factors, _encoders_digest(path)


def _encoders_digest(path: Path) -> str:
    """The digests, joined, of the components of a weights folder that prepare data."""
    parts = [weights.part(path, name) for name in ("vae", "text_encoder", "text_encoder_2")]
    return "".join(weights.digest(part) for part in parts if part.is_dir())


def _own_text(path: Path, index: Mapping[str, Any], length: int | None) -> tuple[TextEncoder, dict[str, Any]]:
    """The text encoder and the sampling settings of a weights folder."""
    folder = weights.part(path, "text_encoder")
    kind = weights.read_config(folder / "config.json").get("model")
    if kind not in TEXT_ENCODERS:
        raise UserError(f"{folder} holds {kind!r}; known are {', '.join(TEXT_ENCODERS)}")
    return TEXT_ENCODERS[kind](folder, length), index.get("sampling", {})


def _published_text(path: Path, index: Mapping[str, Any], length: int | None) -> tuple[TextEncoder, dict[str, Any]]:
    """The same of a published pipeline folder."""
    if length is not None:
        raise UserError("--text_length: published weights read prompts of their own length; leave it out")
    config = repository.open_component(path / "transformer").network.config
    load = functools.partial(load_model, overrides={"compute_dtype": default_dtype()})
    return published.read(path, index, config, load)


def _doctor(args: argparse.Namespace) -> int:
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit is {args.limit}; it must be 1 or more")
    report = doctor.examine(args.folder, _expected(args.weights) if args.weights else None, limit=args.limit)
    print(report.table())
    return 0 if report.healthy else 1


def _expected(folder: str) -> doctor.Expected:
    """What the networks of a weights folder take, by their configs alone."""
    path = find_folder(folder)
    vae, text, transformer = (_config(weights.part(path, name)) for name in ("vae", "text_encoder", "transformer"))
    if vae is None:
        raise UserError(f"{path} has no vae; name the weights that prepare the data (--weights)")
    takes = transformer or text  # a transformer need not be there yet
    return doctor.Expected(
        _encoders_digest(path),
        vae.latent_channels,
        vae.spatial_factor,
        vae.temporal_factor,
        getattr(takes, "text_width", None) or getattr(takes, "width", None),
        getattr(takes, "pooled_width", None) or getattr(takes, "width", None),
    )


def _config(folder: Path) -> Any:
    """The config of a component's network; None where there is no such component."""
    if not folder.is_dir():
        return None
    mapping = weights.read_config(folder / "config.json")
    if repository.is_published(mapping):
        return repository.open_component(folder).network.config
    fields = {name: value for name, value in mapping.items() if name not in ("model", stored.KEY)}
    return build(MODELS[mapping["model"]][0], fields, where=f"{folder.name}/config.json")


def _emoji_pack(args: argparse.Namespace) -> None:
    made = emoji_pack.build(args.source, args.target)
    print(", ".join(f"{count} {what}" for what, count in made.items()) + f" in {args.target}")


COMMANDS = {"prepare": _prepare, "doctor": _doctor, "emoji-pack": _emoji_pack}

if __name__ == "__main__":
    run_entry_point(main)
