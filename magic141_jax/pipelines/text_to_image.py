"""Text to image: the same network as for video, with one latent frame and nothing known (Magic 1-For-1, section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from magic141_jax.pipelines.components import DEFAULT, Components, enable_compilation_cache, load_components
from magic141_jax.pipelines.engine import IMAGE_PURPOSE, Engine, Prompts
from magic141_jax.pipelines.options import FORMATTERS, PipelineOutput, SamplingOptions, as_prompts, resolve
from magic141_jax.sharding import to_host


class Pipeline:
    """What the pipelines share: loading, and an engine, which pipelines may share as well."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    @classmethod
    def from_pretrained(cls, path_or_hub_id: str | Path = DEFAULT, **options: Any):
        """A pipeline from a weights folder, "default" or a Hub id, with the options of `components.load_components`.

        Also switches JAX's persistent compilation cache on; see `components.enable_compilation_cache`.
        """
        enable_compilation_cache()
        return cls(Engine(load_components(path_or_hub_id, **options)))

    @property
    def components(self) -> Components:
        """The networks, their parameters and their settings."""
        return self.engine.components


class TextToImagePipeline(Pipeline):
    """prompt -> image.

    >>> TextToImagePipeline.from_pretrained()("a red apple on a blue background", seed=1, output_type="pil").images[0]
    """

    def __call__(self, prompt: str | Sequence[str], **options: Any) -> PipelineOutput:
        """Makes an image for each prompt.

        Args:
          prompt: one or several.
          **options: the fields of `SamplingOptions`.

        Returns:
          images (b, y, x, 3) and latents (b, 1, h, w, c).

        Raises:
          UserError: an empty prompt; an unknown option, a wrong type, a value out of range.
        """
        prompts = as_prompts(prompt)
        resolved = resolve(options, self.components, frames=1)
        return self.generate(self.engine.encode_text(prompts, resolved), resolved)

    def generate(self, prompts: Prompts, options: SamplingOptions) -> PipelineOutput:
        """The same for prompts that are encoded and options that are resolved (for one frame)."""
        cond, negative = self.engine.condition(prompts, options)
        latents = self.engine.denoise(cond, negative, options, purpose=IMAGE_PURPOSE)
        if options.output_type == "latent":
            return PipelineOutput(latents=to_host(latents))
        images = self.engine.decode(latents)[:, 0]
        return PipelineOutput(images=FORMATTERS[options.output_type](images), latents=to_host(latents))
