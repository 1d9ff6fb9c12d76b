"""Options: defaults from the weights, and one line for every mistake."""

import numpy as np
import pytest

from magic141_jax.errors import UserError
from magic141_jax.pipelines.options import as_pil, check_size, per_prompt, resolve, size_cell


def test_defaults_come_from_the_weights(pipeline):
    made = resolve({"seed": np.int64(3), "guidance_scale": 2}, pipeline.components)
    assert (made.height, made.num_frames, made.num_inference_steps, made.shift, made.sampler) == (
        32,
        9,
        2,
        3.0,
        "euler",
    )
    assert (made.seed, made.guidance_scale) == (3, 2.0)
    assert resolve({}, pipeline.components, frames=1).num_frames == 1


def test_sizes(pipeline):
    cell = size_cell(pipeline.components)
    assert cell == 16
    check_size(16, 48, cell=cell)
    with pytest.raises(UserError, match="nearest are 16x32 and 16x48"):
        check_size(40, 16, cell=cell)
    with pytest.raises(UserError, match="nearest are 16x16 and 16x16"):
        check_size(1, 1, cell=cell)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_inference_step": 3}, "num_inference_steps"),
        ({"guidance_scale": "high"}, "must be"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"num_inference_steps": 0}, "from 1 to"),
        ({"height": 40}, "32x32 and 32x48"),
        ({"height": 0}, "from 16"),
        ({"num_frames": 10}, "9 and 13"),
        ({"seed": -1}, "seed"),
        ({"seed": (1, 2)}, "2 values of seed for 1 prompts"),
        ({"output_type": "pill"}, "'pil'"),
        ({"sampler": "eular"}, "'euler'"),
        ({"overlap_latents": 3}, "3 latent frames"),
        ({"carry": "latent"}, "'latents'"),
        ({"carry": "latents"}, "raise overlap_latents"),
        ({"blend": 1}, "blend must be bool"),
        ({"anchor": "no"}, "anchor must be bool"),
        ({"latents": np.zeros((1, 2, 4, 4, 4))}, r"\(1, 3, 4, 4, 4\)"),
    ],
)
def test_bad_options(pipeline, options, message):
    with pytest.raises(UserError, match=message):
        pipeline("a cat", **options)


def test_per_prompt():
    assert per_prompt(7, 2, "seed") == [7, 7]
    assert per_prompt((7, 8), 2, "seed") == [7, 8]


def test_as_pil_nests():
    made = as_pil(np.zeros((2, 3, 4, 5, 3)))
    assert (len(made), len(made[0]), made[0][0].size) == (2, 3, (5, 4))
