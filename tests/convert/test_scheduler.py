"""Time grids against diffusers' scheduler, fixed and dynamic, both ways; other schedules are refused."""

import numpy as np
import pytest

from magic141_jax.convert import scheduler
from magic141_jax.diffusion.timesteps import dynamic_shift, grid
from magic141_jax.errors import UserError

# as the repositories hold them: keys of their time only
PUBLISHED = {
    "HunyuanVideo": {"num_train_timesteps": 1000, "shift": 7.0},
    "FLUX.1-schnell": {"shift": 1.0, "use_dynamic_shifting": False, "base_shift": 0.5, "max_shift": 1.15},
    "FLUX.1-dev": {"shift": 3.0, "use_dynamic_shifting": True, "max_image_seq_len": 4096, "base_image_seq_len": 256},
    "another line": {"use_dynamic_shifting": True, "base_shift": 0.2, "max_shift": 2.0, "max_image_seq_len": 1000},
}


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize(("steps", "tokens"), [(1, 24), (4, 4096), (28, 6000)])
def test_grid_equals_the_published_one(name, steps, tokens):
    diffusers = pytest.importorskip("diffusers")
    flux = pytest.importorskip("diffusers.pipelines.flux.pipeline_flux")
    theirs = diffusers.FlowMatchEulerDiscreteScheduler.from_config(PUBLISHED[name])
    c = theirs.config
    mu = flux.calculate_shift(tokens, c.base_image_seq_len, c.max_image_seq_len, c.base_shift, c.max_shift)
    theirs.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    shift = scheduler.config_to_ours(PUBLISHED[name])
    np.testing.assert_allclose(grid(steps, shift.at(tokens)), theirs.sigmas.numpy(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", PUBLISHED)
def test_config_round_trip(name):
    diffusers = pytest.importorskip("diffusers")
    shift = scheduler.config_to_ours(PUBLISHED[name])
    theirs = scheduler.config_from_ours(shift)
    assert scheduler.config_to_ours(theirs) == shift
    full = diffusers.FlowMatchEulerDiscreteScheduler.from_config(PUBLISHED[name]).config
    for key, value in theirs.items():
        if not key.startswith("_") and (shift.dynamic is not None or key not in scheduler.DYNAMIC_FIELDS):
            assert full[key] == value, key


def test_a_fixed_shift_is_for_every_size():
    shift = scheduler.config_to_ours(PUBLISHED["HunyuanVideo"])
    assert shift.at(10) == shift.at(10**6) == 7.0
    dynamic = scheduler.config_to_ours(PUBLISHED["FLUX.1-dev"])
    assert dynamic.at(4096) == pytest.approx(np.exp(1.15)) == pytest.approx(dynamic_shift(4096))


@pytest.mark.parametrize(
    "change",
    [
        {"use_karras_sigmas": True},
        {"use_beta_sigmas": True},
        {"use_exponential_sigmas": True},
        {"stochastic_sampling": True},
        {"invert_sigmas": True},
        {"shift_terminal": 0.1},
        {"time_shift_type": "linear"},
        {"num_train_timesteps": 500},
        {"_class_name": "DDIMScheduler"},
    ],
)
def test_other_schedules_are_refused(change):
    key, value = next(iter(change.items()))
    with pytest.raises(UserError, match=f"{value if key == '_class_name' else key}.* supported"):
        scheduler.config_to_ours(PUBLISHED["FLUX.1-dev"] | change)
