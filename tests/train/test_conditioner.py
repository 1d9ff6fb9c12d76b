"""Captions dropped at their rate, history noise on known frames only, image tokens only for those who know a frame."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magic141_jax.diffusion import conditioning
from magic141_jax.diffusion.guidance import branches
from magic141_jax.models.image_encoder import ImageEncoder, ImageEncoderConfig
from magic141_jax.models.network import Network
from magic141_jax.train.conditioner import Conditioner, ConditioningConfig, NullText, as_float, weighted_mean

NULL = NullText(jnp.zeros((3, 8)), jnp.array([True, False, False]), jnp.zeros(6))


def conditioner(image_rows=0, **config):
    image = ImageEncoderConfig(patch=8, width=8, layers=1, heads=2, mlp=16, text_width=8)
    return Conditioner(ConditioningConfig(**config), Network.create(ImageEncoder, image), NULL, image_rows)


def record(b, f, image_rows=0):
    rng = np.random.default_rng(0)
    s = image_rows + 3
    return {
        "latents": jnp.asarray(rng.normal(size=(b, f, 4, 4, 4)), jnp.float16),
        "text": jnp.asarray(rng.normal(size=(b, s, 8)), jnp.float16),
        "text_mask": jnp.ones((b, s), bool),
        "pooled": jnp.asarray(rng.normal(size=(b, 6)), jnp.float16),
        "anchor": jnp.asarray(rng.integers(0, 256, (b, 16, 16, 3)), jnp.uint8),
    }


def test_captions_are_dropped_at_the_given_rate():
    made, given = conditioner(caption_dropout=0.25), record(2000, 1)
    cond = made.condition(None, given, jax.random.key(0), jnp.zeros(2000, int), image_tokens=False)
    dropped = np.asarray((cond.pooled == 0).all(-1))
    assert 0.2 < dropped.mean() < 0.3
    np.testing.assert_array_equal(dropped, np.asarray((cond.text == 0).all((1, 2))))
    np.testing.assert_array_equal(dropped, np.asarray(cond.text_mask.sum(-1) == 1))
    np.testing.assert_array_equal(cond.text[~dropped], given["text"][~dropped])


@pytest.mark.parametrize("encoded", [False, True])
def test_cached_image_rows_stay_when_the_caption_goes(encoded):
    rows, given, known = 4, record(64, 3, image_rows=4), jnp.arange(64) % 3
    made = conditioner(image_rows=rows, caption_dropout=0.5)
    encoder = made.image_encoder.init(jax.random.key(0)) if encoded else None
    made = made if encoded else dataclasses.replace(made, image_encoder=None)
    cond = made.condition(encoder, given, jax.random.key(0), known, image_tokens=True)
    before = int(encoded)  # one token of 16 x 16 pixels
    assert cond.image_tokens == before + rows and cond.text.shape == (64, before + rows + 3, 8)
    dropped = np.asarray((cond.pooled == 0).all(-1))
    assert 0 < dropped.sum() < 64
    for other in (cond, made.negative(cond)):
        np.testing.assert_array_equal(other.text[:, before:-3], given["text"][:, :rows])
        np.testing.assert_array_equal(other.text_mask[:, :-3], np.repeat(known[:, None] > 0, before + rows, 1))
    np.testing.assert_array_equal(cond.text[~dropped, -3:], given["text"][~dropped, rows:])
    assert (cond.text[dropped, -3:] == 0).all() and (made.negative(cond).text[:, -3:] == 0).all()
    guided = branches(lambda x, t, c: c.text, made.negative(cond))(cond.known, jnp.ones(64), cond)
    np.testing.assert_array_equal(guided[1][:, :-3], cond.text[:, :-3])
    alone = made.condition(encoder, given, None, known, image_tokens=False)
    assert alone.image_tokens == 0 and alone.text_mask.shape == (64, 3)
    np.testing.assert_array_equal(alone.text, given["text"][:, rows:])


def test_history_noise_touches_known_frames_only():
    made = conditioner(history_noise_probability=1.0, history_noise_max=0.5)
    encoder = made.image_encoder.init(jax.random.key(0))
    clean = made.condition(encoder, record(4, 3), None, jnp.array([0, 1, 2, 2]), image_tokens=True)
    noised = made.noise_history(clean, jax.random.key(1))
    changed = np.asarray(jnp.abs(noised.known - clean.known).max((2, 3, 4)) > 0)
    np.testing.assert_array_equal(changed, np.asarray(clean.mask[:, :, 0, 0, 0] > 0))
    assert clean.text_mask[0, : clean.image_tokens].sum() == 0 and clean.text_mask[1].all()
    narrow = conditioner(history_noise_probability=1.0, history_noise_min=0.5, history_noise_max=0.5)
    at_half = conditioning.noise_known(clean, jax.random.split(jax.random.key(1), 3)[2], 0.5)
    np.testing.assert_allclose(narrow.noise_history(clean, jax.random.key(1)).known, at_half.known, rtol=1e-6)


def test_the_negative_branch_keeps_the_picture():
    made = conditioner()
    encoder = made.image_encoder.init(jax.random.key(0))
    cond = made.condition(encoder, record(2, 3), None, jnp.array([1, 1]), image_tokens=True)
    other, n = made.negative(cond), cond.image_tokens
    np.testing.assert_array_equal(other.text[:, :n], cond.text[:, :n])
    np.testing.assert_array_equal(other.known, cond.known)
    assert (other.text[:, n:] == 0).all() and (other.pooled == 0).all() and (cond.text[:, n:] != 0).any()


def test_known_counts_are_drawn_and_leave_a_frame_to_predict():
    known = conditioner(known_frames=(0.25, 0.0, 0.75)).draw_known(jax.random.key(0), (4000, 2, 4, 4, 4))
    assert set(np.unique(known)) == {0, 1}, "two of two frames are never known"
    assert 0.7 < float(known.mean()) < 0.8


def test_a_weighted_mean_counts_positions_and_channels():
    values = jnp.arange(12.0).reshape(1, 3, 1, 1, 4)
    weights = jnp.array([1.0, 0.0, 1.0]).reshape(1, 3, 1, 1, 1)
    assert weighted_mean(values, weights)[0] == pytest.approx((0 + 1 + 2 + 3 + 8 + 9 + 10 + 11) / 8)
    assert as_float(jnp.array([255], jnp.uint8)) == 1.0


def test_bad_probabilities_are_refused():
    with pytest.raises(ValueError, match="known_frames are probabilities"):
        ConditioningConfig(known_frames=(0.5, 0.6))
    with pytest.raises(ValueError, match="caption_dropout must be between"):
        ConditioningConfig(caption_dropout=2.0)
    with pytest.raises(ValueError, match="history_noise_min must be between 0 and history_noise_max"):
        ConditioningConfig(history_noise_min=0.3, history_noise_max=0.2)


def test_samples_are_shown_with_the_first_frame_if_one_is_ever_known():
    shown = [conditioner(known_frames=p).config.shown(3) for p in ((1.0,), (1.0, 0.0), (0.5, 0.5), (0.0, 0.0, 1.0))]
    assert shown == [0, 0, 1, 1] and conditioner(known_frames=(0.0, 1.0)).config.shown(1) == 0, "images know none"
    made = conditioner(caption_dropout=1.0, history_noise_probability=1.0)
    encoder = made.image_encoder.init(jax.random.key(0))
    cond, given = made.clean(encoder, record(2, 3), 1), record(2, 3)
    np.testing.assert_array_equal(cond.known[:, 0], given["latents"][:, 0])
    np.testing.assert_array_equal(cond.text[:, cond.image_tokens :], given["text"])
    assert cond.image_tokens > 0 and float(cond.mask.mean()) == pytest.approx(1 / 3)
    assert made.clean(encoder, record(2, 3), 0).image_tokens == 0
