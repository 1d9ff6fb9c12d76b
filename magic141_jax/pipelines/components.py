"""From a weights folder to networks with parameters, and the settings that they were made for.

    DIR/model_index.json                                 {"format": 1, "sampling": {...}}, see `SamplingSettings`;
                                                         with "base": "NAME" the rest is in the folder NAME beside DIR
    DIR/{transformer,vae,text_encoder,image_encoder}/    config.json + safetensors, see `magic141_jax.weights`
    DIR/continuation/                                    likewise, if there is one: an adapter of the transformer

or a published pipeline folder in diffusers' layout, see `magic141_jax.pipelines.published`.

The folder is named by its path, by "default" (the small trained weights of this repository) or by the id of a
repository on the Hugging Face Hub.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from magic141_jax import embedded, settings, sharding, weights
from magic141_jax.convert import flux_dit, hub, hunyuan_dit, repository
from magic141_jax.convert import lora as lora_lib
from magic141_jax.convert.memory import require_memory
from magic141_jax.diffusion.samplers import Sampler
from magic141_jax.errors import UserError, nearest
from magic141_jax.models import MODELS, SHARDING_RULES, kind_of, stored
from magic141_jax.models import lora as adapters
from magic141_jax.models.network import Network
from magic141_jax.models.resident import Held, Lend, Lent, Source, at_once
from magic141_jax.models.text import MiniLMTextEncoder, TextEncoder
from magic141_jax.pipelines import published
from magic141_jax.pipelines.low_memory import LowMemory
from magic141_jax.pipelines.media import Fit
from magic141_jax.pytree import Params, cast, flatten, require_match, unflatten

DEFAULT = "default"
DEFAULT_FOLDER = embedded.ROOT / "weights" / "emoji64_4step"
TEXT_ENCODERS = {"bert": MiniLMTextEncoder.from_folder}
TEXT_PARTS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "image_processor")
CACHE_VARIABLE = "MAGIC141_JAX_CACHE"
SEAM = ("out_channels", "text_width", "pooled_width")  # config fields that the other components have to agree with
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")

Dtype = Literal["float32", "bfloat16"]
Carry = Literal["pixels", "latents", "sink", "picture"]


@dataclasses.dataclass(frozen=True)
class SamplingSettings:
    """How a set of weights is meant to be sampled: sizes in pixels, clip length in frames, the walk.

    In a long video two windows share `overlap_latents` latent frames; `carry` says what the next one knows of them,
    noised by `history_noise`. With `blend` they fade.

    What published weights need besides, each from diffusers' pipeline of the same name:

    Attributes:
      dynamic_shift: keywords of `timesteps.dynamic_shift`, where the shift follows the size of the image (FLUX.1 dev).
      image_fit: a first image is cut to the clip's shape ("cover") or stretched to it.
      image_share: share of the first image's latent frame in the noise that every frame starts from.
      keep_known: whether a clip's latents end with the known ones as they were given.
      dropped_frames: decoded frames cut off at the start of a clip.
    """

    height: int
    width: int
    num_frames: int
    fps: float
    num_inference_steps: int
    guidance_scale: float
    shift: float
    sampler: Sampler = "euler"
    overlap_latents: int = 1
    history_noise: float = 0.0
    carry: Carry = "pixels"
    blend: bool = False
    dynamic_shift: dict[str, float] | None = None
    image_fit: Fit = "cover"
    image_share: float = 0.0
    keep_known: bool = True
    dropped_frames: int = 0


class Model(NamedTuple):
    """A network with its parameters, or with what lends them (`resident.taken`)."""

    network: Network
    params: Held


class Continuation(NamedTuple):
    """What makes all windows but the first: the transformer with an adapter, beside parameters that both share."""

    network: Network
    params: Held
    config: adapters.ContinuationConfig


@dataclasses.dataclass(frozen=True)
class Components:
    """Everything that the pipelines need, read from `folder`."""

    folder: Path
    transformer: Model
    vae: Model
    text_encoder: TextEncoder
    image_encoder: Model | None
    sampling: SamplingSettings
    mesh: jax.sharding.Mesh | None = None
    continuation: Continuation | None = None

    @functools.cached_property
    def digest(self) -> str:
        """The digest of all weights of the folder, 16 hex digits; read from disk on first use."""
        return weights.digest(self.folder)

    @functools.cached_property
    def config_digest(self) -> str:
        """The first 16 hex digits of the SHA-256 over every JSON file of the folder, in path order."""
        total = hashlib.sha256()
        for file in weights.files(self.folder, "*.json"):
            total.update(file.read_bytes())
        return total.hexdigest()[:16]


def load_components(
    path_or_hub_id: str | Path = DEFAULT,
    *,
    dtype: Dtype | None = None,
    mesh: jax.sharding.Mesh | None = None,
    revision: str | None = None,
    lora: str | Path | None = None,
    lora_scale: float = 1.0,
    transformer: str | Path | None = None,
    **memory: Any,
) -> Components:
    """Reads a weights folder.

    Args:
      path_or_hub_id: a folder, "default", or "owner/name" on the Hugging Face Hub (its local cache serves offline).
      dtype: of the transformer's parameters and activations; float32 on CPU, bfloat16 elsewhere, unless given. The
        other networks compute in float32: they are a small part of the cost.
      mesh: devices over which the parameters are laid (see `magic141_jax.sharding`).
      revision: branch, tag or commit on the Hub.
      lora: a safetensors file in PEFT's naming whose adapters are added to the transformer, `lora_scale` times.
      transformer: a component folder that is read in place of the folder's own transformer.
      **memory: what to save memory on: the fields of `LowMemory`.

    Raises:
      UserError: no such folder or repository; a file missing, damaged or truncated; weights that do not fit their
        config, with the first few mismatches.
    """
    low = settings.build(LowMemory, memory, where="options")
    folder = find_folder(path_or_hub_id, revision)
    own = weights.part(folder, "transformer")
    if transformer is not None:
        own = _replacement(Path(transformer).expanduser(), own)
    index = weights.read_config(folder / "model_index.json")
    dtype = dtype or default_dtype()
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"dtype is {dtype!r}; float32 and bfloat16 are known")
    lend = low.lenders()
    if lora is not None:
        lend["transformer"] = functools.partial(_with_lora, lend["transformer"], file=Path(lora), scale=lora_scale)
    read = _published_components if published.is_published(index) else _own_components
    made = read(folder, index, own, dtype=dtype, mesh=mesh, lend=lend)
    continuation = weights.part(folder, "continuation")
    # It is made for one transformer: not for another one that is asked for, nor for the folder's in place of its base's
    other = transformer is not None or (own.parent.samefile(folder) and not continuation.parent.samefile(folder))
    fits = continuation.is_dir() and not other
    text_parts = [path for path in (weights.part(folder, name) for name in TEXT_PARTS) if path.is_dir()]
    return dataclasses.replace(
        made,
        vae=made.vae._replace(network=low.in_tiles(made.vae.network)),
        text_encoder=low.remembering(made.text_encoder, text_parts, dtype),
        continuation=_continuation(continuation, made.transformer, dtype=dtype, mesh=mesh) if fits else None,
    )


def _continuation(folder: Path, transformer: Model, *, dtype: Dtype, mesh: jax.sharding.Mesh | None) -> Continuation:
    """An adapter that shares the transformer's parameters.

    Raises:
      UserError: it is for a transformer of other sizes.
    """
    mapping = weights.read_config(folder / "config.json")
    mapping.pop("model", None)
    config = settings.build(adapters.ContinuationConfig, mapping, where=f"{folder.name}/config.json")
    network = adapters.adapted(transformer.network, config.rank, paths=config.paths)
    _, adapter = weights.load(folder)
    own = unflatten({k: v for k, v in flatten(network.abstract_params).items() if adapters.is_adapter(k)})
    require_match(adapter, own, what=f"{folder} (for another transformer? long videos can do without it)")
    adapter = sharding.lay(cast(adapter, jnp.dtype(dtype)), mesh, adapters.SHARDING_RULES)
    held = transformer.params
    if not isinstance(held, Lent):
        return Continuation(network, adapters.join(held, adapter), config)
    flat = flatten(adapter)
    lent = Lent(adapters.join(held.shapes, adapter), lambda wanted: {**held.bring(wanted), **flat})
    return Continuation(network, lent, config)


def default_dtype() -> Dtype:
    """The dtype of the large networks unless one is given: float32 on a CPU, bfloat16 elsewhere."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def _replacement(given: Path, own: Path) -> Path:
    """The transformer that takes the place of a folder's own, if it reads and writes the same channels."""
    theirs, ours = (weights.read_config(path / "config.json") for path in (given, own))
    wrong = [f"{k} {theirs[k]} in place of {ours[k]}" for k in SEAM if k in theirs and theirs[k] != ours.get(k)]
    if wrong:
        raise UserError(f"the transformer {given} does not fit {own.parent}: it has {', '.join(wrong)}")
    return given


def _with_lora(lend: Lend, source: Source, *, file: Path, scale: float) -> Held:
    """Lends a transformer with the adapters of a file merged into it when it is read."""
    network = source.network
    if any(map(stored.is_part, flatten(network.abstract_params))):
        raise UserError(f"adapters are merged into plain kernels, which these weights have not: {stored.EXPAND}")
    layout = hunyuan_dit if network.config.refiner_blocks else flux_dit
    adapters = lora_lib.load(file, layout.table(network.config), network.abstract_params)

    def read(mesh: jax.sharding.Mesh | None) -> Params:
        params = source.read(mesh)
        where = jax.tree.map(lambda leaf: leaf.sharding, params)
        return jax.jit(lora_lib.merge, donate_argnums=0, out_shardings=where)(params, adapters, scale)

    return lend(source._replace(read=read))


def _own_components(
    folder: Path,
    index: Mapping[str, Any],
    own: Path,
    *,
    dtype: Dtype,
    mesh: jax.sharding.Mesh | None,
    lend: Mapping[str, Lend],
) -> Components:
    """The parts of a weights folder of ours, its transformer from `own`, which is `dtype`."""
    sampling = settings.build(SamplingSettings, index.get("sampling", {}), where="model_index.sampling")
    part = functools.partial(weights.part, folder)
    models = {
        "transformer": load_model(own, overrides={"compute_dtype": dtype}, mesh=mesh, lend=lend["transformer"]),
        **{name: load_model(part(name), mesh=mesh, lend=lend[name]) for name in ("vae", "image_encoder")},
    }
    kind = weights.read_config(part("text_encoder") / "config.json").get("model")
    read_text = _pick(TEXT_ENCODERS, kind, part("text_encoder"))
    text_encoder = read_text(part("text_encoder"), mesh=mesh, lend=lend["text_encoder"])
    return Components(folder=folder, text_encoder=text_encoder, sampling=sampling, mesh=mesh, **models)


def _published_components(
    folder: Path,
    index: Mapping[str, Any],
    own: Path,
    *,
    dtype: Dtype,
    mesh: jax.sharding.Mesh | None,
    lend: Mapping[str, Lend],
) -> Components:
    """The parts of a pipeline folder in diffusers' layout, its transformer from `own`; all but the VAE are `dtype`."""
    load = functools.partial(load_model, overrides={"compute_dtype": dtype}, mesh=mesh, lend=lend["text_encoder"])
    run_time = {"compute_dtype": dtype, "attention": "auto"}
    transformer = load_model(own, overrides=run_time, mesh=mesh, lend=lend["transformer"])
    text_encoder, sampling = published.read(folder, index, transformer.network.config, load)
    return Components(
        folder=folder,
        transformer=transformer,
        vae=load_model(folder / "vae", mesh=mesh, lend=lend["vae"]),
        text_encoder=text_encoder,
        image_encoder=None,
        sampling=settings.build(SamplingSettings, sampling, where="sampling"),
        mesh=mesh,
    )


def load_model(
    folder: Path,
    *,
    overrides: Mapping[str, Any] | None = None,
    mesh: jax.sharding.Mesh | None = None,
    lend: Lend = at_once,
) -> Model:
    """Reads one component folder; parameters are cast to the config's compute dtype (float32 where it has none).

    Kernels in other forms (`models.stored`) are never expanded here, so a network in few bytes is loaded in few.

    Args:
      folder: with config.json and safetensors, ours or of a published repository (see `convert.repository`).
      overrides: config fields that replace the stored ones.
      mesh: devices over which the parameters are laid by the network's rules, else by size.
      lend: when the parameters are read, and how long they stay.

    Raises:
      UserError: a file missing or damaged, an unknown model or config key, parameters that do not fit it, or too
        little memory for them.
    """
    mapping = weights.read_config(folder / "config.json")
    if repository.is_published(mapping):
        return Model(*repository.load(folder, mesh=mesh, lend=lend, **(overrides or {})))
    kind, kernels = mapping.pop("model", None), mapping.pop(stored.KEY, None)
    config_class, module = _pick(MODELS, kind, folder)
    config = settings.build(config_class, {**mapping, **(overrides or {})}, where=f"{folder.name}/config.json")
    network = stored.as_written(Network.create(module, config), kernels, f"{folder.name}/config.json")
    dtype, rules = jnp.dtype(getattr(config, "compute_dtype", "float32")), SHARDING_RULES.get(kind, ())
    check = functools.partial(require_memory, dtype=dtype, what=str(folder), rules=rules)

    def read(mesh: jax.sharding.Mesh | None) -> Params:
        with sharding.on_host() if mesh is not None else contextlib.nullcontext():
            _, params = weights.load(folder)
            require_match(params, network.abstract_params, what=str(folder))
            params = stored.cast(params, dtype)
        return sharding.lay(params, mesh, rules)

    return Model(network, lend(Source(network, read, mesh, rules, check)))


def load_plain(folder: Path, **options: Any) -> Model:
    """As `load_model`, with dense kernels whatever form they are held in: to train on, to prune, to compare with."""
    network, params = load_model(folder, **options)
    if not any(map(stored.is_part, flatten(params))):
        return Model(network, params)
    _, module = MODELS[kind_of(network.config)]
    return Model(Network.create(module, network.config), stored.dense(network, params))


def find_folder(path_or_hub_id: str | Path, revision: str | None = None) -> Path:
    """A local weights folder for a path, "default" or a Hub id; raises `UserError` when there is none."""
    name = str(path_or_hub_id)
    if name == DEFAULT:
        if not DEFAULT_FOLDER.is_dir():
            raise UserError(f"no embedded weights at {DEFAULT_FOLDER}; clone the repository whole, or name a folder")
        return DEFAULT_FOLDER
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"{path} is a file; name the weights folder that holds model_index.json")
    if not _HUB_ID.fullmatch(name) or path.parent.is_dir():
        raise UserError(f"no weights folder {path}")
    return hub.fetch(name, revision)


def enable_compilation_cache() -> None:
    """Keeps compiled programs between runs, in $MAGIC141_JAX_CACHE or the user's cache folder.

    A cache folder that was already chosen (jax_compilation_cache_dir) stays. Without a writable folder there is a
    warning and no cache. An empty $MAGIC141_JAX_CACHE switches the cache off.
    """
    if jax.config.jax_compilation_cache_dir is not None:  # pyright: ignore[reportAttributeAccessIssue]
        return
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen == "":
        return
    folder = Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "magic141_jax"
    folder = folder.expanduser()
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        warnings.warn(f"can't write into {folder}: programs are compiled anew each run", stacklevel=2)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _pick(table: Mapping[str, Any], name: Any, folder: Path) -> Any:
    if name not in table:
        raise UserError(f"{folder / 'config.json'} names the model {name!r}.{nearest(str(name), table)}")
    return table[name]
