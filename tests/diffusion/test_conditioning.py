"""Known latents, masks and tokens: what the network is told besides (x, t)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magic141_jax.diffusion.conditioning import (
    Conditioning,
    keep_known,
    known_latents,
    model_input,
    noise_known,
    replace_text,
    with_image_tokens,
)

B, F, H, W, C = 3, 4, 2, 2, 5
LATENTS = 1 + jax.random.uniform(jax.random.key(0), (B, F, H, W, C))


def make(count=2, image_tokens=2) -> Conditioning:
    known, mask = known_latents(LATENTS, count, F)
    text, text_mask = jnp.full((B, 3, 6), 7.0), jnp.array([[True, True, False]] * B)
    tokens = jnp.full((B, image_tokens, 6), 9.0)
    text, text_mask = with_image_tokens(text, text_mask, tokens)
    return Conditioning(text, text_mask, jnp.zeros((B, 6)), known, mask, image_tokens=image_tokens)


@pytest.mark.parametrize("count", [0, 1, 2, 4])
def test_the_first_frames_are_known_and_the_rest_is_zero(count):
    known, mask = known_latents(LATENTS, count, F)
    np.testing.assert_array_equal(known[:, :count], LATENTS[:, :count])
    assert not known[:, count:].any()
    np.testing.assert_array_equal(mask[..., 0], np.broadcast_to(np.arange(F)[:, None, None] < count, (B, F, H, W)))


def test_counts_may_be_traced_and_differ_per_sample():
    counts = jnp.array([0, 1, 3])
    known, mask = jax.jit(known_latents, static_argnums=2)(LATENTS, counts, F)
    for i, count in enumerate(counts):
        alone, alone_mask = known_latents(LATENTS[i : i + 1], int(count), F)
        np.testing.assert_array_equal(known[i], alone[0])
        np.testing.assert_array_equal(mask[i], alone_mask[0])


def test_fewer_or_more_latents_than_frames():
    known, mask = known_latents(LATENTS[:, :1], 3, F)
    assert known.shape == (B, F, H, W, C)
    assert mask[0, :, 0, 0, 0].tolist() == [1, 0, 0, 0], "padding must not count as known"
    known, mask = known_latents(LATENTS, 4, 1)
    np.testing.assert_array_equal(known, LATENTS[:, :1])
    assert mask.shape == (B, 1, H, W, 1) and mask.all()


def test_held_frames_repeat_the_last_known_one():
    latents = jax.random.normal(jax.random.key(0), (3, 4, 2, 2, 5))
    known, mask = known_latents(latents, jnp.array([0, 1, 3]), 4)
    cond = Conditioning(jnp.zeros((3, 1, 2)), jnp.ones((3, 1), bool), jnp.zeros((3, 2)), known, mask)
    held = model_input(jnp.zeros_like(latents), cond, hold=True)[..., 5:10]
    assert not held[0].any()
    np.testing.assert_array_equal(held[1], jnp.repeat(latents[1, :1], 4, axis=0))
    np.testing.assert_array_equal(held[2], latents[2, jnp.array([0, 1, 2, 2])])
    behind = model_input(jnp.zeros_like(latents), dataclasses.replace(cond, sink=True), hold=True)[..., 5:10]
    np.testing.assert_array_equal(behind[:2], held[:2])
    np.testing.assert_array_equal(behind[2], latents[2, jnp.array([0, 1, 2, 0])], "a sink instead")


def test_model_input_layout():
    x, cond = jnp.zeros((B, F, H, W, C)), make(count=1)
    inputs = model_input(x, cond)
    assert inputs.shape == (B, F, H, W, 2 * C + 1)
    np.testing.assert_array_equal(inputs[..., :C], x)
    np.testing.assert_array_equal(inputs[..., C : 2 * C], cond.known)
    np.testing.assert_array_equal(inputs[..., 2 * C :], cond.mask)


def test_known_latents_may_stand_in_the_place_of_noise_or_be_left_out():
    x, cond = jnp.full((B, F, H, W, C), -3.0), make(count=jnp.array([0, 1, 4]))
    replaced = model_input(x, cond, known="replace")
    np.testing.assert_array_equal(replaced, jnp.where(cond.mask > 0, LATENTS, x))
    assert model_input(x, cond, known="none") is x


def test_image_tokens_stand_first_and_survive_another_text():
    cond = make()
    new = replace_text(cond, jnp.full((1, 3, 6), 1.0), jnp.array([[True, False, False]]), jnp.ones((1, 6)))
    assert new.text[1, :, 0].tolist() == [9, 9, 1, 1, 1]
    assert new.text_mask[1].tolist() == [True, True, True, False, False]
    assert new.pooled.shape == cond.pooled.shape and new.pooled.all()
    assert jax.tree.structure(new) == jax.tree.structure(cond)
    np.testing.assert_array_equal(new.known, cond.known)


def test_known_frames_are_put_back_bit_for_bit():
    cond = make(count=2)
    kept = keep_known(jnp.full(LATENTS.shape, -3.0), cond)
    np.testing.assert_array_equal(kept[:, :2], LATENTS[:, :2])
    assert (kept[:, 2:] == -3).all()


def test_history_noise_touches_only_known_frames():
    cond, key = make(count=jnp.array([0, 1, 4])), jax.random.key(3)
    noised = noise_known(cond, key, 0.1)
    assert not noised.known[0].any()
    assert not noised.known[1, 1:].any()
    moved = noised.known[2] - 0.9 * cond.known[2]
    assert abs(float(moved.std()) - 0.1) < 0.02, "level times standard noise"
    np.testing.assert_array_equal(noise_known(cond, key, 0.0).known, cond.known)
    levels = noise_known(cond, key, jnp.array([0.5, 0.0, 0.1])).known
    np.testing.assert_array_equal(levels[1], cond.known[1])
    np.testing.assert_array_equal(levels[2], noised.known[2])
    sink = noise_known(dataclasses.replace(cond, sink=True), key, 0.1).known
    np.testing.assert_array_equal(sink[:, :1], cond.known[:, :1], "a given picture is no history")
    np.testing.assert_array_equal(sink[:, 1:], noised.known[:, 1:])


def test_conditioning_is_a_pytree_with_a_static_count():
    cond = make()
    doubled = jax.tree.map(lambda a: jnp.concatenate([a, a]), cond)
    assert doubled.known.shape[0] == 2 * B and doubled.image_tokens == 2
    traces = []

    @jax.jit
    def tokens(cond):
        traces.append(None)
        return cond.text[:, : cond.image_tokens]

    assert tokens(cond).shape[1] == 2
    assert tokens(dataclasses.replace(cond, image_tokens=1)).shape[1] == 1
    assert len(traces) == 2
