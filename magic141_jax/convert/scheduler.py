"""diffusers' scheduler_config.json <-> how sampling times are shifted: HunyuanVideo's fixed shift, FLUX's dynamic one.

The published pipelines walk linspace(1, 0, steps + 1) with Euler steps after a shift, which is
`timesteps.grid(steps, shift)`. What else their scheduler can do to the times (Karras, beta or exponential spacing,
inversion, a stretched end, noise at every step) no published network here asks for, and it is refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from magic141_jax.diffusion.timesteps import dynamic_shift
from magic141_jax.errors import UserError

CLASS_NAME = "FlowMatchEulerDiscreteScheduler"

# their config key -> (keyword of `dynamic_shift`, their default)
DYNAMIC_FIELDS = {
    "base_shift": ("base_shift", 0.5),
    "max_shift": ("max_shift", 1.15),
    "base_image_seq_len": ("base_tokens", 256),
    "max_image_seq_len": ("max_tokens", 4096),
}
FIXED_FIELDS = {
    "num_train_timesteps": 1000,
    "time_shift_type": "exponential",
    "shift_terminal": None,
    "invert_sigmas": False,
    "stochastic_sampling": False,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
}


@dataclasses.dataclass(frozen=True)
class TimeShift:
    """The shift of sampling times: `shift` for every size, unless `dynamic` holds keywords of `dynamic_shift`."""

    shift: float = 1.0
    dynamic: Mapping[str, float] | None = None

    def at(self, tokens: int) -> float:
        """The shift for latents of `tokens` tokens, to be given to `timesteps.grid`."""
        return self.shift if self.dynamic is None else dynamic_shift(tokens, **self.dynamic)


def config_to_ours(theirs: Mapping[str, Any]) -> TimeShift:
    """diffusers' scheduler_config.json -> `TimeShift`. A missing key has their default.

    Raises:
      UserError: another scheduler, or settings that would need other times or steps.
    """
    name = theirs.get("_class_name", CLASS_NAME)
    if name != CLASS_NAME:
        raise UserError(f"the scheduler is {name}; only {CLASS_NAME} is supported, so set it in scheduler_config.json")
    # their switches are off at None, False and 0 alike
    wrong = {k: theirs[k] for k, value in FIXED_FIELDS.items() if (theirs.get(k, value) or None) != (value or None)}
    if wrong:
        listed = ", ".join(f"{key} = {value!r}" for key, value in wrong.items())
        raise UserError(f"scheduler_config.json has {listed}, which is not supported; remove it to sample without")
    dynamic = {ours: theirs.get(key, default) for key, (ours, default) in DYNAMIC_FIELDS.items()}
    return TimeShift(theirs.get("shift", 1.0), dynamic if theirs.get("use_dynamic_shifting", False) else None)


def config_from_ours(shift: TimeShift) -> dict[str, Any]:
    """`TimeShift` -> diffusers' scheduler_config.json."""
    dynamic = shift.dynamic or {}
    theirs = {key: dynamic.get(ours, default) for key, (ours, default) in DYNAMIC_FIELDS.items()}
    own = {"shift": shift.shift, "use_dynamic_shifting": shift.dynamic is not None}
    return {"_class_name": CLASS_NAME} | FIXED_FIELDS | own | theirs
