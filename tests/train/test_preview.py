"""Previews put the data on the left and what the weights make of it on the right."""

import types
from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from magic141_jax.train import preview
from magic141_jax.train.conditioner import ConditioningConfig


def test_a_perfect_autoencoder_shows_the_clip_twice():
    def vae(params, x, *, method):
        return (x * params, None) if method == "encode" else x / params

    clips = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 4, 3), np.uint8)
    draw = preview.reconstruction(types.SimpleNamespace(vae=vae))
    shown = np.asarray(draw({"vae": jnp.float32(2.0)}, {"frames": jnp.asarray(clips)}))
    assert shown.shape == (2, 3, 4, 8, 3)
    np.testing.assert_allclose(shown, np.concatenate([clips, clips], axis=3) / 255, atol=1e-6)


def test_samples_of_the_method_are_shown_beside_the_data():
    class Method:
        """Gives known frames as they are, and for the others the sum of a trained and a frozen number."""

        config = ConditioningConfig(known_frames=(0.0, 1.0))
        frozen: ClassVar = {"teacher": jnp.float32(2.0)}

        @staticmethod
        def sample(params, record, key, *, known):
            frame = jnp.arange(3)[None, :, None, None, None]
            return jnp.where(frame < known, record["latents"], params["student"] + params["teacher"])

    draw = preview.generation(Method(), lambda params, x, method: params * x, jnp.float32(10.0), seed=0)
    shown = np.asarray(draw({"student": jnp.float32(1.0)}, {"latents": jnp.full((2, 3, 4, 4, 3), 7.0)}))
    assert shown.shape == (2, 3, 4, 8, 3)
    assert (shown[:, :, :, :4] == 70).all() and (shown[:, 0] == 70).all()
    assert (shown[:, 1:, :, 4:] == 30).all()

    class Shorter(Method):
        """Reads more of a clip than it makes."""

        @staticmethod
        def sampled(record):
            return {"latents": record["latents"][:, -3:]}

        @classmethod
        def sample(cls, params, record, key, *, known):
            return Method.sample(params, cls.sampled(record), key, known=known)

    draw = preview.generation(Shorter(), lambda params, x, method: params * x, jnp.float32(10.0), seed=0)
    longer = jnp.concatenate([jnp.zeros((2, 2, 4, 4, 3)), jnp.full((2, 3, 4, 4, 3), 7.0)], axis=1)
    np.testing.assert_array_equal(draw({"student": jnp.float32(1.0)}, {"latents": longer}), shown)
