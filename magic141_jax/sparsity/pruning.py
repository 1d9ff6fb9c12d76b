"""Pruning while training: masks in the optimizer's state, so that any method trains sparse.

s(t) = s_f + (s_i - s_f) (1 - (t - t_0) / (t_1 - t_0))^3       share of zeros after update t (Zhu & Gupta,
                                                               arXiv 1710.01878), held after t_1
u    = transform(mask * g)                                     the optimizer sees no gradient of a pruned weight
mask <- pattern(score(w + u), s(t)) & mask                     at t_0, t_0 + every, ..., t_1
w    <- w + where(mask, u, -w)                                 exactly 0.0 where pruned, untouched elsewhere
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax

from magic141_jax import weights
from magic141_jax.errors import UserError
from magic141_jax.pytree import Params, count, flatten, unflatten
from magic141_jax.sparsity import masks as masks_lib
from magic141_jax.sparsity import scores as scores_lib
from magic141_jax.sparsity.masks import Distribution, Flat

Optimizer = TypeVar("Optimizer")  # train.optim.Optimizer, of which only fields are replaced


@dataclasses.dataclass(frozen=True)
class PruningConfig:
    """What is pruned, when, and by what score. Updates are those of the optimizer, counted from 0.

    Attributes:
      sparsity: the share of zeros in the end; 0 prunes nothing.
      pattern: "unstructured", "n:m" such as "2:4", "block RxC" such as "block 16x16", or whole "heads", "neurons" or
        "blocks", whose biases go with them; see `masks`.
      distribution: how much is dropped where, see `masks`.
      score: "magnitude", or "activation" (times the norm of the weight's input).
      norms: a safetensors file {path: (..., in)} of these norms.
      paths: a regex over dotted paths of the kernels that are pruned: by default attention and MLPs in blocks.
      start, end, every: masks are renewed at these updates, and at `end`; start = end prunes at once.
      initial: the sparsity at `start`.
      regrow: a pruned weight may come back when masks are renewed, where its update alone outscores a kept weight;
        until then the optimizer goes on to see its gradient.
      inherit: zeros of the kernels that training starts from count as pruned, and stay zero. With a sparsity of 0
        they are all that is pruned.
    """

    sparsity: float = 0.0
    pattern: str = "unstructured"
    distribution: Distribution = "column"
    score: Literal["magnitude", "activation"] = "magnitude"
    norms: str = ""
    paths: str = r"blocks\..*(qkv|attention_out|mlp_up|mlp_down)\.kernel$"
    start: int = 0
    end: int = 0
    every: int = 1
    initial: float = 0.0
    regrow: bool = False
    inherit: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1 or not 0 <= self.initial < 1:
            raise ValueError(f"sparsity {self.sparsity} and initial {self.initial} are shares, at least 0 and below 1")
        if not 0 <= self.start <= self.end or self.every < 1:
            raise ValueError(f"start {self.start}, end {self.end}, every {self.every}: 0 <= start <= end, 1 <= every")
        if self.initial > self.sparsity and not self.regrow:
            raise ValueError(f"initial {self.initial} is above sparsity {self.sparsity}, which needs regrow")
        if self.inherit and self.regrow:
            raise ValueError("inherit keeps zeros and regrow lets them grow: choose one")
        masks_lib.make(self.pattern, self.distribution)

    @property
    def active(self) -> bool:
        """Whether anything is pruned."""
        return self.sparsity > 0 or self.inherit


class PruningState(NamedTuple):
    """The state of a pruned optimizer: masks as a nested dict of the pruned kernels alone, updates done, its own."""

    masks: Params
    count: jax.Array
    inner: Any


def sparsity_at(config: PruningConfig, update: Any) -> jax.Array:
    """s(t), the share of zeros after update number t, which may be traced."""
    progress = jnp.clip((update - config.start) / max(config.end - config.start, 1), 0.0, 1.0)
    left = jnp.where(update >= config.end, 0.0, (1 - progress) ** 3)
    return config.sparsity + (config.initial - config.sparsity) * left


def renews(config: PruningConfig, update: Any) -> jax.Array:
    """Whether update number t, which may be traced, renews the masks."""
    within = (config.start <= update) & (update <= config.end)
    return within & (((update - config.start) % config.every == 0) | (update == config.end))


def first_masks(params: Params, config: PruningConfig) -> dict[str, jax.Array]:
    """{path: mask} before the first update: all true, but for the zeros that `config.inherit` keeps.

    Raises:
      UserError: `config.paths` matches no kernel.
    """
    flat = flatten(params)
    units = masks_lib.pruned_paths(flat, config.pattern)
    kernels = scores_lib.chosen(params, config.paths) if units is None else {path: flat[path] for path in units}
    return {
        path: leaf != 0 if config.inherit and not path.endswith(weights.VECTORS) else jnp.ones(leaf.shape, bool)
        for path, leaf in kernels.items()
    }


def new_masks(
    params: Params, config: PruningConfig, previous: Flat, *, norms: Mapping[str, Any] | None, sparsity: Any
) -> dict[str, jax.Array]:
    """{path: mask} of the parameters, within the previous masks unless `config.regrow` says otherwise.

    Args:
      params: nested, of the whole role.
      config: the pattern.
      previous: {path: mask}, whose kernels are pruned.
      norms: {path: (..., in)} of their inputs, for activation-aware scores; None scores by magnitude.
      sparsity: the share of zeros, possibly traced; a plain number is checked, see `masks.make`.
    """
    flat = flatten(params)
    scores = scores_lib.scores({path: flat[path] for path in previous if not path.endswith(weights.VECTORS)}, norms)
    if config.regrow:
        previous = {path: jnp.ones_like(mask) for path, mask in previous.items()}
    found = masks_lib.make(config.pattern, config.distribution)(flat, scores, sparsity, previous)
    return {path: found[path] & mask for path, mask in previous.items()}


def pruned(
    transform: optax.GradientTransformation, config: PruningConfig, norms: Mapping[str, Any] | None = None
) -> optax.GradientTransformation:
    """The transformation with weights pruned as `config` says; `norms` as for `new_masks`.

    At pruned places its updates are exactly minus the parameters, elsewhere those of `transform` bit for bit.
    """

    def init(params: Params) -> PruningState:
        masks = unflatten(first_masks(params, config))
        return PruningState(masks, jnp.zeros((), jnp.int32), transform.init(params))

    def update(grads: Params, state: PruningState, params: Params | None = None) -> tuple[Params, PruningState]:
        if params is None:
            raise ValueError("pruning needs the parameters: update(gradients, state, params)")
        seen = grads if config.regrow else project(state, grads)
        updates, inner = transform.update(seen, state.inner, params)

        def renewed() -> Params:
            moved, previous = optax.apply_updates(params, updates), flatten(state.masks)
            sparsity = sparsity_at(config, state.count)
            return unflatten(new_masks(moved, config, previous, norms=norms, sparsity=sparsity))

        masks = jax.lax.cond(renews(config, state.count), renewed, lambda: state.masks)
        updates = _where_masked(lambda mask, u, p: jnp.where(mask, u, -p), masks, updates, params)
        return updates, PruningState(masks, state.count + 1, inner)

    return optax.GradientTransformation(init, update)


def project(state: PruningState, tree: Params) -> Params:
    """A tree like the parameters, such as their average, with zeros at the pruned places."""
    return _where_masked(lambda mask, leaf: jnp.where(mask, leaf, 0), state.masks, tree)


def pruned_share(state: PruningState) -> jax.Array:
    """The share of pruned weights among the kernels that are pruned, float32."""
    kept = [jnp.sum(mask, dtype=jnp.int32).astype(jnp.float32) for mask in jax.tree.leaves(state.masks)]
    return 1 - sum(kept) / count(state.masks)


def sparse(optimizer: Optimizer, config: PruningConfig, params: Params, *, updates: int) -> Optimizer:
    """A role's optimizer that keeps its weights and their average pruned, and reports their sparsity.

    Args:
      optimizer: see `train.optim`.
      config: what is pruned.
      params: the role's parameters, or their shapes.
      updates: in the whole run.

    Raises:
      UserError: pruning would not end within the run, the role is an adapter, or kernels, pattern and norms do not fit
        each other.
    """
    if "adapter" in params:
        raise UserError(
            "config.pruning: merging an adapter fills zeros again; set config.method.roles.student to 'full'"
        )
    if config.end >= updates:
        raise UserError(f"config.pruning.end {config.end} must be below the number of updates, {updates}")
    norms = None
    if config.score == "activation":
        norms = scores_lib.read_norms(Path(config.norms), scores_lib.chosen(params, config.paths))

    def last_masks(params: Params) -> dict[str, jax.Array]:
        previous = first_masks(params, config)
        return new_masks(params, config, previous, norms=norms, sparsity=config.sparsity)

    jax.eval_shape(last_masks, params)  # raises what does not fit
    return dataclasses.replace(
        optimizer,
        transform=pruned(optimizer.transform, config, norms),  # pyright: ignore[reportAttributeAccessIssue]
        project=project,
        metrics=lambda state: {"sparsity": pruned_share(state)},
    )


def _where_masked(function: Callable[..., Any], masks: Any, tree: Any, *others: Any) -> Any:
    """`tree` with function(mask, leaf, other leaves) in the place of each leaf that has a mask."""
    if not isinstance(masks, Mapping):
        return function(masks, tree, *others)
    return {
        name: _where_masked(function, masks[name], branch, *(other[name] for other in others))
        if name in masks
        else branch
        for name, branch in tree.items()
    }
