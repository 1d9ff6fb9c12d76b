"""`python -m magic141_jax.quantize SRC DST`: a weights folder -> the same in fewer bytes.

    python -m magic141_jax.quantize default runs/int8
    python -m magic141_jax.quantize runs/pruned runs/small --form int4 --rest int8 --spare 0.1
    python -m magic141_jax.quantize runs/small runs/dense --expand

SRC is a weights folder, ours or in diffusers' layout, "default", or a Hub id. Zeros of a pruned network are packed away
where they are regular. The transformer's activations are measured on samples of some prompts: they say where rounding
does least harm (`--form int4`), which kernels are too sensitive for it (`--spare`), and how far the result is off. The
last lines tell the bytes of each component. DST samples, evaluates and serves as SRC does, and is never expanded when
it is loaded; `--expand` writes plain kernels, to train on or to export.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from magic141_jax import settings, weights
from magic141_jax.errors import OneLineParser, UserError, run_entry_point
from magic141_jax.models import kind_of, stored
from magic141_jax.models.stored import Form
from magic141_jax.pipelines import calibration
from magic141_jax.pipelines.components import DEFAULT, Model, enable_compilation_cache, find_folder, load_plain
from magic141_jax.pipelines.text_to_video import TextToVideoPipeline
from magic141_jax.pytree import Params, cast, count, flatten, unflatten
from magic141_jax.quantize import plan as plans
from magic141_jax.quantize.compress import compress

TRANSFORMER = "transformer"
OTHERS = ("vae", "image_encoder", "text_encoder", "text_encoder_2")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; see the module's docstring."""
    args = _parser().parse_args(arguments)
    if not 0 <= args.spare < 1:
        raise UserError(f"--spare is {args.spare}; it is a share of the kernels, from 0 to below 1")
    enable_compilation_cache()
    source, made = find_folder(args.source), {}
    weights.require_apart(source, args.target)
    for name, folder in _parts(source).items():
        if not args.expand and name != TRANSFORMER and args.others == "as_is":
            continue
        model = load_plain(folder)
        if args.expand:
            small, forms = model, {}
        elif name == TRANSFORMER:
            small, forms = _transformer(args, source, model)
        else:
            forms = plans.plan(_kernels(model), plans.named(args.others), paths="", pack=not args.no_pack)
            small = Model(*compress(*model, forms))
        made[name] = _written(small, forms)
        print(_bytes(name, model, made[name][1]))
    weights.derive(source, args.target, made)
    print(f"wrote {args.target}")
    return 0


def _parser() -> OneLineParser:
    parser = OneLineParser(prog="python -m magic141_jax.quantize", description=str(__doc__).splitlines()[0])
    add = parser.add_argument
    add("source", metavar="SRC", help=f'a weights folder, ours or in diffusers\' layout, a Hub id, or "{DEFAULT}"')
    add("target", metavar="DST", type=Path, help="the folder to write")
    names = tuple(plans.FORMS)
    add("--form", choices=names, default="int8", help="of attention and MLP of the transformer's blocks (int8)")
    add("--rest", choices=names, default="int8", help="of its other kernels, and of those spared (int8)")
    add("--others", choices=(*names, "as_is"), default="int8", help="of VAE and encoders, as_is leaves them (int8)")
    add("--group", type=int, help="rows that share a scale of int4 (32); 0 is a whole column")
    add("--paths", default=plans.MAIN, help="regex on the transformer's kernels that get --form")
    add("--spare", type=float, default=0.0, help="share of these kernels, the most sensitive, that get --rest instead")
    add("--no_pack", action="store_true", help="don't pack kernels that were pruned")
    add("--prompts", type=Path, help="a text file with a prompt a line to calibrate on; emoji captions unless given")
    add("--no_calibration", action="store_true", help="sample nothing: round by the weights alone")
    add("--report", type=Path, help="a JSON file for the error of each kernel and layer on its own")
    add("--expand", action="store_true", help="the other way: write plain kernels")
    return parser


def _transformer(args: argparse.Namespace, source: Path, model: Model) -> tuple[Model, dict[str, Form]]:
    """The transformer in its forms, calibrated on samples of itself, and the forms."""
    main = plans.named(args.form)
    if args.group is not None:
        main = dataclasses.replace(main, group=args.group)
    kernels, pack = _kernels(model), not args.no_pack
    planning = functools.partial(plans.plan, kernels, main, plans.named(args.rest), paths=args.paths, pack=pack)
    forms = planning()
    if args.no_calibration:
        if args.spare or args.report:
            raise UserError("--spare and --report measure on samples: leave out --no_calibration")
        return Model(*compress(*model, forms)), forms
    pipeline = TextToVideoPipeline.from_pretrained(source)
    found = calibration.examples(pipeline, calibration.read_prompts(args.prompts))
    norms = calibration.norms(*model, found)
    small = Model(*compress(*model, forms, norms=norms))
    report: dict[str, Any] = {}
    if args.spare or args.report:
        chosen = [path for path in kernels if re.search(args.paths, path)]
        changed = flatten(stored.dense(*small))
        alone = calibration.sensitivity(*model, found, {path: changed[path] for path in chosen})
        worst = sorted(chosen, key=lambda path: -max(alone[path]))[: round(args.spare * len(chosen))]
        forms = planning(spare=frozenset(worst))
        small = Model(*compress(*model, forms, norms=norms))
        report = {"alone": alone, "spared": worst}
    _, truth = calibration.Measured(*model)(model.params, found)
    off, _ = calibration.Measured(*small)(small.params, found, truth)
    print(f"{TRANSFORMER}: velocities are off by {100 * off:.2f} % of their norm, on {len(found)} batches of samples")
    if args.report is not None:
        args.report.parent.mkdir(parents=True, exist_ok=True)
        args.report.write_text(json.dumps({"error": off, **report}, indent=2) + "\n")
    return small, forms


def _parts(source: Path) -> dict[str, Path]:
    """The component folders of a weights folder that hold networks."""
    found = {name: weights.part(source, name) for name in (TRANSFORMER, *OTHERS)}
    return {name: folder for name, folder in found.items() if (folder / "config.json").is_file()}


def _kernels(model: Model) -> dict[str, jax.Array]:
    return {path: leaf for path, leaf in flatten(model.params).items() if path.endswith(stored.KERNEL)}


def _written(model: Model, forms: Mapping[str, Form]) -> tuple[dict[str, Any], Params]:
    """config.json and parameters of a component; what is in no form is in float32, but for tables of embeddings."""
    config = model.network.config
    written = {"model": kind_of(config), **settings.to_dict(config)}
    if forms:
        written[stored.KEY] = {path: settings.to_dict(form) for path, form in forms.items()}
    flat = flatten(model.params).items()
    halved = {path: cast(leaf, jnp.bfloat16) if path.endswith(".embedding") and forms else leaf for path, leaf in flat}
    return written, unflatten(halved)


def _bytes(name: str, model: Model, written: Params) -> str:
    values, held = count(model.params), sum(leaf.nbytes for leaf in jax.tree.leaves(written))
    share = held / (2 * values)
    return f"{name}: {values / 1e6:.2f} M parameters in {held / 1e6:.2f} MB, {100 * share:.1f} % of bfloat16"


if __name__ == "__main__":
    run_entry_point(main)
