"""One training step as a pure jitted function: gradients of every active role, guarded update, EMA.

    step(state, batch) -> state', metrics

A batch may be split into micro-batches whose gradients are averaged in a scan, so that one step is one update
whatever the accumulation. Where a loss or a gradient is not finite nothing of the state changes but the flag
`finite` in the metrics, on which the loop stops.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from magic141_jax import sharding
from magic141_jax.errors import UserError
from magic141_jax.pytree import Params
from magic141_jax.train.method import Batch, Method, Metrics, active_roles
from magic141_jax.train.optim import Optimizer
from magic141_jax.train.state import TrainState, ema_decay

Step = Callable[[TrainState, Batch, int], tuple[TrainState, Metrics]]


def make_step(
    method: Method, optimizers: Mapping[str, Optimizer], *, accumulate: int = 1, layout: TrainState | None = None
) -> Step:
    """Builds `step(state, batch, number) -> (state, metrics)`.

    `state` is donated. `number` is the host's copy of `state.step`; it chooses, without waiting for the device,
    which roles are updated, and at most a few combinations are ever compiled. Metrics are scalars on the device:
    the method's own, `loss/<role>`, `grad_norm/<role>`, `learning_rate/<role>`, those of the role's optimizer and
    `finite`. `layout` holds the shardings that the state keeps from step to step; without it the compiler chooses.
    """
    jitted = jit_step(method, optimizers, accumulate=accumulate, layout=layout)

    def step(state: TrainState, batch: Batch, number: int) -> tuple[TrainState, Metrics]:
        return jitted(state, batch, dict(method.frozen), active=active_roles(method, number))

    return step


def jit_step(
    method: Method, optimizers: Mapping[str, Optimizer], *, accumulate: int = 1, layout: TrainState | None = None
) -> Any:
    """The jitted program behind a step, (state, batch, frozen, *, active), to be called or to be lowered."""
    step = functools.partial(_step, method, optimizers, accumulate=accumulate)
    return jax.jit(
        step if layout is None else sharding.over(layout.step.mesh, step),  # pyright: ignore[reportAttributeAccessIssue]
        static_argnames="active",
        donate_argnums=0,
        out_shardings=None if layout is None else (layout, None),
    )


def _step(
    method: Method,
    optimizers: Mapping[str, Optimizer],
    state: TrainState,
    batch: Batch,
    frozen: dict[str, Params],
    *,
    active: tuple[str, ...],
    accumulate: int,
) -> tuple[TrainState, Metrics]:
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
    gradients = functools.partial(_gradients, method, {**frozen, **state.params}, active=active, step=state.step)
    grads, metrics = _accumulated(gradients, batch, key, accumulate)
    params, opt_state, ema = dict(state.params), dict(state.opt_state), dict(state.ema)
    finite = jnp.array(True)
    for role in active:
        optimizer = optimizers[role]
        norm = optax.global_norm(grads[role])
        finite &= jnp.isfinite(norm) & jnp.isfinite(metrics[f"loss/{role}"])
        updates, opt_state[role] = optimizer.transform.update(grads[role], state.opt_state[role], state.params[role])
        params[role] = optax.apply_updates(state.params[role], updates)
        done = state.step // method.cadence.get(role, 1)
        if role in ema:
            decay = ema_decay(optimizer.ema_decay, done)
            averaged = jax.tree.map(lambda a, p, d=decay: a + (1 - d) * (p - a), ema[role], params[role])
            ema[role] = optimizer.project(opt_state[role], averaged)
        own = {"grad_norm": norm, "learning_rate": optimizer.schedule(done), **optimizer.metrics(opt_state[role])}
        metrics |= {f"{name}/{role}": value for name, value in own.items()}
    updated = TrainState(state.step + 1, state.key, params, opt_state, ema)
    guarded = jax.tree.map(lambda new, old: jnp.where(finite, new, old), updated, state)
    return guarded, metrics | {"finite": finite}


def _gradients(
    method: Method, params: dict[str, Params], batch: Batch, key: jax.Array, *, active: tuple[str, ...], step: jax.Array
) -> tuple[dict[str, Params], Metrics]:
    """Gradients of each active role's own loss, and the metrics. XLA shares the forward passes.

    It also leaves out whatever only idle roles' losses and metrics need, once nobody asks for these.
    """
    grads: dict[str, Params] = {}
    metrics: Metrics = {}
    for role in active:

        def loss(own: Params, role: str = role) -> tuple[jax.Array, Any]:
            losses, extra = method.losses({**params, role: own}, batch, key, step)
            return losses[role], (losses, extra)

        (_, (losses, extra)), grads[role] = jax.value_and_grad(loss, has_aux=True)(params[role])
        metrics |= extra | {f"loss/{name}": value for name, value in losses.items()}
    idle = {name for role in method.roles if role not in active for name in metrics if role in name.split("/")}
    return grads, {name: value for name, value in metrics.items() if name not in idle}


def _accumulated(
    gradients: Callable[[Batch, jax.Array], tuple[Any, Metrics]], batch: Batch, key: jax.Array, accumulate: int
) -> tuple[dict[str, Params], Metrics]:
    """Averages gradients and metrics over `accumulate` micro-batches in one scan."""
    if accumulate == 1:
        return gradients(batch, key)

    def split(x: jax.Array) -> jax.Array:
        if x.shape[0] % accumulate:
            raise UserError(f"a batch of {x.shape[0]} can't be split into {accumulate} equal parts (train.accumulate)")
        # Strided, so that an axis sharded over devices stays whole on each of them.
        return jnp.swapaxes(x.reshape(x.shape[0] // accumulate, accumulate, *x.shape[1:]), 0, 1)

    parts = jax.tree.map(split, batch)
    keys = jax.random.split(key, accumulate)

    def one(total: Any, part: Any) -> tuple[Any, Metrics]:
        grads, metrics = gradients(*part)
        return jax.tree.map(lambda a, b: a + b / accumulate, total, grads), metrics

    shapes, _ = jax.eval_shape(gradients, jax.tree.map(lambda x: x[0], parts), keys[0])
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    grads, metrics = jax.lax.scan(one, zeros, (parts, keys))
    mean = {name: jnp.nanmean(v) if not name.startswith("loss/") else jnp.mean(v) for name, v in metrics.items()}
    return grads, mean
