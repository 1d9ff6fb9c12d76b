"""`python -m magic141_jax.sparsity SRC DST`: a weights folder -> the same with a pruned transformer.

    python -m magic141_jax.sparsity default runs/half --pattern unstructured --sparsity 0.5
    python -m magic141_jax.sparsity default runs/nm --pattern 2:4
    python -m magic141_jax.sparsity default runs/slim --single_blocks 3 --heads 3 --neurons 512 --conditions 80

Blocks, heads, neurons and values of the condition are cut out: DST's network is smaller and faster everywhere. Single
weights become zeros, which `python -m magic141_jax.quantize` packs away. The least important go, measured on samples of
some prompts: single weights by their size and that of what enters them (Wanda), heads and neurons by what their map's
output loses when the others are moved to do their work, which they then are (`--score surgeon`; other scores move
nothing), conditions always so, blocks by how far the velocities are off without them. The last lines tell what is left,
how far the result is off, and the flags with which train.py recovers what was lost.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from magic141_jax import settings, weights
from magic141_jax.errors import OneLineParser, UserError, run_entry_point
from magic141_jax.models.mmdit import MMDiT, MMDiTConfig
from magic141_jax.models.network import Network
from magic141_jax.pipelines import calibration
from magic141_jax.pipelines.calibration import Example, Measured
from magic141_jax.pipelines.components import DEFAULT, Model, enable_compilation_cache, find_folder, load_plain
from magic141_jax.pipelines.text_to_video import TextToVideoPipeline
from magic141_jax.pytree import Params, count, flatten, unflatten
from magic141_jax.sparsity import pruning, structured
from magic141_jax.sparsity.pruning import PruningConfig
from magic141_jax.sparsity.scores import chosen, scores

STACKS = ("double_blocks", "single_blocks")
TRANSFORMER = "transformer"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; see the module's docstring."""
    args = _parser().parse_args(arguments)
    if args.pattern is None and not any(_sizes(args).values()) and args.norms is None:
        raise UserError("nothing to prune: give --pattern, or what to keep of --heads, --neurons, --double_blocks...")
    single = None if args.pattern is None else _single(args)
    enable_compilation_cache()
    source = find_folder(args.source)
    weights.require_apart(source, args.target)
    model = load_plain(weights.part(source, TRANSFORMER))
    found = calibration.examples(TextToVideoPipeline.from_pretrained(source), calibration.read_prompts(args.prompts))
    _, truth = Measured(*model)(model.params, found)
    if args.norms is not None:
        args.norms.parent.mkdir(parents=True, exist_ok=True)
        save_file({path: np.asarray(x) for path, x in calibration.norms(*model, found).items()}, args.norms)
    small = _cut(model, args, found)
    if single is not None:
        small = _masked(small, single, _norms(small, args, found))
    off, _ = Measured(*small)(small.params, found, truth)
    config = {"model": "mmdit", **settings.to_dict(small.network.config)}
    # an adapter for a transformer of other sizes is of no use
    unfit = {"continuation": None} if small.network.config != model.network.config else {}
    weights.derive(source, args.target, {TRANSFORMER: (config, small.params), **unfit})
    print(_summary(model, small, off, pattern=args.pattern))
    print(f"wrote {args.target}")
    return 0


def _parser() -> OneLineParser:
    parser = OneLineParser(prog="python -m magic141_jax.sparsity", description=str(__doc__).splitlines()[0])
    add = parser.add_argument
    add("source", metavar="SRC", help=f'a weights folder, ours or in diffusers\' layout, a Hub id, or "{DEFAULT}"')
    add("target", metavar="DST", type=Path, help="the folder to write")
    add("--pattern", help="of single weights: unstructured, n:m such as 2:4, or 'block 16x16'")
    add("--sparsity", type=float, help="share of zeros (0.5; of n:m what it says)")
    add("--distribution", default="column", help="where the zeros are: column, layer, global or erk (column)")
    add("--paths", default=PruningConfig.paths, help="regex on the kernels that --pattern is for")
    add("--heads", type=int, help="attention heads to keep in every block")
    add("--neurons", type=int, help="MLP neurons to keep in every block")
    add("--conditions", type=int, help="values to keep of the vector that modulates the blocks")
    add("--double_blocks", type=int, help="double-stream blocks to keep")
    add("--single_blocks", type=int, help="single-stream blocks to keep")
    add("--score", choices=("surgeon", "activation", "magnitude"), default="surgeon", help="what counts (surgeon)")
    add("--prompts", type=Path, help="a text file with a prompt a line to measure on; emoji captions unless given")
    add("--norms", type=Path, help="a safetensors file to write the norms to, for training with pruning.norms")
    return parser


def _sizes(args: argparse.Namespace) -> dict[str, int | None]:
    return {name: getattr(args, name) for name in ("heads", "neurons", "conditions", *STACKS)}


def _cut(model: Model, args: argparse.Namespace, found: Sequence[Example]) -> Model:
    """The network with as many blocks, heads and neurons as were asked for; blocks first, and all by fresh scores."""
    blocks = {stack: getattr(args, stack) for stack in STACKS if getattr(args, stack) is not None}
    if blocks:
        effects = _effects(model, found)
        params = structured.silence(model.network.config, model.params, "blocks", effects, blocks)
        model = _shrunk(model, params)
    for kind in ("heads", "neurons"):
        keep = getattr(args, kind)
        if keep is not None and args.score == "surgeon":
            inputs = calibration.grams(*model, found, structured.OUTER[kind])
            model = _shrunk(model, structured.operate(model.network.config, model.params, kind, inputs, keep))
        elif keep is not None:
            found_scores = scores(_kernels(model.params), _norms(model, args, found))
            model = _shrunk(model, structured.silence(model.network.config, model.params, kind, found_scores, keep))
    if args.conditions is not None:
        (gram,) = calibration.grams(*model, found, structured.CONDITION).values()
        config, params = structured.condense(model.network.config, model.params, gram[0], args.conditions)
        model = Model(Network.create(MMDiT, config), params)
    return model


def _shrunk(model: Model, params: Params) -> Model:
    config, params = structured.shrink(model.network.config, params)
    return Model(Network.create(MMDiT, config), params)


def _effects(model: Model, found: Sequence[Example]) -> dict[str, jax.Array]:
    """How far the velocities are off without each block: {stack: (blocks,)}."""
    config, measured = model.network.config, Measured(*model)
    _, truth = measured(model.params, found)
    made = {}
    for stack in STACKS:
        blocks = getattr(config, stack)
        made[stack] = np.zeros(blocks)
        for block in range(blocks if blocks > 1 else 0):
            others = {name: jnp.ones(getattr(config, name)) for name in STACKS}
            others[stack] = others[stack].at[block].set(0)
            without = structured.silence(config, model.params, "blocks", others, {stack: blocks - 1})
            made[stack][block], _ = measured(without, found, truth)
    return {stack: jnp.asarray(values) for stack, values in made.items()}


def _single(args: argparse.Namespace) -> PruningConfig:
    """Which single weights go; raises `UserError` for numbers or a pattern that make no sense."""
    part = re.fullmatch(r"(\d+):([1-9]\d*)", args.pattern)
    sparsity = args.sparsity
    if sparsity is None:
        sparsity = 1 - int(part[1]) / int(part[2]) if part else 0.5
    values = {"pattern": args.pattern, "distribution": args.distribution, "paths": args.paths, "inherit": True}
    return settings.build(PruningConfig, {"sparsity": sparsity, **values}, where="pruning")


def _masked(model: Model, config: PruningConfig, norms: Mapping[str, jax.Array] | None) -> Model:
    """The network with single weights set to zero."""
    masks = pruning.first_masks(model.params, config)
    masks = pruning.new_masks(model.params, config, masks, norms=norms, sparsity=config.sparsity)
    flat = flatten(model.params)
    zeroed = {path: jnp.where(mask, flat[path], 0) for path, mask in masks.items()}
    return Model(model.network, unflatten({**flat, **zeroed}))


def _norms(model: Model, args: argparse.Namespace, found: Sequence[Example]) -> dict[str, jax.Array] | None:
    return None if args.score == "magnitude" else calibration.norms(*model, found)


def _kernels(params: Params) -> dict[str, Any]:
    return chosen(params, r"blocks\..*(attention_out|mlp_down)\.kernel")


def _summary(model: Model, small: Model, off: float, *, pattern: str | None) -> str:
    """What is left, how far it is off, and the flags of train.py that go on from it."""
    before, after = count(model.params), count(small.params)
    nonzero = sum(int(jnp.count_nonzero(leaf)) for leaf in jax.tree.leaves(small.params))
    old, new = model.network.config, small.network.config
    flags = [
        f"--config.model.{field.name}={getattr(new, field.name)}"
        for field in dataclasses.fields(MMDiTConfig)
        if getattr(new, field.name) != getattr(old, field.name) and field.name != "compute_dtype"
    ]
    flags += ["--config.pruning.inherit=True"] * (pattern is not None)
    return (
        f"{after / 1e6:.2f} of {before / 1e6:.2f} M parameters, {100 * (1 - nonzero / after):.1f} % of them zero; "
        f"velocities are off by {100 * off:.1f} % of their norm\n"
        f"to recover: python train.py --config.init_from=DST {' '.join(flags)} and a teacher (docs/compression.md)"
    )


if __name__ == "__main__":
    run_entry_point(main)
