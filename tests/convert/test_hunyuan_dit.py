"""Parity with the published network on tiny random weights, and exact round trips."""

import jax
import numpy as np
import pytest

from magic141_jax.convert import hunyuan_dit
from magic141_jax.convert.engine import from_ours, to_ours
from magic141_jax.diffusion import conditioning, samplers, timesteps
from magic141_jax.errors import UserError
from magic141_jax.models.mmdit import MMDiT, debug
from magic141_jax.models.network import Network
from magic141_jax.models.seam import velocity_fn

VARIANTS = {
    "text-to-video": {"in_channels": 16, "guidance_embeds": True, "image_condition_type": None},
    "latent_concat": {"in_channels": 33, "guidance_embeds": False, "image_condition_type": "latent_concat"},
    "token_replace": {"in_channels": 16, "guidance_embeds": True, "image_condition_type": "token_replace"},
}


@pytest.fixture(scope="module", params=VARIANTS)
def published(request, tiny_dit):
    """A tiny published network with every parameter random: the model, its config and its tensors."""
    model = tiny_dit(**VARIANTS[request.param])
    return model, dict(model.config), {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def converted(published, **run_time):
    config = hunyuan_dit.config_to_ours(published[1], **run_time)
    network = Network.create(MMDiT, config)
    return network, to_ours(published[2], hunyuan_dit.table(config), network.abstract_params)


@pytest.mark.heavy
@pytest.mark.parametrize(("attention", "frames"), [("xla", 3), ("xla", 1), ("jax", 3)])
def test_output_equals_the_published_network(published, dit_case, attention, frames):
    case = dit_case(published[0], frames)
    network, params = converted(published, attention=attention)
    got = np.asarray(network(params, *case.args, **case.kwargs))
    assert np.abs(case.output).std() > 0.1
    assert np.abs(got - case.output).max() / np.abs(case.output).max() < 2e-5


def published_walk(model, inputs, noise, image):
    """The four steps of diffusers' pipelines, at guidance 6, from the given noise and clean first latent frame."""
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0)
    scheduler.set_timesteps(sigmas=np.linspace(1, 0, 5)[:-1])
    kind, latents = model.config.image_condition_type, noise
    mask = torch.zeros_like(noise[:, :1])
    mask[:, :, 0] = 1
    guidance = torch.full((2,), 6000.0) if model.config.guidance_embeds else None
    for time in scheduler.timesteps:
        if kind == "latent_concat":
            seen = torch.cat([latents, mask * image, mask], 1)
        else:
            seen = torch.cat([image, latents[:, :, 1:]], 2) if kind else latents
        velocity = model(**inputs | {"hidden_states": seen, "timestep": time.expand(2), "guidance": guidance}).sample
        if kind == "token_replace":
            moved = scheduler.step(velocity[:, :, 1:], time, latents[:, :, 1:]).prev_sample
            latents = torch.cat([image, moved], 2)
        else:
            latents = scheduler.step(velocity, time, latents).prev_sample
    return latents


def test_four_steps_end_where_the_published_pipeline_does(published, dit_case):
    """In the pipeline a replaced frame stays clean all along; here it wanders and only the network sees it clean."""
    torch = pytest.importorskip("torch")
    model, case = published[0], dit_case(published[0])
    noise, image = torch.randn(2, 16, 3, 4, 6), torch.randn(2, 16, 1, 4, 6)
    with torch.no_grad():
        want = published_walk(model, case.theirs, noise, image).numpy()
    network, params = converted(published)
    noise, image, want = (np.asarray(a).transpose(0, 2, 3, 4, 1) for a in (noise, image, want))
    known = conditioning.known_latents(image, 0 if network.config.known == "none" else 1, 3)
    cond = conditioning.Conditioning(*case.args[2:], *known)

    @jax.jit
    def walk(params, cond, noise):
        velocity = velocity_fn(network, params, guidance=6.0 if network.config.guidance_embedding else None)
        return samplers.sample(velocity, cond, noise, timesteps.grid(4, 7.0))

    got = np.asarray(walk(params, cond, noise))
    start = 1 if network.config.known == "channels" else 0  # there the pipeline denoises frame 0 too, and drops it
    np.testing.assert_allclose(got[:, start:], want[:, start:], atol=1e-4)
    assert np.abs(got[:, 1:] - noise[:, 1:]).std() > 0.1


def test_round_trip_is_exact(published):
    network, params = converted(published)
    back = from_ours(params, hunyuan_dit.table(network.config))
    assert back.keys() == published[2].keys()
    assert all(np.array_equal(back[name], published[2][name]) for name in back)


def test_config_round_trip(published):
    theirs = hunyuan_dit.config_from_ours(hunyuan_dit.config_to_ours(published[1]))
    assert {k: tuple(v) if isinstance(v, list) else v for k, v in theirs.items() if not k.startswith("_")} == {
        k: tuple(v) if isinstance(v, list) else v for k, v in published[1].items() if not k.startswith("_")
    }


def test_unknown_and_missing_tensors_are_all_named(published):
    tensors = dict(published[2])
    tensors["transformer_blocks.0.extra.weight"] = tensors["proj_out.weight"]
    del tensors["transformer_blocks.1.attn.to_k.weight"]
    del tensors["norm_out.linear.bias"]
    config = hunyuan_dit.config_to_ours(published[1])
    abstract = Network.create(MMDiT, config).abstract_params
    with pytest.raises(UserError) as error:
        to_ours(tensors, hunyuan_dit.table(config), abstract)
    for name in ("transformer_blocks.0.extra.weight", "transformer_blocks.1.attn.to_k.weight", "modulation_out.bias"):
        assert name in str(error.value)


def test_variants_without_a_network_are_refused():
    theirs = hunyuan_dit.config_from_ours(hunyuan_dit.MMDiTConfig())
    with pytest.raises(UserError, match=r"'token_replaced'.*Did you mean 'token_replace'"):
        hunyuan_dit.config_to_ours(theirs | {"image_condition_type": "token_replaced"})
    with pytest.raises(UserError, match="known='replace' in_channels is 16, not 33"):
        hunyuan_dit.config_to_ours(theirs | {"image_condition_type": "token_replace"})
    with pytest.raises(UserError, match="num_layers"):
        hunyuan_dit.config_to_ours({k: v for k, v in theirs.items() if k != "num_layers"})
    with pytest.raises(UserError, match="time features"):
        hunyuan_dit.config_from_ours(debug())
