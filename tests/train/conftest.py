"""Toys for the tests of training: a line to be fitted, as a method, an endless iterator of its points, and a run."""

import dataclasses
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from magic141_jax.train import loop, metrics, optim
from magic141_jax.train.checkpoint import Checkpoints
from magic141_jax.train.state import TrainState
from magic141_jax.train.step import make_step


@dataclasses.dataclass
class Line:
    """y = 2 x - 1 by least squares, once for each role."""

    roles: tuple[str, ...] = ("student",)
    cadence: dict[str, int] = dataclasses.field(default_factory=dict)
    frozen: dict[str, Any] = dataclasses.field(default_factory=dict)

    def init(self, key):
        return {role: {"kernel": jnp.zeros((1, 1)), "bias": jnp.zeros((1, 1))} for role in self.roles}

    def losses(self, params, batch, key, step):
        def error(p):
            return jnp.mean((batch["x"] @ p["kernel"] + p["bias"] - batch["y"]) ** 2)

        return {role: error(params[role]) for role in self.roles}, {"noise": jax.random.normal(key), "absent": jnp.nan}

    def components(self, params):
        return {}


class Points:
    """Batches of points: the n-th is a function of n, and number `bad` holds an infinity."""

    def __init__(self, size=8, bad=None):
        self.position, self.size, self.bad = 0, size, bad

    def __next__(self):
        x = np.random.default_rng(self.position).normal(size=(self.size, 1)).astype(np.float32)
        y = 2 * x - 1
        if self.position == self.bad:
            y[0] = np.inf
        self.position += 1
        return {"x": x, "y": y}

    def get_state(self):
        return {"position": self.position}

    def set_state(self, state):
        self.position = state["position"]


class Poisoned(Points):
    """Points of y = 2 x - 1, but that the batch at `position` is far off."""

    def __init__(self, at):
        super().__init__()
        self.at = at

    def __next__(self):
        at, batch = self.position, super().__next__()
        return batch | {"y": batch["y"] + 40 * (at == self.at)}


def sgd(rate):
    """Plain descent; a rate of zero learns nothing."""
    return optim.Optimizer(optax.sgd(rate), lambda count: jnp.float32(rate), 0.0)


def train(method, points, folder, *, config, optimizers=None, **hooks):
    """A run of the real step and loop in `folder`."""
    if optimizers is None:
        optimizers = {role: optim.make(optim.OptimizerConfig(warmup_steps=2), 20) for role in method.roles}
    state = TrainState.create(method.init(jax.random.key(0)), optimizers)
    checkpoints = Checkpoints(folder / "checkpoints", keep=config.keep)
    writer = metrics.MetricWriter(folder, steps=20, progress=False)
    step = make_step(method, optimizers)
    try:
        return loop.fit(step, state, points, config=config, checkpoints=checkpoints, writer=writer, **hooks)
    finally:
        writer.close()
        checkpoints.close()


@pytest.fixture
def toys():
    """The toy classes, and how to train them."""
    return types.SimpleNamespace(Line=Line, Points=Points, Poisoned=Poisoned, sgd=sgd, train=train)
