"""Each step of the student does the work of several guided steps of the teacher (progressive distillation, arXiv
2202.00512, in one stage; as regression on trajectories it is also the start of arXiv 2412.07772 before its DMD).

The walk's grid t_0 > ... > t_n cuts the teacher's path into n pieces, each of m Euler steps with guidance w:

    x_t = (1 - t_i) x0 + t_i eps             y = teacher's m steps from x_t to t_{i+1}
          or where the student's own walk from eps is at t_i (`own_states`)
    loss = mean over unknown latents of (v_student(x_t, t_i, c) - (y - x_t) / (t_{i+1} - t_i))^2

Where the teacher's path bends little between two times, the student's Euler walk ends where the teacher's does, noise
by noise: motion and diversity stay. It can't be sharper than the teacher; that is left to distribution matching. On its
own states a student that is smaller than its teacher learns where it has gone astray itself (imitation with the
learner's states: DAgger, arXiv 1011.0686).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Float

from magic141_jax.diffusion import flow, timesteps
from magic141_jax.diffusion.conditioning import Conditioning
from magic141_jax.diffusion.guidance import guided
from magic141_jax.distill import rollout
from magic141_jax.distill.roles import STUDENT, TEACHER, Distillation, DistillationConfig
from magic141_jax.distill.rollout import WalkConfig
from magic141_jax.pytree import Params
from magic141_jax.shapes import Latents
from magic141_jax.train.conditioner import Record, weighted_mean


@dataclasses.dataclass(frozen=True)
class TrajectoryConfig(DistillationConfig):
    """The student's few steps, and the teacher's within each of them.

    Attributes:
      walk: the student's few steps, of Euler's kind.
      guidance: w.
      substeps: m.
      own_states: how often a batch stands where the student's own walk has come to, in place of noised data.
    """

    walk: WalkConfig = dataclasses.field(default_factory=lambda: WalkConfig(sampler="euler"))
    guidance: float = 4.0
    substeps: int = 4
    own_states: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.walk.sampler != "euler":
            raise ValueError(f"a trajectory is walked by walk.sampler='euler', not {self.walk.sampler!r}")
        if self.substeps < 1:
            raise ValueError(f"substeps must be at least 1, got {self.substeps}")
        if not 0 <= self.own_states <= 1:
            raise ValueError(f"own_states is a share from 0 to 1, got {self.own_states}")


class Trajectory(Distillation):
    """The method: role "student" over a frozen "teacher"."""

    Config = TrajectoryConfig

    def part(
        self, params: Mapping[str, Params], part: str, record: Record, key: jax.Array
    ) -> tuple[dict[str, jax.Array], dict[tuple[str, str], jax.Array]]:
        """The loss of one part."""
        cond_key, key = jax.random.split(key)
        cond = self.backbone.conditioning(params, part, record, cond_key)
        loss = jnp.mean(self.errors(params, record["latents"].astype(jnp.float32), cond, cond, key))
        return {STUDENT: loss}, {(STUDENT, "error"): loss}

    def errors(
        self, params: Mapping[str, Params], data: Latents, shown: Conditioning, seen: Conditioning, key: jax.Array
    ) -> Float[jax.Array, " b"]:
        """The loss of each sample at a random step of the walk; the teacher is told `shown`, the student `seen`."""
        index_key, noise_key = jax.random.split(key)
        config, backbone = self.config, self.backbone
        fine = timesteps.grid(config.walk.steps * config.substeps, config.walk.shift)
        index = jax.random.randint(index_key, data.shape[:1], 0, config.walk.steps)
        noise = flow.draw_noise(noise_key, data.shape)
        first = config.substeps * index
        x = flow.interpolate(data, noise, fine[first])
        if config.own_states:
            own, walk = jax.random.bernoulli(jax.random.fold_in(key, 1), config.own_states), config.walk
            student = backbone.velocity(params, STUDENT)
            x = jax.lax.cond(own, lambda: rollout.walk_to(walk, student, seen, noise, index), lambda: x)
        teacher = guided(backbone.velocity(params, TEACHER), backbone.conditioner.negative(shown), config.guidance)

        def step(j: jax.Array, y: jax.Array) -> jax.Array:
            t, t_next = fine[first + j], fine[first + j + 1]
            return y + flow.align(t_next - t, y) * teacher(y, t, shown).astype(jnp.float32)

        y = jax.lax.fori_loop(0, config.substeps, step, x)
        target = (y - x) / flow.align(fine[first + config.substeps] - fine[first], x)
        made = backbone.velocity(params, STUDENT, trained=True)(x, fine[first], seen).astype(jnp.float32)
        return weighted_mean((made - jax.lax.stop_gradient(target)) ** 2, 1 - seen.mask)
