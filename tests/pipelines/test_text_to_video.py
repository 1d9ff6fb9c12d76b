"""Both steps in a row, over tiny random weights: shapes, seeds, batches, guidance, output types."""

import numpy as np
import pytest
from PIL import Image

from magic141_jax.errors import UserError

PROMPT = "a red shark moves left"


@pytest.fixture(scope="module")
def made(pipeline):
    return pipeline(PROMPT, seed=3)


def test_shapes_and_ranges(made):
    assert made.images.shape == (1, 32, 32, 3)
    assert made.frames.shape == (1, 9, 32, 32, 3)
    assert made.latents.shape == (1, 3, 4, 4, 4)
    assert made.frames.min() >= 0
    assert made.frames.max() <= 1
    assert made.frames.std() > 0.01


def test_the_seed_decides(pipeline, made):
    np.testing.assert_array_equal(pipeline(PROMPT, seed=3).frames, made.frames)
    assert np.abs(pipeline(PROMPT, seed=4).frames - made.frames).max() > 0.01


def test_the_batch_does_not_change_a_video(pipeline, made):
    both = pipeline([PROMPT, "a blue cat"], seed=3)
    np.testing.assert_allclose(both.frames[0], made.frames[0], atol=1e-4)
    alone = pipeline("a blue cat", seed=(5,))
    pair = pipeline([PROMPT, "a blue cat"], seed=(3, 5))
    np.testing.assert_allclose(pair.frames[1], alone.frames[0], atol=1e-4)


def test_the_same_prompt_twice_gives_two_videos(pipeline):
    frames = pipeline([PROMPT, PROMPT], seed=3).frames
    assert np.abs(frames[0] - frames[1]).max() > 0.01


def test_the_prompt_matters(pipeline, made):
    assert np.abs(pipeline("the cat", seed=3).frames - made.frames).max() > 1e-3


def test_guidance_and_the_negative_prompt_matter(pipeline, made):
    guided = pipeline.text_to_image(PROMPT, seed=3, guidance_scale=3.0).images
    assert np.abs(guided - made.images).max() > 1e-3
    other = pipeline.text_to_image(PROMPT, seed=3, guidance_scale=3.0, negative_prompt="blue cat").images
    assert np.abs(guided - other).max() > 1e-4
    same = pipeline.text_to_image(PROMPT, seed=3, guidance_scale=3.0, negative_prompt=PROMPT).images
    np.testing.assert_allclose(same, made.images, atol=1e-3)


def test_output_types(pipeline, made):
    pil = pipeline(PROMPT, seed=3, output_type="pil")
    assert isinstance(pil.images[0], Image.Image)
    assert len(pil.frames[0]) == 9
    np.testing.assert_allclose(np.asarray(pil.frames[0][4]) / 255, made.frames[0, 4], atol=1 / 255)
    latent = pipeline(PROMPT, seed=3, output_type="latent")
    assert latent.frames is None
    np.testing.assert_array_equal(latent.latents, made.latents)


@pytest.mark.parametrize("options", [{"sampler": "renoise"}, {"num_inference_steps": 3}])
def test_samplers_and_steps(pipeline, made, options):
    assert np.abs(pipeline.text_to_image(PROMPT, seed=3, **options).images - made.images).max() > 1e-4


def test_the_callback_sees_every_step(pipeline):
    steps = []
    pipeline.text_to_image("a cat", callback=lambda step, time, latents: steps.append((int(step), float(time))))
    assert sorted(steps)[0][0] == 0
    assert sorted(steps)[-1] == (1, 0.0)


@pytest.mark.parametrize("prompt", ["", "  ", [], ["a cat", ""]])
def test_empty_prompts(pipeline, prompt):
    with pytest.raises(UserError, match="prompt is empty"):
        pipeline(prompt)
