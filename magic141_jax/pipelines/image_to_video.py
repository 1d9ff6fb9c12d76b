"""Image to video: the first latent frame is known, and the image's tokens stand before the text's.

image -> VAE -> known latent frame; image -> vision encoder -> tokens (Magic 1-For-1, section 3, figure 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from magic141_jax.errors import UserError
from magic141_jax.pipelines.components import Components
from magic141_jax.pipelines.engine import Prompts
from magic141_jax.pipelines.media import ImageLike, fit_image, read_image
from magic141_jax.pipelines.options import FORMATTERS, PipelineOutput, SamplingOptions, as_prompts, resolve
from magic141_jax.pipelines.text_to_image import Pipeline
from magic141_jax.sharding import to_host

FIRST_WINDOW = 1  # the purpose of its noise


class ImageToVideoPipeline(Pipeline):
    """prompt and first frame -> video.

    >>> ImageToVideoPipeline.from_pretrained()("a star moves left on a blue background", image="photo.png").frames[0]
    """

    def __call__(
        self, prompt: str | Sequence[str], *, image: ImageLike | Sequence[ImageLike], **options: Any
    ) -> PipelineOutput:
        """Makes a clip for each prompt.

        Args:
          prompt: one or several.
          image: one for all prompts, or a list of one each: paths, PIL images or arrays (y, x, 3), of any size; they
            are resized as the weights want it (`SamplingSettings.image_fit`): cut at the centre, unless stretched.
          **options: the fields of `SamplingOptions`.

        Returns:
          frames (b, t, y, x, 3), images (b, y, x, 3): the first frames as they went in, latents (b, f, h, w, c).

        Raises:
          UserError: an empty prompt; an unreadable image; an unknown option, a wrong type, a value out of range.
        """
        prompts = as_prompts(prompt)
        resolved = resolve(options, self.components)
        if self.components.transformer.network.config.known == "none":
            raise UserError("these weights know of no first image; make a clip from the text alone, or take others")
        pictures = as_pictures(image, len(prompts))
        encoded = self.engine.encode_text(prompts, resolved, images=pictures)
        return self.generate(encoded, fit_images(pictures, resolved, self.components), resolved)

    def generate(self, prompts: Prompts, images: np.ndarray, options: SamplingOptions) -> PipelineOutput:
        """The same for prompts that are encoded, images (b, y, x, 3) of the clip's size, and resolved options."""
        cond, negative = self.engine.condition(prompts, options, images=images)
        latents = self.engine.denoise(cond, negative, options, purpose=FIRST_WINDOW)
        if options.output_type == "latent":
            return PipelineOutput(latents=to_host(latents))
        format_frames = FORMATTERS[options.output_type]
        frames = self.engine.decode(latents)
        return PipelineOutput(format_frames(images), format_frames(frames), to_host(latents))


def as_pictures(image: ImageLike | Sequence[ImageLike], count: int) -> list[np.ndarray]:
    """One image, or `count` of them (a list, or an array with a batch axis) -> `count` arrays (y, x, 3) of any size."""
    several = isinstance(image, list | tuple) or (isinstance(image, np.ndarray) and image.ndim == 4)
    pictures = [read_image(i) for i in (image if several else [image])]  # pyright: ignore[reportGeneralTypeIssues]
    if len(pictures) not in (1, count):
        raise UserError(f"{len(pictures)} images for {count} prompts; give one, or one each")
    return pictures * (count // len(pictures))


def fit_images(pictures: Sequence[np.ndarray], options: SamplingOptions, components: Components) -> np.ndarray:
    """Pictures (y, x, 3) of any size -> (b, y, x, 3) of the clip's size."""
    fit = components.sampling.image_fit
    return np.stack([fit_image(picture, options.height, options.width, fit=fit) for picture in pictures])
