"""One frozen backbone and the roles that stand on it (MagicDistillation, arXiv 2503.13319, section on LoRA roles).

    teacher   W                           frozen; with `weak` > 0 it is W + weak B_f A_f, a step toward the fake score
    student   W + B_s A_s   or its own W'
    fake      W + B_f A_f   or its own W'

A role's trained parameters are {"adapter": ...} or {"transformer": ...}. W is held once, among the frozen parameters
that every loss reads under the role name "teacher", together with the image encoder, which all roles share.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from magic141_jax.convert.lora import merge
from magic141_jax.diffusion.conditioning import Conditioning, Velocity
from magic141_jax.errors import UserError
from magic141_jax.models import lora, mmdit
from magic141_jax.models.network import Network
from magic141_jax.pytree import Params, cast
from magic141_jax.train.conditioner import Conditioner, ConditioningConfig, Record
from magic141_jax.train.flow_matching import STUDENT
from magic141_jax.train.method import Batch, Metrics, Parts

TEACHER, FAKE = "teacher", "fake"
Layout = Literal["adapter", "full"]
MOMENTS = 2  # float32 copies that AdamW holds of each trained parameter; Muon holds one, of the hidden matrices


@dataclasses.dataclass(frozen=True)
class RolesConfig:
    """How the roles are held.

    Attributes:
      student, fake: "adapter" trains a LoRA on the frozen backbone, "full" a copy of it.
      rank: of the adapters.
      paths: a regex over dotted paths of the linear maps that get one; empty is all.
      weak: the share of the fake score's adapter that the teacher gets (weak-to-strong matching); 0 is the plain one.
      embedded_guidance: the scale that networks with a guidance embedding are fed, where a method doesn't choose one.
      teacher_dtype: of the frozen parameters.
    """

    student: Layout = "full"
    fake: Layout = "adapter"
    rank: int = 32
    paths: str = ""
    weak: float = 0.0
    embedded_guidance: float = 6.0
    teacher_dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")
        if self.weak and self.fake != "adapter":
            raise ValueError("weak needs fake='adapter': it is a share of that adapter")


@dataclasses.dataclass(frozen=True, eq=False)
class Backbone:
    """The networks behind the roles, and the teacher's parameters.

    Attributes:
      config: how the roles are held.
      network: the transformer of full roles.
      frozen_network: the teacher's, which may lack the guidance embedding.
      adapted: the teacher's with adapters.
      conditioner: of records; its image encoder is the teacher's.
      frozen: {"transformer": ..., "image_encoder": ...}, to be listed as the method's frozen role "teacher".
    """

    config: RolesConfig
    network: Network
    frozen_network: Network
    adapted: Network
    conditioner: Conditioner
    frozen: Params

    @classmethod
    def create(cls, config: RolesConfig, parts: Parts, conditioner: Conditioner) -> Backbone:
        """Reads the experiment's teacher.

        Raises:
          UserError: no teacher, or one of other sizes than config.model.
        """
        found = parts.teacher()
        teacher_config = _run_like(found["transformer"][0], parts.network.config)
        own = dataclasses.replace(parts.network.config, guidance_embedding=teacher_config.guidance_embedding)
        if own != teacher_config:
            names = [f.name for f in dataclasses.fields(own)]
            differing = ", ".join(name for name in names if getattr(own, name) != getattr(teacher_config, name))
            raise UserError(f"config.model and the teacher's transformer differ in {differing}")
        if own != parts.network.config and "adapter" in (config.student, config.fake):
            raise UserError("a network that gains a guidance embedding needs roles.student and roles.fake to be 'full'")
        frozen = {name: cast(params, jnp.dtype(config.teacher_dtype)) for name, (_, params) in found.items()}
        plain = Network.create(parts.network.build, teacher_config)
        return cls(
            config, parts.network, plain, lora.adapted(plain, config.rank, paths=config.paths), conditioner, frozen
        )

    def layout(self, role: str) -> Layout:
        """How a trained role is held."""
        return getattr(self.config, role)

    def init(self, role: str, key: jax.Array) -> Params:
        """A trained role at its start: the teacher itself."""
        if self.layout(role) == "adapter":
            return {"adapter": lora.fresh(self.adapted, key)}
        own = jax.tree.map(_own_copy, self.frozen["transformer"])
        if self.network.config.guidance_embedding and "guidance_in" not in own:
            embedder = self.network.init(key)["guidance_in"]
            # it adds nothing at first
            own["guidance_in"] = embedder | {"down": jax.tree.map(jnp.zeros_like, embedder["down"])}
        return {"transformer": own}

    def velocity(
        self, params: Mapping[str, Params], role: str, *, trained: bool = False, guidance: Any = None
    ) -> Velocity:
        """The velocity of a role.

        Args:
          params: of all roles, the frozen "teacher" among them.
          role: whose.
          trained: whether gradients flow into the role's parameters; without it they are constants.
          guidance: the scale for a network with a guidance embedding, or one per sample.
        """
        network, own = self._of(params, role)
        if not network.config.guidance_embedding:
            guidance = None
        elif guidance is None:
            guidance = self.config.embedded_guidance
        return mmdit.velocity_fn(network, own if trained else jax.lax.stop_gradient(own), guidance=guidance)

    def conditioning(self, params: Mapping[str, Params], part: str, record: Record, key: jax.Array) -> Conditioning:
        """The conditioning of a batch's part, "image" or "video", which all roles share."""
        known_key, text_key, history_key = jax.random.split(key, 3)
        video, shape = part == "video", record["latents"].shape
        known = self.conditioner.draw_known(known_key, shape) if video else jnp.zeros(shape[0], jnp.int32)
        encoder = params[TEACHER].get("image_encoder")
        cond = self.conditioner.condition(encoder, record, text_key, known, image_tokens=video)
        return self.conditioner.noise_history(cond, history_key)

    def _of(self, params: Mapping[str, Params], role: str) -> tuple[Network, Params]:
        backbone = params[TEACHER]["transformer"]
        if role == TEACHER:
            if not self.config.weak:
                return self.frozen_network, backbone
            return self.adapted, lora.join(backbone, params[FAKE]["adapter"], self.config.weak)
        if self.layout(role) == "adapter":
            return self.adapted, lora.join(backbone, params[role]["adapter"])
        return self.network, params[role]["transformer"]

    def components(self, params: Mapping[str, Params], role: str = STUDENT) -> dict[str, tuple[str, Any, Params]]:
        """The folders of a role: its transformer, an adapter merged in, and the teacher's image encoder."""
        own = params[role]
        transformer = own.get("transformer") or merge(self.frozen["transformer"], own["adapter"])
        made = {"transformer": ("mmdit", self.network.config, transformer)}
        encoder = self.conditioner.image_encoder
        if encoder is not None:
            made["image_encoder"] = ("image_encoder", encoder.config, self.frozen["image_encoder"])
        return made


def _own_copy(leaf: Any) -> jax.Array:
    """A float32 copy; where the teacher is known by its shapes alone, zeros, which are only ever traced."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jnp.zeros(leaf.shape, jnp.float32)
    return jnp.array(leaf, jnp.float32)


def _run_like(config: Any, other: Any) -> Any:
    """A network's config with the run-time choices of another: what is recomputed, the dtype, the attention kernel."""
    chosen = {name: getattr(other, name) for name in ("remat", "compute_dtype", "attention")}
    return dataclasses.replace(config, **chosen)


@dataclasses.dataclass(frozen=True)
class DistillationConfig(ConditioningConfig):
    """What every distillation has.

    Attributes:
      roles: how the roles are held.
      image_weight, video_weight: of the two halves of the batch.
    """

    caption_dropout: float = 0.0
    roles: RolesConfig = dataclasses.field(default_factory=RolesConfig)
    image_weight: float = 1.0
    video_weight: float = 1.0


@dataclasses.dataclass(frozen=True, eq=False)
class Distillation:
    """A method over a frozen teacher; a subclass says which roles it trains, and their losses on a part of a batch.

    Attributes:
      config: the subclass's `Config`.
      backbone: the roles' networks.
    """

    config: Any
    backbone: Backbone

    Config = DistillationConfig
    roles = (STUDENT,)
    cadence: ClassVar[Mapping[str, int]] = {}

    @classmethod
    def build(cls, config: Any, parts: Parts) -> Any:
        """The method over an experiment's teacher."""
        return cls(config, Backbone.create(config.roles, parts, parts.conditioner(config)))

    @property
    def frozen(self) -> Mapping[str, Params]:
        """The teacher."""
        return {TEACHER: self.backbone.frozen}

    def init(self, key: jax.Array) -> dict[str, Params]:
        """All roles start as the teacher."""
        return {
            role: self.backbone.init(role, k) for role, k in zip(self.roles, jax.random.split(key, len(self.roles)))
        }

    def components(self, params: Mapping[str, Params]) -> dict[str, tuple[str, Any, Params]]:
        """The student's folders."""
        return self.backbone.components(params)

    def sampling(self) -> dict[str, Any]:
        """The sampling settings that the student is trained for: by default those of its few steps."""
        return self.config.walk.sampling()

    def losses(
        self, params: Mapping[str, Params], batch: Batch, key: jax.Array, step: jax.Array
    ) -> tuple[dict[str, jax.Array], Metrics]:
        """Losses summed over the parts of the batch, "image" and "video"; metrics by role and part."""
        del step
        losses: dict[str, jax.Array] = dict.fromkeys(self.roles, jnp.zeros(()))
        metrics: Metrics = {}
        for number, part in enumerate(("image", "video")):
            if part in batch:
                own, found = self.part(params, part, batch[part], jax.random.fold_in(key, number))
                weight = getattr(self.config, f"{part}_weight")
                losses = {role: losses[role] + weight * own[role] for role in self.roles}
                metrics |= {f"{role}/{part}_{name}": value for (role, name), value in found.items()}
        return losses, metrics

    def part(
        self, params: Mapping[str, Params], part: str, record: Record, key: jax.Array
    ) -> tuple[dict[str, jax.Array], dict[tuple[str, str], jax.Array]]:
        """Losses {role: scalar} and metrics {(role, name): scalar} on one part of a batch."""
        raise NotImplementedError


def memory_table(backbone: Backbone, roles: tuple[str, ...], *, shards: int = 1) -> str:
    """What each role takes, parameters, gradients, moments and average apart, in GiB, split over `shards` devices.

    Roles are those on the backbone; the layouts not chosen are shown beside, for comparison.
    """
    sizes = {
        "full": _bytes(backbone.network.abstract_params, np.float32),
        "adapter": _bytes(_adapter_shapes(backbone), np.float32),
    }
    lines = [f"{'role':<10}{'layout':<10}{'parameters':>12}{'gradients':>12}{'moments':>12}{'average':>12}{'GiB':>10}"]
    held = _bytes(backbone.frozen_network.abstract_params, np.dtype(jnp.dtype(backbone.config.teacher_dtype))) / shards
    lines.append(_row("teacher", "frozen", [held, 0, 0, 0]))
    total = held
    for role in roles:
        for layout in ("adapter", "full"):
            one = sizes[layout] / shards
            parts = [one, one, MOMENTS * one, one if role == STUDENT else 0]
            chosen = layout == backbone.layout(role)
            lines.append(_row(role, layout if chosen else f"({layout})", parts))
            total += sum(parts) if chosen else 0
    return "\n".join([*lines, f"in all, without activations: {total / 2**30:.2f} GiB on each of {shards} devices"])


def _adapter_shapes(backbone: Backbone) -> Params:
    return jax.eval_shape(lambda key: lora.fresh(backbone.adapted, key), jax.random.key(0))


def _bytes(tree: Any, dtype: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree)) * np.dtype(dtype).itemsize


def _row(role: str, layout: str, parts: list[float]) -> str:
    cells = "".join(f"{part / 2**30:>12.2f}" for part in parts)
    return f"{role:<10}{layout:<10}{cells}{sum(parts) / 2**30:>10.2f}"
