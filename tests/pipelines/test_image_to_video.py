"""The first frame is kept, and the image reaches the video through latents and tokens."""

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from magic141_jax.errors import UserError


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(1).uniform(size=(32, 32, 3)).astype(np.float32)


def test_the_first_latent_frame_is_the_image_s(pipeline, image):
    made = pipeline.image_to_video("a cat moves left", image=image, seed=1)
    network, params = pipeline.components.vae
    latents = network(params, jnp.asarray(image)[None, None], method="encode_latents")
    np.testing.assert_allclose(made.latents[:, :1], latents, atol=1e-4)
    np.testing.assert_array_equal(made.images[0], image)
    assert made.frames.shape == (1, 9, 32, 32, 3)


def test_files_of_any_size_and_one_image_for_all(pipeline, image, tmp_path):
    path = tmp_path / "photo.png"
    Image.fromarray((image * 255).astype(np.uint8)).resize((100, 60)).convert("RGBA").save(path)
    made = pipeline.image_to_video(["a cat", "a shark"], image=str(path), output_type="latent")
    np.testing.assert_allclose(made.latents[0, 0], made.latents[1, 0], atol=1e-5)
    with pytest.raises(UserError, match="3 images for 2 prompts"):
        pipeline.image_to_video(["a cat", "a shark"], image=[path] * 3)


def test_image_tokens_matter(pipeline, image):
    """Two images with the same known latents can only differ through their tokens."""
    engine = pipeline.engine
    sent = []
    original = engine._image_tokens
    try:
        engine._image_tokens = lambda label, images, *rest: original(label, jnp.zeros_like(images), *rest)
        sent.append(pipeline.image_to_video("a cat", image=image, seed=1).latents)
    finally:
        engine._image_tokens = original
    sent.append(pipeline.image_to_video("a cat", image=image, seed=1).latents)
    np.testing.assert_array_equal(sent[0][:, :1], sent[1][:, :1])
    assert np.abs(sent[0][:, 1:] - sent[1][:, 1:]).max() > 1e-4
