"""The stages of a pipeline call for a config's model: the programs "text", "encode", "sampler" and "decode".

The functions are those of `pipelines.engine`, jitted as its stages are: traced for the mesh, parameters laid over it by
the networks' rules, inputs split over the batch where it divides. The transformer computes in bfloat16, as pipelines
have it off the CPU. What a clip is and how it is sampled says config.sampling, or that of config.components_from.

An experiment's config has one network. Which VAE and which language model belong to it is known for the published
layouts by their widths; the VAE of others is that of config.components_from.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from magic141_jax import settings, sharding, weights
from magic141_jax.aot.program import Program
from magic141_jax.aot.topology import Topology
from magic141_jax.diffusion.conditioning import Conditioning
from magic141_jax.errors import UserError
from magic141_jax.experiment import ExperimentConfig
from magic141_jax.models import MODELS, SHARDING_RULES, hunyuan_text, kind_of, resident, stored
from magic141_jax.models.network import Network
from magic141_jax.models.text import TextStates
from magic141_jax.models.vae import latent_frames
from magic141_jax.pipelines import engine
from magic141_jax.pipelines.components import SamplingSettings, find_folder
from magic141_jax.pytree import Params, flatten
from magic141_jax.quantize import plan

# Channels of the latents -> the published VAE that makes them
VAES = {16: {"model": "hunyuan_vae"}}
# Width of the text states, whether a first frame is read with the prompt -> the published language model
LANGUAGE_MODELS = {
    (4096, True): {"model": "llava", "compute_dtype": "bfloat16"},
    (4096, False): {"model": "llama", "compute_dtype": "bfloat16"},
}


class Call(NamedTuple):
    """What the programs of a pipeline call share: the experiment, the settings of a clip, the mesh and the batch."""

    config: ExperimentConfig
    sampling: SamplingSettings
    mesh: jax.sharding.Mesh
    batch: int

    @property
    def clip(self) -> tuple[int, int, int, int, int]:
        """Frames (b, t, y, x, 3)."""
        return (self.batch, self.sampling.num_frames, self.sampling.height, self.sampling.width, 3)

    def latents(self, vae: Any) -> tuple[int, int, int, int, int]:
        """Latents (b, f, h, w, c) of a clip by a VAE's config."""
        b, t, y, x, _ = self.clip
        frames = latent_frames(t, vae.temporal_factor)
        return b, frames, y // vae.spatial_factor, x // vae.spatial_factor, vae.latent_channels


def sampler(values: Mapping[str, Any], topology: Topology, batch: int | None = None, *, kernels: str = "") -> Program:
    """The walk from noise to the latents of a batch of clips, one unless said, with the first frame known.

    `kernels` is how the transformer's are held: a name of `quantize.plan.FORMS`, maybe with what a pruned network keeps
    in front ("2:4 int8"); by default as arrays in bfloat16.

    Raises:
      UserError: a config that says no way to sample, a network that isn't a transformer, or an unknown form.
    """
    call = _open(values, topology, batch)
    made_for, image_tokens = call.sampling, _image_tokens(call)
    network = _network(call.config.model, "config.model", compute_dtype="bfloat16")
    if kernels:
        network = _held(network, kernels)
    config, vae = network.config, _vae(call.config).config
    size, rows = call.latents(vae), call.config.data.text_length
    if call.config.image_encoder:
        rows += image_tokens
    guided = made_for.guidance_scale != 1 and not config.guidance_embedding
    arrays = {
        "text": _array(call, (rows, config.text_width)),
        "text_mask": _array(call, (rows,), bool),
        "pooled": _array(call, (config.pooled_width,)),
        "known": _array(call, size[1:]),
        "mask": _array(call, (*size[1:4], 1)),
    }
    own = rows - image_tokens
    negative = TextStates(_array(call, (own, config.text_width)), _array(call, (own,), bool), arrays["pooled"])
    scalar = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32, sharding=sharding.replicated(call.mesh))
    walk = engine._Walk(
        Conditioning(**arrays, image_tokens=image_tokens),
        negative if guided else None,
        noise=None,
        draws=_array(call, (3,), jnp.uint32),
        times=scalar((made_for.num_inference_steps + 1,)),
        guidance_scale=scalar(()),
        history_noise=scalar(()),
        adapter=scalar(()),
    )
    static = {
        "sampler": made_for.sampler,
        "callback": None,
        "image_share": made_for.image_share,
        "keep": made_for.keep_known,
    }
    what = f"{made_for.num_inference_steps} {made_for.sampler} steps{' with guidance' * guided}"
    asked = _stage(call, engine._denoise, network, (walk,), static=static, what=what)
    if not kernels:
        return asked
    return dataclasses.replace(asked, description={**asked.description, "kernels": kernels})


def decode(values: Mapping[str, Any], topology: Topology, batch: int | None = None) -> Program:
    """The frames of a batch of clips from their latents.

    Raises:
      UserError: see `sampler`; or the config's model has no VAE that is known.
    """
    call = _open(values, topology, batch)
    network = _vae(call.config)
    latents = _array(call, call.latents(network.config)[1:])
    return _stage(call, engine._decode, network, (latents,), what="the VAE decodes the clips")


def encode(values: Mapping[str, Any], topology: Topology, batch: int | None = None) -> Program:
    """The known latents of a batch of clips from their first frames; raises as `decode`."""
    call = _open(values, topology, batch)
    network = _vae(call.config)
    frames, total = _array(call, (1, *call.clip[2:])), call.latents(network.config)[1]
    what = "the VAE encodes the first frames"
    return _stage(call, engine._encode_known, network, (frames,), static={"total": total}, what=what)


def text(values: Mapping[str, Any], topology: Topology, batch: int | None = None) -> Program:
    """The states of a batch of prompts, with their first frames where the published pipeline reads these.

    Raises:
      UserError: see `sampler`; or text states of a width that no published language model has.
    """
    call = _open(values, topology, batch)
    model = _network(call.config.model, "config.model").config
    sees = model.known != "none"
    if (model.text_width, sees) not in LANGUAGE_MODELS:
        raise UserError(f"no language model is known whose states have the width {model.text_width} (--program=text)")
    network = _network(LANGUAGE_MODELS[model.text_width, sees], "the language model")
    tokens = (hunyuan_text.IMAGE_TEMPLATE if sees else hunyuan_text.TEXT_TEMPLATE).length
    images = ()
    if sees:
        vision = network.config.vision
        tokens += vision.patches - 1
        images = (_array(call, (vision.image, vision.image, 3)),)
    inputs = (_array(call, (tokens,), jnp.int32), _array(call, (tokens,), bool), *images)
    return _stage(call, _states, network, inputs, what=f"{LANGUAGE_MODELS[model.text_width, sees]['model']} reads")


def _states(network: Network, params: Params, *inputs: jax.Array) -> jax.Array:
    return network(params, *inputs)


def _open(values: Mapping[str, Any], topology: Topology, batch: int | None) -> Call:
    config = settings.build(ExperimentConfig, values)
    if config.model.get("model") != "mmdit":
        raise UserError("only the model 'mmdit' samples (config.model.model)")
    sampling = config.sampling
    if not sampling and config.components_from:
        folder = find_folder(config.components_from)
        sampling = weights.read_config(folder / "model_index.json").get("sampling", {})
    if not sampling:
        raise UserError("how clips are sampled is not known: set config.sampling or --config.components_from")
    made_for = settings.build(SamplingSettings, sampling, where="config.sampling")
    if batch is not None and batch < 1:
        raise UserError(f"--batch is {batch}; at least one clip is made")
    return Call(config, made_for, sharding.make_mesh(config.mesh, devices=topology.devices), batch or 1)


def _image_tokens(call: Call) -> int:
    """Rows of the first frame before those of the prompt: cached with these, or of an image encoder of its own."""
    if not call.config.image_encoder:
        return call.config.data.image_tokens
    encoder = _network(call.config.image_encoder, "config.image_encoder").config
    return encoder.tokens(call.sampling.height, call.sampling.width)


def _network(values: Mapping[str, Any], where: str, **overrides: Any) -> Network:
    fields = {name: value for name, value in values.items() if name != "model"}
    config_class, module = MODELS[values["model"]]
    return Network.create(module, settings.build(config_class, fields | overrides, where=where))


def _held(network: Network, kernels: str) -> Network:
    """The network with its kernels in a form, as `python -m magic141_jax.quantize` would leave them."""
    *pattern, name = kernels.split()
    keep = [re.fullmatch(r"(\d+):(\d+)", word) for word in pattern]
    if not all(keep) or len(keep) > 1:
        raise UserError(f"--kernels is {kernels!r}; write a form such as int4, or 2:4 int8")
    main = plan.named(name)
    if keep:
        main = dataclasses.replace(main, keep=tuple(map(int, pattern[0].split(":"))))
    rest = main if main.values not in stored.QUANTIZED else plan.named("int8")
    shapes = {path: x for path, x in flatten(network.abstract_params).items() if path.endswith(stored.KERNEL)}
    return stored.stored(network, plan.plan(shapes, main, dataclasses.replace(rest, keep=None), pack=False))


def _vae(config: ExperimentConfig) -> Network:
    channels, stored = _network(config.model, "config.model").config.out_channels, {}
    if config.components_from:
        stored = weights.read_config(weights.part(find_folder(config.components_from), "vae") / "config.json")
    if stored.get("model") not in MODELS:  # none, or a published folder
        stored = VAES.get(channels, {})
    if not stored:
        raise UserError(f"no VAE is known for {channels} channels: set --config.components_from to a weights folder")
    network = _network(stored, "the VAE")
    if network.config.latent_channels != channels:
        raise UserError(
            f"the VAE of {config.components_from} has {network.config.latent_channels} channels, "
            f"config.model.out_channels is {channels}"
        )
    return network


def _array(call: Call, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    """An array of the batch, split over the devices if it divides, else on all of them (`sharding.spread`)."""
    where = sharding.batch_sharding(call.mesh, call.batch)
    return jax.ShapeDtypeStruct((call.batch, *shape), dtype, sharding=where)


def _stage(
    call: Call,
    function: Callable[..., Any],
    network: Network,
    inputs: tuple[Any, ...],
    *,
    what: str,
    static: Mapping[str, Any] | None = None,
) -> Program:
    """The program of a stage: `function(network, params, *inputs, **static)`, as `engine.Stage` compiles it."""
    kind = kind_of(network.config)
    params = resident.shapes(network, call.mesh, SHARDING_RULES.get(kind, ()))
    bound = functools.partial(function, network, **(static or {}))
    description = {
        "what": what,
        "mesh": dict(call.mesh.shape),
        "clip": [call.sampling.num_frames, call.sampling.height, call.sampling.width],
        "fps": call.sampling.fps,
        "samples": call.batch / call.mesh.size,
    }
    return Program(
        jax.jit(sharding.over(call.mesh, bound)), (params, *inputs), {kind: params, "inputs": inputs}, description
    )
