"""Toys for the tests of training: a line to be fitted, as a method, and an endless iterator of its points."""

import dataclasses
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest


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


@pytest.fixture
def toys():
    """The toy classes."""
    return types.SimpleNamespace(Line=Line, Points=Points)
