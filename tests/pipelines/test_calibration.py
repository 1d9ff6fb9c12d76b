"""Examples are the pipelines' own samples, noised; norms and errors are those that NumPy finds."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magic141_jax import sharding
from magic141_jax.diffusion import conditioning, flow, timesteps
from magic141_jax.errors import UserError
from magic141_jax.models import mmdit
from magic141_jax.models.layers import patchify
from magic141_jax.models.mmdit import MMDiT
from magic141_jax.models.network import Network
from magic141_jax.models.seam import velocity_fn
from magic141_jax.pipelines.calibration import PROMPTS, Measured, examples, norms, read_prompts, sensitivity
from magic141_jax.pipelines.components import Model
from magic141_jax.pipelines.engine import Engine
from magic141_jax.pipelines.text_to_video import TextToVideoPipeline
from magic141_jax.pytree import flatten, unflatten
from magic141_jax.sharding import MeshConfig, make_mesh

TEXTS = ["a red shark moves left", "the blue cat"]


@pytest.fixture(scope="module")
def found(pipeline):
    return examples(pipeline, TEXTS, seed=5)


@pytest.fixture(scope="module")
def model(pipeline):
    return pipeline.components.transformer


@pytest.fixture(scope="module")
def measured(model):
    return Measured(*model)


def test_examples_are_pictures_and_clips_at_every_time_of_the_walk(found):
    assert [example.x.shape for example in found] == [(2, 1, 4, 4, 4)] * 2 + [(2, 3, 4, 4, 4)] * 2
    for example, t in zip(found, [*timesteps.grid(2, 3.0)[:-1]] * 2, strict=True):
        np.testing.assert_array_equal(example.t, [t, t])
        assert example.guidance is None
        assert example.cond.known.shape == example.x.shape
    assert not found[0].cond.mask.any() and found[0].cond.image_tokens == 0
    assert found[2].cond.image_tokens == 4
    np.testing.assert_array_equal(found[2].cond.mask.mean((2, 3, 4)), [[1, 0, 0]] * 2)


def test_examples_are_what_a_user_would_sample(found, pipeline):
    """At time 1 an example is noise, and what noise leaves of the next one is the pipeline's result."""
    made = pipeline(TEXTS, seed=5)
    for number, (first, second) in enumerate((found[:2], found[2:])):
        noise = flow.draw_noise(jax.random.key(5 + number), first.x.shape)
        np.testing.assert_allclose(first.x, noise, atol=1e-6)
        t = float(second.t[0])
        clean = (second.x - t * noise) / (1 - t)
        if number:
            np.testing.assert_allclose(clean, made.latents, atol=1e-4)
            np.testing.assert_allclose(clean[:, :1], first.cond.known[:, :1], atol=1e-4)


def test_weights_that_know_no_first_image_make_clips_alone(pipeline):
    components = pipeline.components
    config = dataclasses.replace(mmdit.debug(), in_channels=4, known="none", guidance_embedding=True)
    network = Network.create(MMDiT, config)
    other = dataclasses.replace(components, transformer=Model(network, network.init(jax.random.key(0))))
    found = examples(TextToVideoPipeline(Engine(other)), TEXTS)
    assert [example.x.shape for example in found] == [(2, 3, 4, 4, 4)] * 2
    assert all(example.guidance == 1.0 and not example.cond.mask.any() for example in found)


def test_norms_are_those_of_all_examples(found, model):
    made = norms(*model, found)
    kernels = {path: leaf.shape[:-1] for path, leaf in flatten(model.params).items() if path.endswith("kernel")}
    assert {path: leaf.shape for path, leaf in made.items()} == kernels
    squares = {"patch_in.kernel": 0, "text_in.project.kernel": 0, "pooled_in.up.kernel": 0}
    for example in found:
        tokens = patchify(conditioning.model_input(example.x, example.cond), (1, 2, 2))
        entering = (tokens, example.cond.text, example.cond.pooled)
        for path, x in zip(squares, entering, strict=True):
            squares[path] += np.square(np.asarray(x, np.float64)).reshape(-1, x.shape[-1]).sum(0)
    for path, want in squares.items():
        np.testing.assert_allclose(made[path], np.sqrt(want), rtol=1e-4, err_msg=path)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    laid = sharding.lay(model.params, mesh, mmdit.SHARDING_RULES)
    over = norms(model.network, laid, found[:1])
    alone = norms(*model, found[:1])
    for path, want in alone.items():
        np.testing.assert_allclose(over[path], want, rtol=1e-3, atol=1e-4 * want.max(), err_msg=path)


def test_errors_are_relative_and_of_what_is_unknown(found, model, measured):
    zero, truth = measured(model.params, found)
    assert zero == 0
    other = jax.tree.map(lambda leaf: 1.05 * leaf, model.params)
    off, made = measured(other, found, truth)
    sums = np.zeros(2)
    for example, v, w in zip(found, truth, made, strict=True):
        want = velocity_fn(*model)(example.x, example.t, example.cond) if example is found[-1] else v
        unknown = np.broadcast_to(np.asarray(example.cond.mask) == 0, v.shape)
        np.testing.assert_allclose(np.where(unknown, want, 0), v, atol=1e-4 * np.abs(v).max())
        sums += np.square(np.where(unknown, w - v, 0)).sum(), np.square(np.where(unknown, v, 0)).sum()
    assert off == pytest.approx(np.sqrt(sums[0] / sums[1]), rel=1e-4) and off > 0.01


def test_sensitivity_finds_what_matters(found, model):
    """A kernel that is unchanged costs nothing; the last map of all costs everything; a little change, little."""
    flat = flatten(model.params)
    tried = {
        "time_in.up.kernel": flat["time_in.up.kernel"],
        "patch_out.kernel": jnp.zeros_like(flat["patch_out.kernel"]),
        "single_blocks.joint.mlp_up.kernel": flat["single_blocks.joint.mlp_up.kernel"].astype(jnp.bfloat16),
        "double_blocks.video.qkv.kernel": 1.5 * flat["double_blocks.video.qkv.kernel"],
    }
    made = sensitivity(*model, found[-1:], tried)
    assert list(made) == list(tried) and all(len(values) == 1 for values in made.values())
    assert made["time_in.up.kernel"] == [0]
    assert 0 <= made["single_blocks.joint.mlp_up.kernel"][0] < made["double_blocks.video.qkv.kernel"][0]
    assert made["patch_out.kernel"][0] == max(made.values())[0]
    assert all(leaf is flat[path] for path, leaf in flatten(model.params).items()), "nothing is changed in place"


def test_sensitivity_is_told_layer_by_layer(found):
    config = dataclasses.replace(mmdit.debug(), single_blocks=2)
    network, rng = Network.create(MMDiT, config), np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: np.float32(rng.normal(0, 0.3, leaf.shape)), network.abstract_params)
    params = jax.tree.map(jnp.asarray, params)
    path = "single_blocks.joint.mlp_down.kernel"
    kernel = flatten(params)[path]
    made = sensitivity(network, params, found[:1], {path: kernel.at[1].set(0)})
    assert made[path][0] == 0 < made[path][1]
    whole, measured = unflatten({**flatten(params), path: kernel.at[1].set(0)}), Measured(network, params)
    off, _ = measured(whole, found[:1], measured(params, found[:1])[1])
    assert made[path][1] == pytest.approx(off, rel=1e-5)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    laid = sharding.lay(params, mesh, mmdit.SHARDING_RULES)
    over = sensitivity(network, laid, found[:1], {path: kernel.at[1].set(0)})
    np.testing.assert_allclose(over[path], made[path], rtol=1e-3)


def test_prompts_are_read_from_a_file(tmp_path):
    assert read_prompts(None) is PROMPTS and len(set(PROMPTS)) == 8
    file = tmp_path / "prompts.txt"
    file.write_text("a bee grows \n\n  ein Bär\n", encoding="utf-8")
    assert read_prompts(file) == ["a bee grows", "ein Bär"]
    file.write_text(" \n\n")
    with pytest.raises(UserError, match=r"prompts\.txt has no prompt"):
        read_prompts(file)
    file.write_bytes(b"\xff\xfe\x00")
    for wrong in (file, tmp_path, tmp_path / "missing.txt"):
        with pytest.raises(UserError, match="can't read prompts"):
            read_prompts(wrong)
