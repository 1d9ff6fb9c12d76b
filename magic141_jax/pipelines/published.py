"""Published pipeline folders in diffusers' layout: which parts they are made of, and how their pipelines sample.

    DIR/model_index.json                       {"_class_name": "HunyuanVideoImageToVideoPipeline", ...}
    DIR/{transformer,vae,text_encoder,...}/    config.json + safetensors, see `magic141_jax.convert.repository`
    DIR/scheduler/scheduler_config.json        the shift of the sampling times

`PIPELINES` is what we know. Sizes, steps and guidance are the defaults of diffusers' pipelines, and so is what they do
besides: how a first image is resized, its share in the starting noise (0.001), whether its latent ends up in the
result, and the frames that are dropped because the network with known channels makes them badly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from magic141_jax import weights
from magic141_jax.convert import scheduler
from magic141_jax.errors import UserError, nearest
from magic141_jax.models.clip_inputs import ClipPooler, read_clip_tokenizer
from magic141_jax.models.flux_text import FluxTextEncoder
from magic141_jax.models.hunyuan_text import HunyuanTextEncoder, read_image_processor, read_tokenizers
from magic141_jax.models.mmdit import MMDiTConfig
from magic141_jax.models.network import Network
from magic141_jax.models.text import TextEncoder, read_tokenizer
from magic141_jax.pytree import Params

Load = Callable[[Path], tuple[Network, Params]]
IMAGE_SHARE = 0.001
PICTURE_ROWS = {"channels": 2, "replace": 4}  # every which row of a picture is read
VIDEO = {"height": 720, "width": 1280, "num_frames": 129, "fps": 24.0, "num_inference_steps": 50}
IMAGE = {"height": 1024, "width": 1024, "num_frames": 1, "fps": 24.0}


class Published(NamedTuple):
    """One pipeline class.

    text_encoder: (folder, transformer's config, load) -> its text encoder.
    sampling: transformer's config -> fields of `SamplingSettings`, without the shift.
    """

    text_encoder: Callable[[Path, MMDiTConfig, Load], TextEncoder]
    sampling: Callable[[MMDiTConfig], dict[str, Any]]


def is_published(index: Mapping[str, Any]) -> bool:
    """Whether a model_index.json is of a published pipeline, not of a weights folder of ours."""
    return "format" not in index and "_class_name" in index


def read(folder: Path, index: Mapping[str, Any], config: MMDiTConfig, load: Load) -> tuple[TextEncoder, dict[str, Any]]:
    """The text encoder of a published folder, and the fields of its `SamplingSettings`.

    Args:
      folder: of the pipeline.
      index: its model_index.json.
      config: of its transformer.
      load: reads a component folder.

    Raises:
      UserError: an unknown pipeline class; a part that is missing, damaged or fits no other.
    """
    name = index["_class_name"]
    if name not in PIPELINES:
        raise UserError(f"{folder / 'model_index.json'} is of a {name}, which is not known.{nearest(name, PIPELINES)}")
    pipeline = PIPELINES[name]
    times = scheduler.config_to_ours(weights.read_json(folder / "scheduler" / "scheduler_config.json"))
    sampling = pipeline.sampling(config) | {"shift": times.shift, "dynamic_shift": times.dynamic}
    return pipeline.text_encoder(folder, config, load), sampling


def _hunyuan_text(folder: Path, config: MMDiTConfig, load: Load) -> TextEncoder:
    tokenizers = read_tokenizers(folder)
    seeing = {}
    if config.known != "none":
        seeing = {"processor": read_image_processor(folder), "image_every": PICTURE_ROWS[config.known]}
    return HunyuanTextEncoder(load(folder / "text_encoder"), load(folder / "text_encoder_2"), *tokenizers, **seeing)


def _flux_text(folder: Path, config: MMDiTConfig, load: Load) -> TextEncoder:
    length = 512 if config.guidance_embedding else 256  # dev and schnell
    pool = ClipPooler(*load(folder / "text_encoder"), read_clip_tokenizer(folder / "tokenizer"))
    tokenizer = read_tokenizer(folder / "tokenizer_2" / "tokenizer.json")
    network, params = load(folder / "text_encoder_2")
    return FluxTextEncoder(network, params, tokenizer, pool=pool, pooled_width=pool.width, length=length)


def _video_sampling(config: MMDiTConfig) -> dict[str, Any]:
    return VIDEO | {"guidance_scale": 6.0 if config.guidance_embedding else 1.0}


def _image_to_video_sampling(config: MMDiTConfig) -> dict[str, Any]:
    on_channels = config.known == "channels"
    return _video_sampling(config) | {
        "image_fit": "stretch",
        "image_share": IMAGE_SHARE,
        "keep_known": not on_channels,
        "dropped_frames": 4 if on_channels else 0,
    }


def _flux_sampling(config: MMDiTConfig) -> dict[str, Any]:
    dev = config.guidance_embedding
    return IMAGE | {"num_inference_steps": 28 if dev else 4, "guidance_scale": 3.5 if dev else 1.0}


PIPELINES: dict[str, Published] = {
    "HunyuanVideoPipeline": Published(_hunyuan_text, _video_sampling),
    "HunyuanVideoImageToVideoPipeline": Published(_hunyuan_text, _image_to_video_sampling),
    "FluxPipeline": Published(_flux_text, _flux_sampling),
}
