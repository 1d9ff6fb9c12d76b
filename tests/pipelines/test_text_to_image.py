"""One latent frame and nothing known."""

import numpy as np
import pytest

from magic141_jax.errors import UserError
from magic141_jax.pipelines.text_to_image import TextToImagePipeline


def test_the_image_is_that_of_text_to_video(pipeline):
    image = TextToImagePipeline(pipeline.engine)("a red shark", seed=2)
    assert image.images.shape == (1, 32, 32, 3)
    assert image.latents.shape == (1, 1, 4, 4, 4)
    np.testing.assert_array_equal(pipeline("a red shark", seed=2).images, image.images)


def test_given_noise_is_used(pipeline):
    noise = np.random.default_rng(0).normal(size=(1, 1, 4, 4, 4)).astype(np.float32)
    first, again = (pipeline.text_to_image("a cat", seed=s, latents=noise).images for s in (0, 1))
    np.testing.assert_array_equal(first, again)


def test_frames_are_refused(pipeline):
    with pytest.raises(UserError, match="makes 1"):
        pipeline.text_to_image("a cat", num_frames=9)
