"""Text to video in two steps, the idea of Magic 1-For-1 (arXiv 2502.07701, section 3): text to image, image to video.

The image is decoded once, for the result and for its tokens; the text is encoded once, for both steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from magic141_jax.pipelines.engine import Engine
from magic141_jax.pipelines.image_to_video import ImageToVideoPipeline
from magic141_jax.pipelines.options import FORMATTERS, PipelineOutput, as_prompts, resolve
from magic141_jax.pipelines.text_to_image import Pipeline, TextToImagePipeline


class TextToVideoPipeline(Pipeline):
    """prompt -> image -> video.

    >>> TextToVideoPipeline.from_pretrained()("a shark moves left on a yellow background", seed=0).frames[0]
    """

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.text_to_image = TextToImagePipeline(engine)
        self.image_to_video = ImageToVideoPipeline(engine)

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
        encoded = self.engine.encode_text(prompts, resolved)
        one_frame = dataclasses.replace(resolved, num_frames=1, output_type="np", latents=None)
        images = self.text_to_image.generate(encoded, one_frame).images
        made = self.image_to_video.generate(encoded, images, resolved)
        if resolved.output_type == "latent":
            return made
        return dataclasses.replace(made, images=FORMATTERS[resolved.output_type](images))
