"""The terms of the VAE loss by hand, random crops, and the adversary's two sides, on a toy autoencoder."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from magic141_jax.errors import UserError
from magic141_jax.models.discriminator import Discriminator, DiscriminatorConfig
from magic141_jax.models.network import Network
from magic141_jax.models.vae import VideoVAE
from magic141_jax.train import autoencoding, optim
from magic141_jax.train.autoencoding import Autoencoding, AutoencodingConfig
from magic141_jax.train.state import TrainState
from magic141_jax.train.step import make_step


@dataclasses.dataclass(frozen=True)
class ToyConfig:
    latent_channels: int = 4
    spatial_factor: int = 2
    temporal_factor: int = 1
    latent_mean: tuple[float, ...] = (0.0,)
    latent_std: tuple[float, ...] = (1.0,)


class ToyVAE(VideoVAE):
    """One linear map of 2 x 2 patches each way."""

    def __init__(self, config, *, rngs):
        self.config = config
        self.down = nnx.Linear(12, 8, rngs=rngs)
        self.up = nnx.Linear(4, 12, rngs=rngs)

    def encode(self, frames):
        b, t, y, x, c = frames.shape
        patches = frames.reshape(b, t, y // 2, 2, x // 2, 2, c).transpose(0, 1, 2, 4, 3, 5, 6)
        return tuple(jnp.split(self.down(patches.reshape(b, t, y // 2, x // 2, 12)), 2, axis=-1))

    def decode(self, raw):
        b, t, h, w, _ = raw.shape
        patches = self.up(raw).reshape(b, t, h, w, 2, 2, 3).transpose(0, 1, 2, 4, 3, 5, 6)
        return patches.reshape(b, t, 2 * h, 2 * w, 3)


def method(**config):
    adversary = Network.create(Discriminator, DiscriminatorConfig(channels=(8, 8)))
    return Autoencoding(AutoencodingConfig(**config), Network.create(ToyVAE, ToyConfig()), discriminator=adversary)


def frames(b=4, t=5, size=8):
    """Slowly varying colours, which four channels of a 2 x 2 patch can hold."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (b, t, size // 4, size // 4, 3))
    return coarse.repeat(4, 2).repeat(4, 3).astype(np.uint8)


def test_terms_by_hand():
    target = jnp.zeros((1, 2, 4, 4, 3))
    restored = target.at[:, 1].set(0.5)
    terms = autoencoding.reconstruction_terms(restored, target)
    assert {k: float(v) for k, v in terms.items()} == {"l1": 0.25, "mse": 0.125, "gradient": 0.5}
    assert float(autoencoding.pyramid_distance(restored, target)) == pytest.approx(0.25), "a flat error has no detail"
    checker = target.at[:, :, ::2, ::2].set(1.0)
    assert float(autoencoding.pyramid_distance(checker, target)) == pytest.approx(0.375 + 0.25)
    assert float(autoencoding._psnr(restored, target)) == pytest.approx(-10 * np.log10(0.125 / 4))


def test_crops_are_pieces_of_their_own_clip():
    clips = np.arange(8 * 9 * 6 * 6 * 3).reshape(8, 9, 6, 6, 3)
    pieces = np.asarray(autoencoding.crop(jnp.asarray(clips), jax.random.key(0), 5, 4))
    assert pieces.shape == (8, 5, 4, 4, 3)
    starts = set()
    for clip, piece in zip(clips, pieces):
        start = np.argwhere(clip[..., 0] == piece[0, 0, 0, 0])[0]
        starts.add(tuple(start))
        t, y, x = start
        np.testing.assert_array_equal(piece, clip[t : t + 5, y : y + 4, x : x + 4])
    assert len(starts) > 1
    whole = jnp.asarray(clips)
    assert autoencoding.crop(whole, jax.random.key(0), 0, 100) is whole


def test_kl_of_a_standard_normal_is_zero():
    m = method(kl=1.0, l1=0, gradient=0, mse=0)
    params = jax.tree.map(jnp.zeros_like, m.init(jax.random.key(0)))
    losses, metrics = m.losses(params, {"video": {"frames": frames()}}, jax.random.key(0), 0)
    assert float(losses["vae"]) == 0
    # Zero weights restore mid-grey.
    grey = np.mean([10 * np.log10(1 / np.mean((clip / 255 - 0.5) ** 2)) for clip in frames()])
    assert float(metrics["video/psnr"]) == pytest.approx(grey, rel=1e-3)


def test_an_autoencoder_learns_images_and_videos():
    m = method(perceptual=0.5, crop_frames=3, crop_size=4)
    optimizers = {"vae": optim.make(optim.OptimizerConfig(learning_rate=1e-2, warmup_steps=5), 150)}
    state = TrainState.create(m.init(jax.random.key(0)), optimizers)
    step = make_step(m, optimizers)
    batch, psnr = {"image": {"frames": frames(t=1)}, "video": {"frames": frames()}}, []
    for number in range(150):
        state, metrics = step(state, batch, number)
        psnr.append(float(metrics["video/psnr"]))
    assert np.mean(psnr[-10:]) > np.mean(psnr[:10]) + 8


@pytest.mark.parametrize("loss", ["relativistic", "hinge"])
def test_the_adversary_learns_to_tell_and_starts_late(loss):
    m = method(adversarial=0.1, adversarial_start=5, adversarial_loss=loss)
    assert m.roles == ("vae", "discriminator")
    batch = {"video": {"frames": frames(b=2, t=2)}}
    configs = {"vae": 1e-9, "discriminator": 1e-2}
    optimizers = {r: optim.make(optim.OptimizerConfig(learning_rate=x, warmup_steps=0), 60) for r, x in configs.items()}
    state, step = TrainState.create(m.init(jax.random.key(0)), optimizers), make_step(m, optimizers)
    history = []
    for number in range(20):
        state, metrics = step(state, batch, number)
        history.append({name: float(value) for name, value in metrics.items()})
    assert history[-1]["loss/discriminator"] < 0.6 * history[0]["loss/discriminator"]
    for number, line in enumerate(history):
        plain = line["video/l1"] + line["video/gradient"] + line["video/mse"] + 1e-4 * line["video/kl"]
        adversarial = line["loss/vae"] - plain
        assert adversarial == pytest.approx(0.1 * line["video/adversarial"] if number >= 5 else 0, abs=1e-4)


def test_crops_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="crop_size 5 is not a multiple of 2"):
        method(crop_size=5)
    vae = Network.create(ToyVAE, ToyConfig(temporal_factor=4))
    with pytest.raises(UserError, match="nearest are 5 and 9"):
        Autoencoding(AutoencodingConfig(crop_frames=6), vae)
    with pytest.raises(ValueError, match="needs a discriminator"):
        Autoencoding(AutoencodingConfig(adversarial=0.1), vae)
