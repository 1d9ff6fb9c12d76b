"""Previews put the data on the left and what the weights make of it on the right."""

import types

import jax.numpy as jnp
import numpy as np

from magic141_jax.diffusion.conditioning import Conditioning, known_latents
from magic141_jax.train import preview


def test_a_perfect_autoencoder_shows_the_clip_twice():
    def vae(params, x, *, method):
        return (x * params, None) if method == "encode" else x / params

    clips = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 4, 3), np.uint8)
    draw = preview.reconstruction(types.SimpleNamespace(vae=vae))
    shown = np.asarray(draw({"vae": jnp.float32(2.0)}, {"frames": jnp.asarray(clips)}))
    assert shown.shape == (2, 3, 4, 8, 3)
    np.testing.assert_allclose(shown, np.concatenate([clips, clips], axis=3) / 255, atol=1e-6)


def test_samples_keep_their_first_latent_frame():
    class Method:
        """A network that always predicts velocity 0, so that unknown frames stay noise."""

        config = types.SimpleNamespace(video_time=types.SimpleNamespace(shift=1.0))

        @staticmethod
        def transformer(params, inputs, t, *args, **kwargs):
            return jnp.zeros((*inputs.shape[:-1], 3))

    def condition(encoder, record, key, known, *, image_tokens):
        assert key is None and image_tokens, "no caption is dropped"
        held, mask = known_latents(record["latents"], known, 3)
        return Conditioning(jnp.zeros((2, 1, 1)), jnp.ones((2, 1), bool), jnp.zeros((2, 1)), held, mask)

    Method.conditioner = types.SimpleNamespace(condition=condition)
    Method.transformer.config = types.SimpleNamespace(known="channels", hold_known=False, prediction="velocity")
    latents = jnp.full((2, 3, 4, 4, 3), 7.0)
    draw = preview.generation(Method(), lambda params, x, method: x, {}, seed=0)
    shown = np.asarray(draw({"student": {"transformer": {}}}, {"latents": latents}))
    assert shown.shape == (2, 3, 4, 8, 3)
    assert (shown[:, :, :, :4] == 7).all() and (shown[:, 0] == 7).all()
    assert 0.7 < shown[:, 1:, :, 4:].std() < 1.3
