"""Scores against their formula; which kernels are chosen; norms that do not fit are named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from magic141_jax.errors import UserError
from magic141_jax.models import mmdit
from magic141_jax.models.network import Network
from magic141_jax.sparsity.pruning import PruningConfig
from magic141_jax.sparsity.scores import chosen, read_norms, scores


def test_scores_are_their_formula():
    rng = np.random.default_rng(0)
    kernels = {"a": rng.normal(size=(5, 3)).astype(np.float32), "b": rng.normal(size=(2, 4, 3)).astype(np.float32)}
    inputs = {"a": rng.normal(size=(7, 5)), "b": rng.normal(size=(7, 2, 4))}
    norms = {path: np.sqrt((x**2).sum(0)) for path, x in inputs.items()}
    found = scores({path: jnp.asarray(w, jnp.bfloat16) for path, w in kernels.items()})
    assert all(score.dtype == jnp.float32 for score in found.values())
    plain, aware = scores(kernels), scores(kernels, norms)
    for path, kernel in kernels.items():
        np.testing.assert_array_equal(plain[path], np.abs(kernel))
        by_hand = np.empty_like(kernel)
        for place in np.ndindex(kernel.shape):
            by_hand[place] = abs(kernel[place]) * norms[path][place[:-1]]
        np.testing.assert_allclose(aware[path], by_hand, rtol=1e-6)


def test_by_default_attention_and_mlps_of_blocks_are_chosen():
    params = {"transformer": Network.create(mmdit.MMDiT, mmdit.debug()).abstract_params}
    names = ("qkv", "attention_out", "mlp_up", "mlp_down")
    blocks = ("double_blocks.video", "double_blocks.text", "single_blocks.joint", "text_in.blocks")
    assert set(chosen(params, PruningConfig().paths)) == {
        f"transformer.{block}.{name}.kernel" for block in blocks for name in names
    }


def test_biases_of_stacked_layers_are_no_kernels():
    params = {"blocks": {"kernel": jnp.zeros((2, 3, 4)), "bias": jnp.zeros((2, 4)), "qk_scale": jnp.zeros((2, 2, 4))}}
    assert list(chosen(params, "blocks")) == ["blocks.kernel"]
    with pytest.raises(UserError, match=r"'bias' matches none of the kernels, such as blocks.kernel"):
        chosen(params, "bias")
    with pytest.raises(UserError, match=r"no regular expression"):
        chosen(params, "(")


def test_norms_are_read_by_either_name(tmp_path):
    kernels = {"transformer.a.kernel": jax.ShapeDtypeStruct((2, 3, 4), jnp.float32)}
    values, file = np.arange(6, dtype=np.float16).reshape(2, 3), tmp_path / "norms.safetensors"
    for name in ("transformer.a.kernel", "a.kernel"):
        save_file({name: values}, file)
        found = read_norms(file, kernels)
        assert found.keys() == kernels.keys() and found["transformer.a.kernel"].dtype == np.float32
        np.testing.assert_array_equal(found["transformer.a.kernel"], values)


@pytest.mark.parametrize(
    ("name", "values", "complaint"),
    [
        ("b.kernel", np.ones((2, 3)), "has no norms for transformer.a.kernel"),
        ("a.kernel", np.ones((2, 4)), r"have shape \(2, 4\), its inputs are \(2, 3\)"),
        ("a.kernel", np.full((2, 3), -1.0), "negative or no numbers"),
        ("a.kernel", np.full((2, 3), np.nan), "negative or no numbers"),
    ],
)
def test_norms_that_do_not_fit_are_named(tmp_path, name, values, complaint):
    file = tmp_path / "norms.safetensors"
    save_file({name: values}, file)
    with pytest.raises(UserError, match=complaint):
        read_norms(file, {"transformer.a.kernel": jax.ShapeDtypeStruct((2, 3, 4), jnp.float32)})


@pytest.mark.parametrize("name", ["", "absent.safetensors", "norms.npz"])
def test_a_missing_file_is_named(tmp_path, name):
    with pytest.raises(UserError, match=r"no safetensors file .* \(pruning.norms\)"):
        read_norms(tmp_path / name, {})
