"""The stages of a pipeline call by shapes alone: the shapes that a pipeline has, the operations of its networks."""

import functools

import jax
import numpy as np
import pytest

from magic141_jax import flops, settings
from magic141_jax.aot import program, stages, topology
from magic141_jax.errors import UserError
from magic141_jax.experiment import make_config
from magic141_jax.models import HunyuanVAEConfig, clip, hunyuan_text, llama, mmdit
from magic141_jax.models.hunyuan_vae import HunyuanVAE
from magic141_jax.models.network import Network
from magic141_jax.pipelines import engine
from magic141_jax.pipelines.options import resolve
from magic141_jax.pytree import count
from tests.conftest import CONFIGS, SAMPLING

MODEL = {"model": "mmdit", **settings.to_dict(mmdit.debug())}
NETWORK = Network.create(mmdit.MMDiT, mmdit.debug())
PARAMETERS = count(NETWORK.abstract_params)


def config(**rest):
    given = {
        "model": MODEL,
        "image_encoder": {"model": CONFIGS["image_encoder"][0], **CONFIGS["image_encoder"][1]},
        "method": {"name": "flow_matching"},
        "data": {"path": "nowhere", "text_length": CONFIGS["text_encoder"][1]["length"]},
        "mesh": {"data": 1, "fsdp": -1},
        "sampling": SAMPLING,
    }
    return make_config(**(given | rest)).to_dict()


@pytest.fixture(autouse=True)
def vae(monkeypatch):
    """The VAE of the test weights is known for networks of four channels."""
    kind, values = CONFIGS["vae"]
    monkeypatch.setitem(stages.VAES, 4, {"model": kind, **values})


@pytest.fixture
def chips(monkeypatch):
    """Count -> so many devices that nothing is compiled for."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    return lambda count: topology.make(f"h100:{count}")


def shapes(tree):
    return jax.tree.map(lambda leaf: (tuple(leaf.shape), leaf.dtype), tree)


class Reached(Exception):
    """A stage was called."""


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_the_sampler_is_the_one_that_a_pipeline_runs(pipeline, monkeypatch, chips, guidance_scale):
    made = engine.Engine(pipeline.components)
    options = resolve({"guidance_scale": guidance_scale}, pipeline.components)
    prompts = made.encode_text(["a red cat", "a blue shark"], options)
    cond, negative = made.condition(prompts, options, images=np.zeros((2, 32, 32, 3), np.float32))

    def reach(stage, label, *arrays, **static):
        raise Reached(stage._function, arrays, static)

    monkeypatch.setattr(engine.Stage, "__call__", reach)
    with pytest.raises(Reached) as reached:
        made.denoise(cond, negative, options, purpose=1)
    function, arrays, static = reached.value.args
    ours = stages.sampler(config(sampling=SAMPLING | {"guidance_scale": guidance_scale}), chips(2), batch=2)
    assert shapes(ours.arguments[1:]) == shapes(arrays)
    bound = ours.function.__wrapped__.__wrapped__
    assert bound.func is function.func is engine._denoise and bound.keywords == static


def forward(batch, tokens):
    latents = np.zeros((batch, 3, 4, 4, 9), np.float32)
    text = np.zeros((batch, tokens, 12), np.float32)
    arguments = (latents, np.zeros(batch), text, np.ones((batch, tokens), bool), np.zeros((batch, 12)))
    return flops.count(jax.jit(NETWORK).trace(NETWORK.abstract_params, *arguments).jaxpr)


def text_alone(tokens):
    """Of a forward pass, the maps that no time enters; a walk makes them once."""
    width, text, pooled = NETWORK.config.width, NETWORK.config.text_width, NETWORK.config.pooled_width
    return 2 * (tokens * text * width + (text + pooled + 2 * width) * width)


def test_a_sampler_costs_as_many_forwards_as_its_steps(chips):
    encoded = stages._image_tokens(stages._open(config(), chips(1), None))
    steps = SAMPLING["num_inference_steps"]
    one = program.measure(stages.sampler(config(), chips(1)), chips(1))
    tokens = 12 + encoded
    assert one["flops"] == steps * forward(1, tokens) - (steps - 1) * text_alone(tokens)
    both = stages.sampler(config(sampling=SAMPLING | {"guidance_scale": 2.0}), chips(1))
    assert program.measure(both, chips(1))["flops"] == 2 * one["flops"]


def test_parameters_are_bfloat16_over_the_mesh_and_the_batch_is_split_if_it_divides(chips):
    made = stages.sampler(config(), chips(4), batch=8)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(made.arguments[0])} == {"bfloat16"}
    held = program.held(made)
    assert 2 * PARAMETERS / 4 <= held["mmdit"] < 2 * PARAMETERS
    walk = made.arguments[1]
    assert walk.cond.known.sharding.shard_shape(walk.cond.known.shape) == (2, 3, 4, 4, 4)
    assert made.description["samples"] == 2 and made.description["clip"] == [9, 32, 32]
    alone = stages.sampler(config(), chips(4)).arguments[1].cond.known
    assert alone.sharding.shard_shape(alone.shape) == alone.shape == (1, 3, 4, 4, 4)


def test_text_states_that_hold_the_picture_have_no_encoder_beside(chips):
    data = {"path": "nowhere", "text_length": 20, "image_tokens": 8}
    values = config(image_encoder=None, data=data, sampling=SAMPLING | {"guidance_scale": 2.0})
    walk = stages.sampler(values, chips(1)).arguments[1]
    assert walk.cond.text.shape == (1, 20, 12) and walk.cond.image_tokens == 8
    assert walk.negative.states.shape == (1, 12, 12)


def test_the_vae_of_a_weights_folder(chips, weights_folder):
    values = config(components_from=str(weights_folder), sampling={})  # which are the folder's
    decode, encode = (make(values, chips(2), batch=2) for make in (stages.decode, stages.encode))
    assert jax.eval_shape(decode.function, *decode.arguments).shape == (2, 9, 32, 32, 3)
    known, mask = jax.eval_shape(encode.function, *encode.arguments)
    assert known.shape == (2, 3, 4, 4, 4) and mask.shape == (2, 3, 4, 4, 1)
    assert encode.arguments[1].shape == (2, 1, 32, 32, 3)


def test_the_published_vae_and_language_model_of_the_published_network(chips, monkeypatch):
    model = {"model": "mmdit", **settings.to_dict(mmdit.MMDiTConfig(double_blocks=1, single_blocks=1))}
    values = config(model=model, image_encoder=None)
    decode = stages.decode(values, chips(8))
    whole = count(Network.create(HunyuanVAE, HunyuanVAEConfig()).abstract_params)
    assert program.held(decode)["hunyuan_vae"] < 4 * whole / 4  # float32, most of it in eighths
    assert decode.arguments[1].shape == (1, 3, 4, 4, 16)
    text = stages.text(values, chips(8))
    ids, mask, images = text.arguments[1:]
    patches = clip.ClipVisionConfig().patches
    assert ids.shape == mask.shape == (1, hunyuan_text.IMAGE_TEMPLATE.length + patches - 1)
    assert images.shape == (1, 336, 336, 3)
    states = jax.eval_shape(text.function, *text.arguments)
    assert states.shape == (*ids.shape, llama.LlamaConfig().width)
    blind = model | {"known": "none", "in_channels": 16}
    text = stages.text(config(model=blind, image_encoder=None), chips(8))
    assert len(text.arguments) == 3 and text.arguments[1].shape == (1, hunyuan_text.TEXT_TEMPLATE.length)


@pytest.mark.parametrize(
    ("make", "rest", "message"),
    [
        (stages.sampler, {"sampling": {}}, "set config.sampling or --config.components_from"),
        (stages.sampler, {"model": {"model": "patch_vae"}, "image_encoder": None}, "only the model 'mmdit' samples"),
        (functools.partial(stages.sampler, batch=0), {}, "--batch is 0"),
        (stages.decode, {"model": MODEL | {"out_channels": 5, "in_channels": 11}}, "no VAE is known for 5 channels"),
        (stages.decode, {"components_from": "default"}, "has 32 channels, config.model.out_channels is 4"),
        (stages.text, {}, "whose states have the width 12"),
    ],
)
def test_what_is_missing_is_one_line(chips, make, rest, message):
    with pytest.raises(UserError, match=message) as caught:
        make(config(**rest), chips(1))
    assert "\n" not in str(caught.value)


def test_a_sampler_compiles_for_a_slice(slice_of_four):
    found = program.measure(stages.sampler(config(), slice_of_four, batch=4), slice_of_four)
    assert found["fits"] and found["memory"]["temporaries"] > 0 and found["roofline"]["hbm"] > 0
    # Weights lie in slices and are gathered for each of the steps; clips stay where they are.
    assert found["collectives"]["all-gather"]["count"] >= SAMPLING["num_inference_steps"]
    assert found["memory"]["outputs"] < 4 * 3 * 4 * 4 * 128 * 4
