"""Text to video in two steps, the idea of Magic 1-For-1 (arXiv 2502.07701, section 3): text to image, image to video.

Both steps may share one set of weights, or the image may come from another one (FLUX, or HunyuanVideo itself with one
frame). The image is decoded once, for the result and for its tokens; the text is encoded once where both steps read it
alike. Weights that know of no first image (HunyuanVideo's text-to-video network) make the clip from the text alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from magic141_jax.errors import UserError
from magic141_jax.models.resident import Room
from magic141_jax.pipelines.engine import Engine, Prompts
from magic141_jax.pipelines.image_to_video import FIRST_WINDOW, ImageToVideoPipeline
from magic141_jax.pipelines.options import FORMATTERS, PipelineOutput, SamplingOptions, as_prompts, resolve
from magic141_jax.pipelines.text_to_image import Pipeline, TextToImagePipeline
from magic141_jax.sharding import to_host

BOTH = ("dtype", "mesh", "offload", "text_cache", "vae_tiles")  # options that hold for both sets of weights
SHARED = ("height", "width", "negative_prompt", "seed")  # options that hold for another network's image as well


class TextToVideoPipeline(Pipeline):
    """prompt -> image -> video.

    >>> TextToVideoPipeline.from_pretrained()("a shark moves left on a yellow background", seed=0).frames[0]
    """

    def __init__(self, engine: Engine, image_engine: Engine | None = None) -> None:
        super().__init__(engine)
        self.text_to_image = TextToImagePipeline(image_engine or engine)
        self.image_to_video = ImageToVideoPipeline(engine)

    @classmethod
    def from_pretrained(cls, *args: Any, image_weights: str | Path | None = None, **kwargs: Any):
        """As `Pipeline.from_pretrained`; the image is made by `image_weights` where given, a folder or Hub id."""
        if image_weights is not None and kwargs.get("offload") is True:
            kwargs["offload"] = Room()
        made = super().from_pretrained(*args, **kwargs)
        if image_weights is None:
            return made
        kwargs = {name: value for name, value in kwargs.items() if name in BOTH}
        return cls(made.engine, TextToImagePipeline.from_pretrained(image_weights, **kwargs).engine)

    def __call__(self, prompt: str | Sequence[str], **options: Any) -> PipelineOutput:
        """Makes a clip for each prompt.

        Args:
          prompt: one or several.
          **options: the fields of `SamplingOptions`; `latents` is the video's noise.

        Returns:
          frames (b, t, y, x, 3), images (b, y, x, 3): the images that were animated, latents (b, f, h, w, c).

        Raises:
          UserError: an empty prompt; an unknown option, a wrong type, a value out of range.
        """
        prompts = as_prompts(prompt)
        resolved = resolve(options, self.components)
        if self.components.transformer.network.config.known == "none":
            return self.direct(prompts, resolved)
        encoded, images = self.first_images(prompts, options, resolved)
        made = self.image_to_video.generate(encoded, images, resolved)
        if resolved.output_type == "latent":
            return made
        return dataclasses.replace(made, images=FORMATTERS[resolved.output_type](images))

    def first_images(
        self, prompts: Sequence[str], options: Mapping[str, Any], resolved: SamplingOptions
    ) -> tuple[Prompts, np.ndarray]:
        """Makes the first images (b, y, x, 3), and encodes the prompts for animating them."""
        image_engine = self.text_to_image.engine
        alone = image_engine is self.engine
        if alone and self.components.text_encoder.image_tokens:
            raise UserError(
                "these weights animate a picture: give an image, or image_weights to make one from the text"
            )
        if alone:
            one_frame = dataclasses.replace(resolved, num_frames=1, output_type="np", latents=None)
        else:
            shared = {name: options[name] for name in SHARED if name in options}
            shared |= {"height": resolved.height, "width": resolved.width}
            one_frame = resolve(shared, image_engine.components, frames=1)
        encoded = image_engine.encode_text(prompts, one_frame)
        images = self.text_to_image.generate(encoded, one_frame).images
        return encoded if alone else self.engine.encode_text(prompts, resolved, images=list(images)), images

    def from_text(self, prompt: str | Sequence[str], **options: Any) -> PipelineOutput:
        """Clips from the text alone, without a picture in between, of a network that has learned that.

        Arguments and errors as for the call; `images` are the clips' first frames.
        """
        return self.direct(as_prompts(prompt), resolve(options, self.components))

    def direct(self, prompts: Sequence[str], options: SamplingOptions) -> PipelineOutput:
        """`from_text` of resolved options."""
        cond, negative = self.engine.condition(self.engine.encode_text(prompts, options), options)
        latents = self.engine.denoise(cond, negative, options, purpose=FIRST_WINDOW)
        if options.output_type == "latent":
            return PipelineOutput(latents=to_host(latents))
        frames = self.engine.decode(latents)
        form = FORMATTERS[options.output_type]
        return PipelineOutput(form(frames[:, 0]), form(frames), to_host(latents))
