"""Parity with the published FLUX network and with its sampling loop on tiny random weights; exact round trips."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magic141_jax.convert import flux_dit, scheduler
from magic141_jax.convert.engine import from_ours, to_ours
from magic141_jax.diffusion import samplers
from magic141_jax.diffusion.conditioning import Conditioning
from magic141_jax.diffusion.timesteps import grid
from magic141_jax.errors import UserError
from magic141_jax.models.mmdit import MMDiT, MMDiTConfig, debug, flux_12b
from magic141_jax.models.network import Network
from magic141_jax.models.seam import velocity_fn
from magic141_jax.pytree import count

VARIANTS = {"schnell": False, "dev": True}
SIDES = (6, 10)  # latent rows and columns
SCHEDULERS = {"schnell": {"shift": 1.0}, "dev": {"shift": 3.0, "use_dynamic_shifting": True}}


@pytest.fixture(scope="module", params=VARIANTS)
def published(request, randomise):
    """(variant, a tiny published network with every parameter random, its text states and pooled vectors)."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=12,
        guidance_embeds=VARIANTS[request.param],
        axes_dims_rope=(4, 6, 6),
    )
    return request.param, randomise(model), torch.randn(2, 7, 24), torch.randn(2, 12)


@pytest.fixture(scope="module")
def tensors(published):
    return {name: tensor.numpy() for name, tensor in published[1].state_dict().items()}


def converted(published, tensors, **run_time):
    config = flux_dit.config_to_ours(dict(published[1].config), **run_time)
    network = Network.create(MMDiT, config)
    return network, to_ours(tensors, flux_dit.table(config), network.abstract_params)


def packed(latents):
    """Latents (b, 1, h, w, c) as the published pipeline hands them to its network, with their position ids."""
    flux = pytest.importorskip("diffusers").FluxPipeline
    torch = pytest.importorskip("torch")
    b, _, h, w, c = latents.shape
    tokens = flux._pack_latents(torch.tensor(latents[:, 0].transpose(0, 3, 1, 2)), b, c, h, w)
    return tokens, flux._prepare_latent_image_ids(b, h // 2, w // 2, "cpu", torch.float32)


def unpacked(tokens, height, width):
    flux = pytest.importorskip("diffusers").FluxPipeline
    return flux._unpack_latents(tokens, 8 * height, 8 * width, 8).numpy().transpose(0, 2, 3, 1)[:, None]


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def relative_error(got, want):
    assert np.abs(want).std() > 0.1
    return np.abs(np.asarray(got) - want).max() / np.abs(want).max()


@pytest.mark.parametrize("attention", ["xla", "jax"])
def test_output_equals_the_published_network(published, tensors, attention):
    torch = pytest.importorskip("torch")
    variant, model, text, pooled = published
    network, params = converted(published, tensors, attention=attention)
    latents, times, guidance = draw(2, 1, *SIDES, 4), np.float32([0.25, 0.875]), np.float32([3.5, 1.0])
    tokens, positions = packed(latents)
    with torch.no_grad():
        theirs = model(
            hidden_states=tokens,
            timestep=torch.tensor(times),
            encoder_hidden_states=text,
            pooled_projections=pooled,
            img_ids=positions,
            txt_ids=torch.zeros(7, 3),
            guidance=torch.tensor(guidance) if VARIANTS[variant] else None,
        ).sample
    ours = network(
        params,
        latents,
        times,
        text.numpy(),
        np.ones((2, 7), bool),
        pooled.numpy(),
        guidance=jnp.asarray(guidance) if VARIANTS[variant] else None,
    )
    assert relative_error(ours, unpacked(theirs, *SIDES)) < 1e-5


def test_sampling_equals_the_published_pipeline(published, tensors):
    """Four steps from given noise, text states and pooled vectors; every step's latents."""
    diffusers = pytest.importorskip("diffusers")
    variant, model, text, pooled = published
    noise = draw(2, 1, *SIDES, 4, seed=1)
    steps = []

    def keep(pipeline, step, time, kept):
        steps.append(unpacked(kept["latents"], *SIDES))
        return {}

    theirs = diffusers.FlowMatchEulerDiscreteScheduler.from_config(SCHEDULERS[variant])
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipeline = diffusers.FluxPipeline(scheduler=theirs, transformer=model, **parts)
    pipeline.set_progress_bar_config(disable=True)
    pipeline(
        prompt_embeds=text,
        pooled_prompt_embeds=pooled,
        latents=packed(noise)[0],
        height=8 * SIDES[0],
        width=8 * SIDES[1],
        num_inference_steps=4,
        guidance_scale=3.5,
        output_type="latent",
        callback_on_step_end=keep,
    )

    network, params = converted(published, tensors)
    tokens = SIDES[0] * SIDES[1] // 4
    times = grid(4, scheduler.config_to_ours(SCHEDULERS[variant]).at(tokens))
    unknown = jnp.zeros_like(noise)
    cond = Conditioning(
        text=jnp.asarray(text.numpy()),
        text_mask=jnp.ones((2, 7), bool),
        pooled=jnp.asarray(pooled.numpy()),
        known=unknown,
        mask=unknown[..., :1],
    )
    velocity = velocity_fn(network, params, guidance=3.5 if VARIANTS[variant] else None)
    walk = jax.jit(lambda x, times: samplers.sample(velocity, cond, x, times))
    x = noise
    for wanted, step in zip(steps, range(4), strict=True):
        x = walk(x, times[step : step + 2])
        assert relative_error(x, wanted) < 1e-5, step
    assert relative_error(walk(noise, times), steps[-1]) < 1e-5


def test_round_trip_is_exact(published, tensors):
    network, params = converted(published, tensors)
    back = from_ours(params, flux_dit.table(network.config))
    assert back.keys() == tensors.keys()
    assert all(np.array_equal(back[name], tensors[name]) for name in back)


def test_config_round_trip(published):
    theirs = dict(published[1].config)
    back = flux_dit.config_from_ours(flux_dit.config_to_ours(theirs))
    assert back.pop("_class_name") == flux_dit.CLASS_NAME
    assert {k: tuple(v) if isinstance(v, list) else v for k, v in back.items()} == {
        k: tuple(v) if isinstance(v, list) else v for k, v in theirs.items() if not k.startswith("_")
    }


@pytest.mark.parametrize("guidance", [False, True])
def test_published_sizes(guidance):
    """The published config.json, which leaves out the RoPE axes: the same sizes, without allocating either."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        model = diffusers.FluxTransformer2DModel(guidance_embeds=guidance)
    theirs = {k: v for k, v in model.config.items() if k not in ("axes_dims_rope", "out_channels")}
    config = flux_dit.config_to_ours(theirs, remat="full", compute_dtype="bfloat16")
    assert config == dataclasses.replace(flux_12b(), guidance_embedding=guidance)
    parameters = sum(p.numel() for p in model.parameters())
    assert count(Network.create(MMDiT, config).abstract_params) == parameters


@pytest.mark.parametrize("change", [{"in_channels": 384, "out_channels": 64}, {"patch_size": 2}, {"in_channels": 63}])
def test_other_variants_are_refused(change):
    theirs = flux_dit.config_from_ours(flux_12b())
    with pytest.raises(UserError, match="schnell or dev"):
        flux_dit.config_to_ours(theirs | change)


def test_misfits_are_named():
    theirs = flux_dit.config_from_ours(flux_12b())
    with pytest.raises(UserError, match="lacks num_layers"):
        flux_dit.config_to_ours({k: v for k, v in theirs.items() if k != "num_layers"})
    with pytest.raises(UserError, match=r"refiner_blocks 2.*rope_theta 256.*needs refiner_blocks 0"):
        flux_dit.config_from_ours(MMDiTConfig())
    with pytest.raises(UserError, match="time_features 16"):
        flux_dit.config_from_ours(debug())
