"""What a training method is: losses over named roles. The step and the loop know nothing else about it.

A role is a set of trained parameters with its own optimizer: a student, a fake score, a discriminator. A method
says which roles there are, how often each is updated, and what each minimises. Flow matching, autoencoding and
the distillation objectives (paper sections 3 and 4) are methods; none of them has a trainer of its own.

A method's file ends with a class that has `Config`, a dataclass, and `build(config, parts)`; a config file names it by
a key of `experiment.METHODS` or, if it lives elsewhere, as "package.module:Class".

What a method of latent records may offer besides, with a Config that is a `ConditioningConfig`:

    sample(params, record, key, *, known, keep=True) -> latents                 previews
    reference(params, record, key, *, known, steps, keep=True) -> latents       the watch: the teacher's, to compare
    sampled(record) -> record                                                   what samples are like, if not it
    sampling() -> fields of SamplingSettings                                    what an export records

Both kinds of samples are pure functions of all parameters by role, the frozen ones among them. They are like the
record's latents, from the same noise, with the first `known` frames known; `keep` is that of `samplers.sample`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax

from magic141_jax.models.network import Network
from magic141_jax.pytree import Params
from magic141_jax.train.conditioner import Conditioner, ConditioningConfig

Batch = Mapping[str, Any]
Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Parts:
    """What an experiment hands to `Method.build`.

    Attributes:
      network: what config.model describes.
      model_name: its name in a weights folder's config.json.
      conditioner: makes the conditioning of latent records; raises `UserError` if the data holds other records.
      teacher: reads config.teacher, {"transformer": (config, parameters), "image_encoder": ...}, the parameters laid
        over the mesh; raises `UserError` where there is none.
      raw_records: raises `UserError` unless the data holds frames.
      vae: reads that of config.components_from, (network, parameters laid over the mesh); raises `UserError` where
        there is none.
    """

    network: Network
    model_name: str
    conditioner: Callable[[ConditioningConfig], Conditioner]
    teacher: Callable[[], dict[str, tuple[Any, Params]]]
    raw_records: Callable[[], None]
    vae: Callable[[], tuple[Network, Params]]


class Method(Protocol):
    """A training objective over named roles.

    Attributes:
      config: of its class's `Config`.
      roles: the trained roles, in the order in which they are updated.
      cadence: a role is updated at every step divisible by its number; a missing role counts as 1.
      frozen: parameters that the losses read under their own role names and that are never updated or saved. Large
        ones lie over the mesh already, as those of `Parts.teacher` do.
    """

    config: Any
    roles: tuple[str, ...]
    cadence: Mapping[str, int]
    frozen: Mapping[str, Params]

    def init(self, key: jax.Array) -> dict[str, Params]:
        """Draws fresh parameters of every trained role."""
        ...

    def losses(
        self, params: Mapping[str, Params], batch: Batch, key: jax.Array, step: jax.Array
    ) -> tuple[dict[str, jax.Array], Metrics]:
        """One scalar loss per trained role, and scalar metrics; pure and traceable.

        The step differentiates the loss of a role by the parameters of that role only, so an adversary needs no
        stop_gradient. What only a role that isn't updated in this step needs is never computed: its loss, and the
        metrics named "<role>/...". A metric that a batch has no sample for is NaN, and is left out of the averages.
        """
        ...

    def components(self, params: Mapping[str, Params]) -> dict[str, tuple[str, Any, Params]]:
        """The networks that a weights folder gets: {folder name: (model name, config, parameters)}."""
        ...


def active_roles(method: Method, step: int) -> tuple[str, ...]:
    """The roles that step number `step` (counted from 0) updates."""
    return tuple(role for role in method.roles if step % method.cadence.get(role, 1) == 0)
