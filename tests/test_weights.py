"""int8 storage: which parameters are rounded, and by how much at the most."""

import jax.numpy as jnp
import numpy as np
import pytest

from magic141_jax import weights
from magic141_jax.errors import UserError
from magic141_jax.pytree import flatten


def drawn(seed=0):
    rng = np.random.default_rng(seed)
    channels = np.geomspace(1e-3, 10, 6)  # output channels of very different sizes
    return {
        "blocks": {
            "q": {"kernel": rng.normal(size=(3, 8, 6)) * channels, "bias": rng.normal(size=(3, 6))},
            "norm": {"scale": rng.normal(size=(3, 8))},
            "qk_scale": rng.normal(size=(3, 2, 8)),
        },
        "word": {"embedding": rng.normal(size=(20, 6)) * channels},
    }


def as_float32(tree):
    return {path: jnp.asarray(leaf, jnp.float32) for path, leaf in flatten(tree).items()}


def test_int8_rounds_matrices_by_at_most_half_a_step_of_their_output_channel(tmp_path):
    weights.save(tmp_path / "a", {"model": "x"}, drawn(), storage="int8")
    _, params = weights.load(tmp_path / "a")
    given, read = as_float32(drawn()), flatten(params)
    assert read.keys() == given.keys()
    for path in ("blocks.q.kernel", "word.embedding"):
        step = np.abs(given[path]).max(axis=-2, keepdims=True) / 127
        error = np.abs(np.asarray(read[path]) - np.asarray(given[path]))
        assert (error <= 0.5001 * step).all()
        assert error.max() > 0


def test_int8_leaves_stacked_biases_and_norm_scales_exact(tmp_path):
    weights.save(tmp_path / "a", {"model": "x"}, drawn(), storage="int8")
    given, read = as_float32(drawn()), flatten(weights.load(tmp_path / "a")[1])
    for path in ("blocks.q.bias", "blocks.norm.scale", "blocks.qk_scale"):
        np.testing.assert_array_equal(read[path], given[path])


def test_truncated_file_is_a_user_error(tmp_path):
    weights.save(tmp_path / "a", {"model": "x"}, drawn())
    file = tmp_path / "a" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(UserError, match="truncated or damaged"):
        weights.load(tmp_path / "a")
