"""All that a training step reads and writes, as one pytree: step, random key, and per role parameters, moments, EMA.

`memory_table` says what it takes on each device, from shapes and shardings alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from magic141_jax.pytree import Params
from magic141_jax.sharding import bytes_per_device
from magic141_jax.train.optim import Optimizer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """One pytree, donated to every step.

    Attributes:
      step: int32 scalar, the number of steps done.
      key: uint32 data of the run's PRNG key; the key of a step is `fold_in(key, step)`, so it never changes.
      params: {role: parameters}, float32.
      opt_state: {role: optimizer state}.
      ema: {role: averaged parameters}, only for the roles whose optimizer asks for it.
    """

    step: jax.Array
    key: jax.Array
    params: dict[str, Params]
    opt_state: dict[str, Any]
    ema: dict[str, Params]

    @classmethod
    def create(cls, params: dict[str, Params], optimizers: Mapping[str, Optimizer], *, seed: int = 0) -> TrainState:
        """The state before the first step."""
        return cls(
            step=jnp.zeros((), jnp.int32),
            key=jax.random.key_data(jax.random.key(seed)),
            params=params,
            opt_state={role: optimizers[role].transform.init(params[role]) for role in params},
            ema={role: jax.tree.map(jnp.copy, params[role]) for role in params if optimizers[role].ema_decay > 0},
        )

    def averaged(self) -> dict[str, Params]:
        """The parameters to use after training: the averaged ones where a role keeps them."""
        return {**self.params, **self.ema}


def ema_decay(decay: float, updates: jax.Array) -> jax.Array:
    """The decay after `updates` updates: min(decay, (1 + n) / (10 + n)), so that the start is soon forgotten."""
    n = updates.astype(jnp.float32)
    return jnp.minimum(decay, (1 + n) / (10 + n))


def memory_table(state: TrainState, frozen: Mapping[str, Params]) -> str:
    """GiB on each device of every role's parameters, gradients, optimizer state and average; a line a role.

    Args:
      state: arrays, or shape structs with shardings.
      frozen: {role: parameters} that are only read.
    """

    def size(tree: Any) -> float:
        return bytes_per_device(tree, jax.tree.map(lambda x: x.sharding, tree)) / 2**30

    # The gradients lie as the parameters do.
    rows = {
        role: [size(params), size(params), size(state.opt_state[role]), size(state.ema.get(role, {}))]
        for role, params in state.params.items()
    }
    rows |= {f"{role} (frozen)": [size(params), 0.0, 0.0, 0.0] for role, params in frozen.items()}
    total = sum(map(sum, rows.values()))
    lines = [f"{'GiB on a device':<20}{'parameters':>12}{'gradients':>12}{'moments':>12}{'average':>12}{'in all':>12}"]
    lines += [f"{role:<20}" + "".join(f"{x:>12.4g}" for x in (*parts, sum(parts))) for role, parts in rows.items()]
    return "\n".join([*lines, f"{total:.4g} GiB on each device, activations not counted"])
