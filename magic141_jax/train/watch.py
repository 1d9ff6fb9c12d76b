"""The collapse watch: samples of fixed prompts and seeds against the teacher's, and losses against their start.

Distribution matching may lose motion and diversity while its losses look well (Phased DMD, arXiv 2510.27684), so the
samples themselves are measured. With x the latents (n prompts, m seeds, f frames, h, w, c), of which the first k frames
are known, and z the known ones (n, k, h, w, c):

    motion       mean |x_i - x_{i-1}| over the unknown frames i >= k, with x_{k-1} = z_{k-1}
    colour       mean of x over seeds, unknown frames and places: (n, c)
    first frame  RMS of x_i - z_i over i < k
    diversity    mean over prompts and pairs of seeds of the RMS distance of their unknown frames

    colour shift = max over channels of the RMS over prompts of (colour - teacher's) / the teacher's deviation
    loss ratio   = (g / g0) / (c / c0)          g, c: mean losses of generator and critic since the last look
    critic stall = (c / g) min(1, g0 / c0)      where c >= c0, else 0

The start g0, c0 is the mean over the looks of the warm-up. A loss ratio that runs up is a critic that the generator
can't follow. A generator's loss that goes to nothing against that of a critic no better than at its start is a critic
that has stalled and is being fooled. It must be small against the critic's loss and against its own start: a critic
that was ahead at first and is met half-way ends with equal losses, which is as it should be.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from magic141_jax.errors import UserError
from magic141_jax.pytree import Params
from magic141_jax.train.conditioner import Record
from magic141_jax.train.method import Method

Clips = Float[Array, "n m f h w c"]
Known = Float[Array, "n k h w c"]
Measures = dict[str, jax.Array]
Starts = dict[str, list[float]]
Sample = Callable[[Mapping[str, Params]], Clips]

# A teacher's first-frame error below this share of its deviation counts as this: a sampler that puts the known
# frames back has none at all.
LEAST_ERROR = 0.05


@dataclasses.dataclass(frozen=True)
class WatchConfig:
    """When the watch looks, the lines that must not be crossed (0 switches a line off), and what a breach does.

    Attributes:
      every: steps between looks; 0 never looks. Not below the cadence of any role, so that a look has all losses.
        Checkpoints are saved at multiples of it.
      prompts, seeds: of the fixed samples; diversity needs two seeds. A look draws all of them at once.
      teacher_steps: of the guided Euler walk that the teacher's samples are drawn with, once at every start.
      warmup: looks up to this step judge nothing and make the start of losses and gradients. A student starts as an
        undistilled sampler of few steps, which hardly moves.
      motion_low, motion_high: of the teacher's motion.
      diversity_low: of the teacher's diversity.
      colour_shift: in deviations of the teacher's latents. Prompts that leave the colours open shift by chance.
      first_frame_error: times the teacher's.
      loss_ratio: how far the generator's loss over the critic's may rise above its start.
      critic_stall: how far the critic's loss may rise above the generator's while it is not below its start.
      generator, critic: the metrics of the two losses, which must not be negative; an empty critic leaves out both
        lines.
      grad_norm: how far the mean gradient norm of a role may rise above its start.
      on_breach: "stop" ends the run; "rollback" goes on from the last good checkpoint by another path.
      max_rollbacks: in the whole run; the next breach stops.
    """

    every: int = 0
    prompts: int = 8
    seeds: int = 2
    teacher_steps: int = 24
    warmup: int = 300
    motion_low: float = 0.5
    motion_high: float = 2.0
    diversity_low: float = 0.5
    colour_shift: float = 0.5
    first_frame_error: float = 3.0
    loss_ratio: float = 50.0
    critic_stall: float = 10.0
    generator: str = "loss/student"
    critic: str = ""
    grad_norm: float = 20.0
    on_breach: Literal["stop", "rollback"] = "stop"
    max_rollbacks: int = 2

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, str) and value < 0:
                raise ValueError(f"{field.name} must not be negative, got {value}")
        for name in ("prompts", "seeds", "teacher_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if 0 < self.motion_high <= self.motion_low:
            raise ValueError(f"motion_high {self.motion_high} must be above motion_low {self.motion_low}")


class Line(NamedTuple):
    """What must stay between two limits: its name, the unit of its value, the limits (0 is none)."""

    name: str
    unit: str
    low: float
    high: float

    def crossed(self, value: float) -> str | None:
        """Says how `value` crosses the line; None if it does not. What is not finite crosses every line."""
        if not (self.low or self.high):
            return None
        said = f"{self.name} {value:.3g} {self.unit} is"
        if math.isnan(value):
            return f"{said} not a number"
        if self.low and value < self.low:
            return f"{said} below {self.low:g}"
        return f"{said} above {self.high:g}" if self.high and value > self.high else None


class Look(NamedTuple):
    """A look's outcome: the lines crossed, scalars for the log, and the starts to give to the next look."""

    crossed: tuple[str, ...]
    scalars: dict[str, float]
    starts: Starts


@dataclasses.dataclass(frozen=True, eq=False)
class Watch:
    """The lines, the fixed samples and the teacher's measures of them. It has no state: see `look`.

    Attributes:
      config: the lines.
      sample: {role: parameters} -> latents of the fixed prompts and seeds, always from the same noise; jitted. To
        have a first-frame error, it returns the walk's own version of the known frames (`samplers.sample`, keep).
      known: the known first latent frames of each prompt; k = 0 where there are none.
      reference: the teacher's measures, from `measure`.
    """

    config: WatchConfig
    sample: Sample
    known: Known
    reference: Measures

    @classmethod
    def create(cls, config: WatchConfig, sample: Sample, *, teacher: Clips, known: Known) -> Watch:
        """A watch that compares with the teacher's samples of the same prompts and seeds.

        Raises:
          ValueError: the teacher's samples are not (prompts, seeds, ...), or are all known.
          UserError: the teacher does not move, or its seeds all give the same.
        """
        if teacher.shape[:2] != (config.prompts, config.seeds) or known.shape[0] != config.prompts:
            raise ValueError(
                f"{config.prompts} prompts and {config.seeds} seeds are watched, but the teacher's samples are "
                f"{teacher.shape} and the known frames {known.shape}"
            )
        if teacher.shape[2] <= known.shape[1]:
            raise ValueError(f"of {teacher.shape[2]} frames {known.shape[1]} are known: nothing is left to watch")
        reference = jax.jit(measure)(teacher, known)
        for name in ("motion", "diversity", "deviation"):
            if name in reference and not 0 < float(reference[name]) < math.inf:
                raise UserError(
                    f"the teacher's {name} on the watch's prompts is {float(reference[name]):g}, so nothing can be "
                    "compared with it; choose other prompts (config.watch)"
                )
        return cls(config, sample, known, reference)

    @classmethod
    def of(cls, config: WatchConfig, method: Method, record: Record, *, key: jax.Array) -> Watch:
        """The watch of a method that can `sample` and has a `reference`, see `train/method.py`.

        Args:
          config: the lines.
          method: whose student and teacher draw the samples, from the same noise at every look.
          record: the fixed prompts, each `seeds` times in a row.
          key: of the noise.

        Raises:
          UserError: the method has no teacher to compare with; see `create`.
        """
        if not (hasattr(method, "sample") and hasattr(method, "reference")):
            raise UserError("the watch compares with a teacher, and this method has none: set config.watch.every to 0")
        known = method.config.shown(record["latents"].shape[1])

        def clips(draw: Callable[..., jax.Array], params: Mapping[str, Params], record: Record) -> Clips:
            made = draw(params, record, key, known=known, keep=False)
            return made.reshape(config.prompts, config.seeds, *made.shape[1:])

        # Frozen parameters and records are arguments: constants of a program are copied to every device.
        student = jax.jit(functools.partial(clips, method.sample))  # pyright: ignore[reportAttributeAccessIssue]
        teacher = jax.jit(functools.partial(clips, functools.partial(method.reference, steps=config.teacher_steps)))  # pyright: ignore[reportAttributeAccessIssue]
        frozen = dict(method.frozen)
        return cls.create(
            config,
            lambda params: student({**frozen, **params}, record),
            teacher=teacher(frozen, record),
            known=record["latents"][:: config.seeds, :known],
        )

    def look(self, params: Mapping[str, Params], means: Mapping[str, float], step: int, starts: Starts) -> Look:
        """Samples, measures and judges.

        Args:
          params: {role: parameters}.
          means: mean metrics of the steps since the last look.
          step: the number of steps done.
          starts: {metric: its means at the looks of the warm-up}, as the last look returned them; {} at first.

        Raises:
          UserError: a loss that the config names is not among `means`, or is negative.
        """
        config = self.config
        watched = [name for name in means if name.startswith("grad_norm/")]
        if config.critic:
            watched += [config.generator, config.critic]
            _require_losses(means, config)
        starts = dict(starts)
        for name in watched:
            # What is zero at first (a term that comes in later) starts when it is there.
            if means[name] > 0 and (step <= config.warmup or name not in starts):
                starts[name] = [*starts.get(name, []), means[name]]
        compared = jax.device_get(_compare(self.sample(params), self.known, self.reference))
        values = {name: float(value) for name, value in compared.items()} | _growth(means, starts, config)
        judged = [line.crossed(values[name]) for name, line in _lines(config, values).items() if name in values]
        crossed = tuple(text for text in judged if text) if step > config.warmup else ()
        return Look(crossed, {f"watch/{name}": value for name, value in values.items()}, starts)


def motion(latents: Clips, known: Known) -> jax.Array:
    """The mean absolute difference of each unknown frame to the frame before it; the known frames are the start."""
    path, k = jnp.asarray(latents, jnp.float32), known.shape[1]
    if k:
        start = jnp.broadcast_to(jnp.asarray(known, jnp.float32)[:, None, -1:], path[:, :, :1].shape)
        path = jnp.concatenate([start, path[:, :, k:]], axis=2)
    return jnp.mean(jnp.abs(jnp.diff(path, axis=2)))


def colour_mean(latents: Clips, known: Known) -> Float[Array, "n c"]:
    """The mean of each channel over seeds, unknown frames and places, for each prompt."""
    return jnp.mean(_unknown(latents, known), axis=(1, 2, 3, 4))


def first_frame_error(latents: Clips, known: Known) -> jax.Array:
    """The root mean square distance of the first frames to the known ones; there must be one at least."""
    first = jnp.asarray(latents, jnp.float32)[:, :, : known.shape[1]]
    return jnp.sqrt(jnp.mean((first - jnp.asarray(known, jnp.float32)[:, None]) ** 2))


def diversity(latents: Clips, known: Known) -> jax.Array:
    """The root mean square distance of two seeds' unknown frames, mean over pairs and prompts; m must be 2 at least."""
    x = _unknown(latents, known)
    first, second = np.triu_indices(x.shape[1], 1)
    return jnp.mean(jnp.sqrt(jnp.mean((x[:, first] - x[:, second]) ** 2, axis=(2, 3, 4, 5))))


def deviation(latents: Clips, known: Known) -> jax.Array:
    """The root mean square distance of the unknown frames to their channels' means: one number for all channels."""
    x = _unknown(latents, known)
    return jnp.sqrt(jnp.mean((x - x.mean((0, 1, 2, 3, 4), keepdims=True)) ** 2))


def measure(latents: Clips, known: Known) -> Measures:
    """Every measure that these shapes have: no motion of single images, no diversity of one seed."""
    m, f, k = latents.shape[1], latents.shape[2], known.shape[1]
    has = {motion: f > max(k, 1), first_frame_error: k > 0, diversity: m > 1, colour_mean: True, deviation: True}
    return {function.__name__: function(latents, known) for function, there in has.items() if there}


@jax.jit
def _compare(latents: Clips, known: Known, reference: Measures) -> dict[str, jax.Array]:
    """The measures against the reference as scalars, which are whole on every process."""
    made, unit = measure(latents, known), reference["deviation"]
    values = {name: made[name] / reference[name] for name in ("motion", "diversity") if name in made}
    shift = jnp.sqrt(jnp.mean((made["colour_mean"] - reference["colour_mean"]) ** 2, axis=0))
    values["colour_shift"] = jnp.max(shift) / unit
    if "first_frame_error" in made:
        least = jnp.maximum(reference["first_frame_error"], LEAST_ERROR * unit)
        values["first_frame_error"] = made["first_frame_error"] / least
    return values


def _unknown(latents: Clips, known: Known) -> Clips:
    return jnp.asarray(latents, jnp.float32)[:, :, known.shape[1] :]


def _require_losses(means: Mapping[str, float], config: WatchConfig) -> None:
    """Refuses names that the method does not report, and losses whose ratio says nothing."""
    for field in ("generator", "critic"):
        name = getattr(config, field)
        if name not in means:
            known = ", ".join(sorted(means))
            raise UserError(f"config.watch.{field} is {name!r}, which the last steps did not report; they have {known}")
        if means[name] < 0:
            raise UserError(f"{name} is {means[name]:g}, and no ratio can be made of it; empty config.watch.critic")


def _growth(means: Mapping[str, float], starts: Starts, config: WatchConfig) -> dict[str, float]:
    """The values of the lines of losses and gradient norms: those that have a start."""
    start = {name: float(np.mean(values)) for name, values in starts.items()}
    values = {name: means[name] / start[name] for name in start if name in means and name.startswith("grad_norm/")}
    if config.generator in start and config.critic in start:
        (g, c), (g0, c0) = ([of[name] for name in (config.generator, config.critic)] for of in (means, start))
        values["loss_ratio"] = (g / g0) / (c / c0) if c else math.inf
        values["critic_stall"] = 0.0 if c < c0 else (c / g) * min(1, g0 / c0) if g else math.inf
    return values


def _lines(config: WatchConfig, values: Mapping[str, float]) -> dict[str, Line]:
    """Every line by the name of its value."""
    return {
        "motion": Line("motion", "of the teacher's", config.motion_low, config.motion_high),
        "diversity": Line("diversity", "of the teacher's", config.diversity_low, 0),
        "colour_shift": Line("colour shift", "of the teacher's deviation", 0, config.colour_shift),
        "first_frame_error": Line("first-frame error", "times the teacher's", 0, config.first_frame_error),
        "loss_ratio": Line(f"{config.generator} over {config.critic}", "times its start", 0, config.loss_ratio),
        "critic_stall": Line(f"critic stalled: {config.critic}", f"times {config.generator}", 0, config.critic_stall),
        **{name: Line(name, "times its start", 0, config.grad_norm) for name in values if "grad_norm/" in name},
    }
