"""RoPE, norms and patches against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from magic141_jax.errors import UserError
from magic141_jax.models import layers

GRID, AXES = (3, 2, 4), (4, 6, 6)


def positions():
    return np.stack(np.meshgrid(*map(np.arange, GRID), indexing="ij"), -1).reshape(-1, 3)


def test_rope_scores_depend_on_the_distance_only():
    cos, sin = layers.rope_tables(GRID, AXES, 256.0, text=0)
    q, k = jax.random.normal(jax.random.key(0), (2, sum(AXES)))
    rotated_q, rotated_k = (layers.rotate(jnp.broadcast_to(x, cos.shape), cos, sin) for x in (q, k))
    scores = np.asarray(rotated_q @ rotated_k.T)
    offsets = positions()[:, None] - positions()[None]
    by_offset = {}
    for offset, score in zip(offsets.reshape(-1, 3), scores.ravel()):
        by_offset.setdefault(tuple(offset), []).append(score)
    assert max(np.ptp(group) for group in by_offset.values()) < 1e-5
    assert np.ptp([group[0] for group in by_offset.values()]) > 0.1


def test_rope_leaves_text_and_lengths_alone():
    cos, sin = layers.rope_tables(GRID, AXES, 256.0, text=5)
    x = jax.random.normal(jax.random.key(1), cos.shape)
    y = layers.rotate(x, cos, sin)
    np.testing.assert_array_equal(y[-5:], x[-5:])
    np.testing.assert_allclose(jnp.linalg.norm(y, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5)
    assert not np.allclose(y[1:-5], x[1:-5])


def test_absolute_positions_tell_tokens_apart():
    features = np.asarray(layers.sine_positions(GRID, 32, 256.0))
    assert features.shape == (len(positions()), 32)
    np.testing.assert_allclose(np.square(features).sum(1), 16, rtol=1e-5)
    distances = np.linalg.norm(features[:, None] - features[None], axis=-1)
    assert distances[~np.eye(len(features), dtype=bool)].min() > 0.5
    with pytest.raises(UserError, match="multiple of 16, not 24"):
        layers.sine_positions(GRID, 24, 256.0)


def test_patches_round_trip_and_keep_neighbours_together():
    x = jnp.arange(2 * 3 * 4 * 6 * 5.0).reshape(2, 3, 4, 6, 5)
    tokens = layers.patchify(x, (1, 2, 2))
    assert tokens.shape == (2, 3 * 2 * 3, 20)
    np.testing.assert_array_equal(tokens[0, 1], x[0, 0, :2, 2:4].ravel())
    np.testing.assert_array_equal(layers.unpatchify(tokens, (3, 2, 3), (1, 2, 2)), x)
    with pytest.raises(UserError, match="patches"):
        layers.patchify(x[:, :, :3], (1, 2, 2))


def test_time_features_put_cosines_first():
    features = layers.time_features(jnp.array([0.0, 2.0]), 8)
    np.testing.assert_allclose(features[0], [1, 1, 1, 1, 0, 0, 0, 0])
    frequencies = 10000.0 ** (-np.arange(4) / 4)
    np.testing.assert_allclose(
        features[1], np.concatenate([np.cos(2 * frequencies), np.sin(2 * frequencies)]), atol=1e-6
    )


def test_norms_have_unit_power_and_ignore_scale():
    x = 5 + 3 * jax.random.normal(jax.random.key(2), (4, 64))
    y = layers.layer_norm(x)
    np.testing.assert_allclose(y.mean(-1), 0, atol=1e-5)
    np.testing.assert_allclose(jnp.square(y).mean(-1), 1, atol=1e-3)
    scale = jnp.full((1, 64), 2.0)
    np.testing.assert_allclose(layers.rms_norm(7 * x, scale), layers.rms_norm(x, scale), rtol=1e-5)
    np.testing.assert_allclose(jnp.square(layers.rms_norm(x, scale)).mean(-1), 4, rtol=1e-4)


def test_stacked_linear_starts_with_the_variance_of_a_single_one():
    stacked = layers.Linear(256, 64, layers=3, rngs=nnx.Rngs(0))
    deviations = np.asarray(stacked.kernel[...]).std(axis=(1, 2))
    np.testing.assert_allclose(deviations, 256**-0.5, rtol=0.05)


def test_gelu_and_its_slopes_are_those_of_the_tanh_form_and_one_array_is_kept():
    x = jnp.linspace(-6, 6, 101)
    ours, theirs = layers.gelu, lambda x: jax.nn.gelu(x, approximate=True)
    for _ in range(3):
        np.testing.assert_allclose(jax.vmap(ours)(x), jax.vmap(theirs)(x), atol=2e-6)
        ours, theirs = jax.grad(ours), jax.grad(theirs)
    kept = jax.tree.leaves(jax.vjp(layers.gelu, x)[1])
    assert [leaf.shape for leaf in kept if leaf.size > 1] == [x.shape]


def test_bfloat16_products_on_a_cpu_end_in_float32_forward_and_backward():
    x, w, dy = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(((2, 5, 8), (8, 6), (2, 5, 6))))

    def gradients(x, w, dy):
        y, back = jax.vjp(layers.product, x, w)
        return y, *back(dy)

    exact = gradients(x, w, dy)
    halves = [a.astype(jnp.bfloat16) for a in (x, w, dy)]
    for ours, true in zip(gradients(*halves), exact):
        assert ours.dtype == jnp.bfloat16
        np.testing.assert_allclose(ours.astype(jnp.float32), true, atol=0.02 * float(jnp.abs(true).max()))
    program = jax.jit(gradients).lower(*halves).as_text()
    products = [line for line in program.splitlines() if "dot_general" in line]
    assert len(products) == 3 and all(line.count("bf16>") == 2 and line.endswith("xf32>") for line in products)
