"""One logit a patch; it sees motion, and each patch sees its own neighbourhood only."""

import jax
import jax.numpy as jnp
import numpy as np

from magic141_jax.models.discriminator import Discriminator, DiscriminatorConfig
from magic141_jax.models.network import Network


def test_logits_judge_frames_and_their_change():
    network = Network.create(Discriminator, DiscriminatorConfig(channels=(8, 8)))
    params = network.init(jax.random.key(0))
    frames = jax.random.uniform(jax.random.key(1), (2, 3, 16, 24, 3), minval=-1)
    logits = jax.jit(network)(params, frames)
    assert logits.shape == (6, 4, 6, 1)
    logits = logits.reshape(2, 3, 4, 6)
    swapped = jax.jit(network)(params, frames[:, jnp.array([1, 0, 2])]).reshape(2, 3, 4, 6)
    assert not np.allclose(logits[:, 2], swapped[:, 2]), "the last frame is the same, the change to it is not"
    first = jax.jit(network)(params, frames[:, :1]).reshape(2, 1, 4, 6)
    np.testing.assert_allclose(logits[:, 0], first[:, 0], atol=1e-5)
