"""Toys for distillation: small networks, and a backbone whose velocities and features are formulas."""

import dataclasses
import types
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magic141_jax.diffusion.conditioning import Conditioning
from magic141_jax.models import mmdit
from magic141_jax.models.mmdit import MMDiT
from magic141_jax.models.network import Network
from magic141_jax.train.conditioner import Conditioner, ConditioningConfig, NullText
from magic141_jax.train.method import Parts

SIZES = dataclasses.replace(mmdit.debug(), text_width=8, pooled_width=6, time_features=8)
NULL = NullText(jnp.zeros((3, 8)), jnp.array([True, False, False]), jnp.zeros(6))


def record(b=2, f=3, size=2, channels=4, seed=0):
    """A cached record of random latents and captions."""
    rng = np.random.default_rng(seed)
    return {
        "latents": jnp.asarray(rng.normal(size=(b, f, size, size, channels)), jnp.float32),
        "text": jnp.asarray(rng.normal(size=(b, 3, 8)), jnp.float32),
        "text_mask": jnp.ones((b, 3), bool),
        "pooled": jnp.asarray(rng.normal(size=(b, 6)), jnp.float32),
        "anchor": jnp.zeros((b, 16, 16, 3), jnp.uint8),
    }


def random_params(network, seed=0):
    """Parameters away from the zero-initialised output, so that every input matters."""
    leaves, tree = jax.tree.flatten(network.init(jax.random.key(seed)))
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    return tree.unflatten([x + 0.2 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves)])


def parts(vae=None, **changes):
    """What an experiment hands to a method: a network of `changes`, and a random teacher of the plain sizes."""
    plain = Network.create(MMDiT, SIZES)
    teacher = {"transformer": (SIZES, random_params(plain))}

    def conditioner(config):
        return Conditioner(config, None, NULL)

    network = Network.create(MMDiT, dataclasses.replace(SIZES, **changes))
    return Parts(network, "mmdit", conditioner, lambda: teacher, lambda: None, vae)


@dataclasses.dataclass
class Formulas:
    """A backbone whose roles are velocities (parameters of the role) -> (x, t, cond) -> v.

    Features are the latents, one a token, beside constants that let their mean and size outlive a layer norm.
    """

    velocities: Mapping[str, Callable]
    config: ConditioningConfig = dataclasses.field(default_factory=lambda: ConditioningConfig(known_frames=(1.0,)))

    @property
    def conditioner(self):
        return Conditioner(self.config, None, NULL)

    def velocity(self, params, role, *, trained=False, guidance=None):
        own = params[role] if trained else jax.lax.stop_gradient(params[role])
        made = self.velocities[role](own)
        return made if guidance is None else lambda x, t, cond: made(x, t, cond, guidance)

    @property
    def network(self):
        return types.SimpleNamespace(config=dataclasses.replace(SIZES, patch=(1, 1, 1), width=8))

    frozen_network = network

    def features(self, params, role, layers):
        def features(x, t, cond):
            constants = jnp.tile(jnp.array([2.0, -2.0]), (*x.shape[:-1], 2))
            tokens = jnp.concatenate([x, constants], -1).reshape(x.shape[0], -1, 8)
            return jnp.broadcast_to(tokens[None], (len(layers), *tokens.shape))

        return features

    def conditioning(self, params, part, record, key):
        shape = record["latents"].shape
        zeros = jnp.zeros(shape)
        return Conditioning(record["text"], record["text_mask"], record["pooled"], zeros, zeros[..., :1])


@pytest.fixture
def toys():
    """The toys."""
    return types.SimpleNamespace(
        SIZES=SIZES, record=record, random_params=random_params, parts=parts, Formulas=Formulas, NULL=NULL
    )
