"""The joint objective: exact where the network is known, known frames left out, tasks separate, captions dropped."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magic141_jax.models import mmdit
from magic141_jax.models.image_encoder import ImageEncoder, ImageEncoderConfig
from magic141_jax.models.mmdit import MMDiT
from magic141_jax.models.network import Network
from magic141_jax.train import optim
from magic141_jax.train.conditioner import Conditioner, NullText
from magic141_jax.train.flow_matching import FlowMatching, FlowMatchingConfig
from magic141_jax.train.state import TrainState
from magic141_jax.train.step import make_step

SIZES = dataclasses.replace(mmdit.debug(), mlp_ratio=4.0, text_width=8, pooled_width=6, time_features=8)
NULL = NullText(jnp.zeros((3, 8)), jnp.array([True, False, False]), jnp.zeros(6))


def records(b, f, key=0):
    rng = np.random.default_rng(key)
    return {
        "latents": rng.normal(size=(b, f, 4, 4, 4)).astype(np.float16),
        "text": rng.normal(size=(b, 3, 8)).astype(np.float16),
        "text_mask": np.ones((b, 3), bool),
        "pooled": rng.normal(size=(b, 6)).astype(np.float16),
        "anchor": rng.integers(0, 256, (b, 16, 16, 3), np.uint8),
    }


def method(prediction="velocity", **config):
    image = ImageEncoderConfig(patch=8, width=8, layers=1, heads=2, mlp=16, text_width=8)
    network = Network.create(MMDiT, dataclasses.replace(SIZES, prediction=prediction))
    config = FlowMatchingConfig(**config)
    return FlowMatching(config, network, Conditioner(config, Network.create(ImageEncoder, image), NULL))


def random_like(params, key=0, scale=0.3):
    """Parameters away from the zero-initialised output, so that every input matters."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(key), len(leaves))
    return tree.unflatten([x + scale * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves)])


def test_a_zero_network_has_the_loss_of_the_data():
    # A fresh network predicts 0: the error is |eps - x0|^2, on average 1 + the data's mean square.
    m = method(known_weight=0.0)
    batch = {"image": records(64, 1), "video": records(64, 3)}
    losses, metrics = jax.jit(m.losses)(m.init(jax.random.key(0)), batch, jax.random.key(1), 0)
    assert metrics["t2i"] == pytest.approx(2, rel=0.1) and metrics["i2v"] == pytest.approx(2, rel=0.1)
    assert losses["student"] == pytest.approx(float(metrics["t2i"] + metrics["i2v"]), rel=1e-5)
    assert jnp.isnan(metrics["t2v"]), "no sample was text to video"


@pytest.mark.parametrize(("weight", "changes"), [(0.0, False), (0.5, True)])
def test_known_frames_count_as_configured(weight, changes):
    m = method(known_weight=weight, known_frames=(0.0, 0.0, 1.0), image_weight=0.0)
    params = m.init(jax.random.key(0))  # predicts 0, so a frame's error depends on that frame alone
    batch = {"video": records(4, 3)}
    other = {"video": {**batch["video"], "latents": batch["video"]["latents"].copy()}}
    other["video"]["latents"][:, :2] += 5
    losses = jax.jit(m.losses)
    first, second = (losses(params, b, jax.random.key(1), 0) for b in (batch, other))
    assert (float(first[0]["student"]) != pytest.approx(float(second[0]["student"]))) == changes
    np.testing.assert_allclose(first[1]["i2v"], second[1]["i2v"], rtol=1e-6)


def test_text_to_video_sees_neither_image_tokens_nor_known_frames():
    m = method(known_frames=(1.0,), caption_dropout=0.0)
    params = random_like(m.init(jax.random.key(0)))
    batch = {"video": records(4, 3)}
    other = {"video": {**batch["video"], "anchor": 255 - batch["video"]["anchor"]}}
    losses = jax.jit(m.losses)
    loss = [float(losses(params, b, jax.random.key(1), 0)[0]["student"]) for b in (batch, other)]
    assert loss[0] == loss[1]
    video = method(known_frames=(0.0, 1.0), caption_dropout=1.0)
    losses = jax.jit(video.losses)
    loss = [float(losses(params, b, jax.random.key(1), 0)[0]["student"]) for b in (batch, other)]
    assert loss[0] != loss[1], "a dropped caption keeps the image tokens"


def test_one_clip_is_learned():
    m = method("sample", known_frames=(0.5, 0.5), caption_dropout=0.0)
    batch = {"video": records(4, 2)}
    batch["video"]["latents"][:] = 2.0
    optimizers = {"student": optim.make(optim.OptimizerConfig(learning_rate=2e-2, warmup_steps=2), 100)}
    state = TrainState.create(m.init(jax.random.key(0)), optimizers)
    step, losses = make_step(m, optimizers), []
    before = jax.device_get(state.params["student"]["image_encoder"])
    for number in range(40):
        state, metrics = step(state, batch, number)
        losses.append(float(metrics["loss/student"]))
    assert np.mean(losses[-10:]) < 0.6 * np.mean(losses[:3])
    moved = jax.tree.map(
        lambda a, b: np.abs(a - b).max(), before, jax.device_get(state.params)["student"]["image_encoder"]
    )
    assert max(jax.tree.leaves(moved)) > 0, "the image encoder is trained along"


def test_samples_follow_the_flow_from_their_first_frame():
    m = method("sample", known_frames=(0.0, 1.0))
    params = m.init(jax.random.key(0))  # predicts x0 = 0: every walk ends there
    draw = jax.jit(m.sample, static_argnames=("known", "keep"))
    record = records(2, 3)
    made, own = (np.asarray(draw(params, record, jax.random.key(1), known=1, keep=keep)) for keep in (True, False))
    np.testing.assert_array_equal(made[:, 0], record["latents"][:, 0])
    np.testing.assert_allclose(own, 0, atol=1e-5)
    np.testing.assert_array_equal(made[:, 1:], own[:, 1:])
