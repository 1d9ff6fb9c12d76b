"""Optimizers from a config: AdamW or Muon, warm-up and decay, clipping by global norm, weight decay on matrices.

Learning rate at update n of N, with w warm-up updates and a decay over the last d = decay_fraction * N:

    n < w: peak (n + 1) / w      n < N - d: peak      else: peak times a cosine or a line down to final_fraction
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from magic141_jax.pytree import Params


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """How one role is optimized.

    Attributes:
      name: "adamw", or "muon" (orthogonalised momentum for the hidden matrices, AdamW for the rest).
      learning_rate: the peak; of AdamW's part when the name is "muon".
      muon_learning_rate: the peak of Muon's part, scaled so that its updates have AdamW's size (0.2 RMS).
      decay: the shape of the decay, over the last `decay_fraction` of the run, to `final_fraction` of the peak.
      weight_decay: decoupled, on matrices and convolution kernels only.
      clip_norm: the largest global norm of the gradient; 0 switches clipping off.
      ema_decay: of the averaged parameters; 0 keeps none.
      adam_paths: a regex over dotted paths of the matrices that Muon leaves to AdamW (ends of the network).
    """

    name: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 3e-4
    muon_learning_rate: float = 1e-3
    warmup_steps: int = 100
    decay: Literal["constant", "cosine", "linear"] = "cosine"
    decay_fraction: float = 0.5
    final_fraction: float = 0.0
    b1: float = 0.9
    b2: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    ema_decay: float = 0.999
    adam_paths: str = r"embed|patch|time|final|modulation|adaln|project"

    def __post_init__(self) -> None:
        for name, low, high in (("decay_fraction", 0, 1), ("final_fraction", 0, 1), ("ema_decay", 0, 1)):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} must be between {low} and {high}, got {getattr(self, name)}")
        if self.learning_rate <= 0 or self.warmup_steps < 0:
            raise ValueError("learning_rate must be positive and warmup_steps not negative")


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """An optax transformation with the schedule that it follows and the decay of its role's averaged parameters.

    Attributes:
      transform, schedule, ema_decay: see above.
      project: (optimizer state, averaged parameters) -> the latter as this optimizer holds the parameters, such as
        with the same zeros.
      metrics: optimizer state -> {name: scalar}, logged as "<name>/<role>".
    """

    transform: optax.GradientTransformation
    schedule: Callable[[Any], jax.Array]
    ema_decay: float
    project: Callable[[Any, Params], Params] = lambda state, tree: tree
    metrics: Callable[[Any], dict[str, jax.Array]] = lambda state: {}


def make(config: OptimizerConfig, updates: int) -> Optimizer:
    """The optimizer of one role for a run of `updates` updates."""
    schedule = make_schedule(config, updates, config.learning_rate)
    if config.name == "muon":
        inner = _muon(config, updates, schedule)
    else:
        inner = optax.adamw(
            schedule,
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=is_matrix,
        )
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm > 0 else optax.identity()
    return Optimizer(optax.chain(clip, inner), schedule, config.ema_decay)


def make_schedule(config: OptimizerConfig, updates: int, peak: float) -> Callable[[Any], jax.Array]:
    """The learning rate as a function of the number of updates done (see the module's formula)."""
    decay_updates = config.decay_fraction * updates if config.decay != "constant" else 0.0

    def schedule(count: Any) -> jax.Array:
        n = jnp.asarray(count, jnp.float32)
        warm = jnp.minimum((n + 1) / max(config.warmup_steps, 1), 1.0)
        progress = jnp.clip((n - (updates - decay_updates)) / max(decay_updates, 1.0), 0.0, 1.0)
        falling = 0.5 * (1 + jnp.cos(jnp.pi * progress)) if config.decay == "cosine" else 1 - progress
        return peak * warm * (config.final_fraction + (1 - config.final_fraction) * falling)

    return schedule


def is_matrix(params: Params) -> Params:
    """A tree of bools: which leaves are matrices or kernels. Biases and scales of stacked layers are not."""

    def test(path: tuple[Any, ...], leaf: Any) -> bool:
        return leaf.ndim >= 2 and str(getattr(path[-1], "key", path[-1])) not in ("bias", "scale")

    return jax.tree_util.tree_map_with_path(test, params)


def _muon(config: OptimizerConfig, updates: int, schedule: Callable[[Any], jax.Array]) -> optax.GradientTransformation:
    """Muon over the last two axes of the hidden kernels; layers stacked in front are separate matrices."""
    exclude = re.compile(config.adam_paths)

    def dimensions(params: Params) -> Any:
        def one(path: tuple[Any, ...], leaf: Any, matrix: bool) -> Any:
            dotted = ".".join(str(getattr(k, "key", k)) for k in path)
            if not matrix or leaf.ndim > 3 or exclude.search(dotted):
                return None
            return optax.contrib.MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1)

        return jax.tree_util.tree_map_with_path(one, params, is_matrix(params))

    return optax.contrib.muon(
        make_schedule(config, updates, config.muon_learning_rate),
        weight_decay=config.weight_decay,
        adam_b1=config.b1,
        adam_b2=config.b2,
        adam_learning_rate=schedule,
        muon_weight_dimension_numbers=dimensions,
        consistent_rms=0.2,
        # Rows scaled to near orthogonality first make four iterations as good as five (arXiv 2512.04632).
        preconditioning="aol",
        ns_steps=4,
    )
