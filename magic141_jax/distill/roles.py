"""One frozen backbone and the roles that stand on it (MagicDistillation, arXiv 2503.13319, section on LoRA roles).

    teacher   W                           frozen; with `weak` > 0 it is W + weak B_f A_f, a step toward the fake score
    student   W + B_s A_s   or its own W'
    fake      W + B_f A_f   or its own W'

A role's trained parameters are {"adapter": ...} or {"transformer": ...}. W is held once, among the frozen parameters
that every loss reads under the role name "teacher", together with the image encoder, which all roles share.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from magic141_jax.convert.lora import merge
from magic141_jax.diffusion.conditioning import Conditioning, Velocity
from magic141_jax.diffusion.guidance import guided
from magic141_jax.distill import rollout
from magic141_jax.distill.rollout import WalkConfig
from magic141_jax.errors import UserError
from magic141_jax.models import lora, seam
from magic141_jax.models.network import Network
from magic141_jax.pytree import Params, cast
from magic141_jax.shapes import Latents, Times
from magic141_jax.train.conditioner import Conditioner, ConditioningConfig, Record
from magic141_jax.train.flow_matching import STUDENT
from magic141_jax.train.method import Batch, Metrics, Parts

TEACHER, FAKE = "teacher", "fake"
# In these a student may be smaller.
PRUNED_SIZES = ("heads", "mlp_ratio", "condition_width", "double_blocks", "single_blocks")
Layout = Literal["adapter", "full"]
FeaturesFn = Callable[[Latents, Times, Conditioning], Float[Array, "k b l d"]]


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
      network: the student's transformer where it is a full one; it may be smaller than the teacher's (pruned).
      scores: the transformer of a full fake score: the teacher's sizes with the student's guidance embedding.
      frozen_network: the teacher's, which may lack the guidance embedding.
      adapted: the teacher's with adapters.
      conditioner: of records; its image encoder is the teacher's.
      frozen: {"transformer": ..., "image_encoder": ...}, to be listed as the method's frozen role "teacher".
    """

    config: RolesConfig
    network: Network
    scores: Network
    frozen_network: Network
    adapted: Network
    conditioner: Conditioner
    frozen: Params

    @classmethod
    def create(cls, config: RolesConfig, parts: Parts, conditioner: Conditioner) -> Backbone:
        """Reads the experiment's teacher.

        Raises:
          UserError: no teacher, or one of other sizes than config.model, but for those that pruning changes.
        """
        found = parts.teacher()
        teacher_config = _run_like(found["transformer"][0], parts.network.config)
        own = parts.network.config
        differing = [name for name, value in vars(teacher_config).items() if getattr(own, name) != value]
        wrong = ", ".join(name for name in differing if name not in (*PRUNED_SIZES, "guidance_embedding"))
        if wrong:
            raise UserError(f"config.model and the teacher's transformer differ in {wrong}")
        if differing and config.student == "adapter":
            raise UserError(f"roles.student must be 'full', since the student has another {', '.join(differing)}")
        if "guidance_embedding" in differing and config.fake == "adapter":
            raise UserError("a network that gains a guidance embedding needs roles.fake to be 'full'")
        frozen = {name: cast(params, jnp.dtype(config.teacher_dtype)) for name, (_, params) in found.items()}
        plain = Network.create(parts.network.build, teacher_config)
        embedded = dataclasses.replace(teacher_config, guidance_embedding=own.guidance_embedding)
        scores = Network.create(parts.network.build, embedded)
        adapted = lora.adapted(plain, config.rank, paths=config.paths)
        return cls(config, parts.network, scores, plain, adapted, conditioner, frozen)

    def layout(self, role: str) -> Layout:
        """How a trained role is held."""
        return getattr(self.config, role)

    def init(self, role: str, key: jax.Array) -> Params:
        """A trained role at its start: the teacher itself, or a fresh network of other sizes, to be read over."""
        if self.layout(role) == "adapter":
            return {"adapter": lora.fresh(self.adapted, key)}
        network = self._full(role)
        if any(getattr(network.config, name) != getattr(self.frozen_network.config, name) for name in PRUNED_SIZES):
            return {"transformer": network.init(key)}
        own = jax.tree.map(_own_copy, self.frozen["transformer"])
        if network.config.guidance_embedding and "guidance_in" not in own:
            embedder = network.init(key)["guidance_in"]
            # it adds nothing at first
            own["guidance_in"] = embedder | {"down": jax.tree.map(jnp.zeros_like, embedder["down"])}
        return {"transformer": own}

    def velocity(
        self, params: Mapping[str, Params], role: str, *, trained: bool = False, guidance: Any = None
    ) -> Velocity:
        """The velocity of a role.

        Args:
          params: of all roles, the frozen "teacher" among them; without the fake score's the teacher is the plain one.
          role: whose.
          trained: whether gradients flow into the role's parameters; without it they are constants.
          guidance: the scale for a network with a guidance embedding, or one per sample.
        """
        network, own = self._of(params, role)
        own = own if trained else jax.lax.stop_gradient(own)
        return seam.velocity_fn(network, own, guidance=self._scale(network, guidance))

    def features(self, params: Mapping[str, Params], role: str, layers: tuple[int, ...]) -> FeaturesFn:
        """The features of a role's blocks `layers` (`seam.features_fn`); its parameters are constants."""
        network, own = self._of(params, role)
        return seam.features_fn(network, jax.lax.stop_gradient(own), layers, guidance=self._scale(network))

    def conditioning(self, params: Mapping[str, Params], part: str, record: Record, key: jax.Array) -> Conditioning:
        """The conditioning of a batch's part, "image" or "video", which all roles share."""
        known_key, text_key, history_key = jax.random.split(key, 3)
        video, shape = part == "video", record["latents"].shape
        known = self.conditioner.draw_known(known_key, shape) if video else jnp.zeros(shape[0], jnp.int32)
        encoder = params[TEACHER].get("image_encoder")
        cond = self.conditioner.condition(encoder, record, text_key, known, image_tokens=video)
        return self.conditioner.noise_history(cond, history_key)

    def _scale(self, network: Network, guidance: Any = None) -> Any:
        """The scale that a network is fed: none without a guidance embedding."""
        if not network.config.guidance_embedding:
            return None
        return self.config.embedded_guidance if guidance is None else guidance

    def _of(self, params: Mapping[str, Params], role: str) -> tuple[Network, Params]:
        backbone = params[TEACHER]["transformer"]
        if role == TEACHER:
            if not self.config.weak or FAKE not in params:
                return self.frozen_network, backbone
            return self.adapted, lora.join(backbone, params[FAKE]["adapter"], self.config.weak)
        if self.layout(role) == "adapter":
            return self.adapted, lora.join(backbone, params[role]["adapter"])
        return self._full(role), params[role]["transformer"]

    def _full(self, role: str) -> Network:
        """The network of a role that is held in full."""
        return self.network if role == STUDENT else self.scores

    def components(self, params: Mapping[str, Params], role: str = STUDENT) -> dict[str, tuple[str, Any, Params]]:
        """The folders of a role: its transformer, an adapter merged in, and the teacher's image encoder."""
        own = params[role]
        transformer = own.get("transformer") or merge(self.frozen["transformer"], own["adapter"])
        made = {"transformer": ("mmdit", self._full(role).config, transformer)}
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
    chosen = {name: getattr(other, name) for name in ("remat", "compute_dtype", "attention", "ulysses")}
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
        """Every role at its start."""
        keys = jax.random.split(key, len(self.roles))
        return {role: self.init_role(role, k) for role, k in zip(self.roles, keys)}

    def init_role(self, role: str, key: jax.Array) -> Params:
        """A role at its start: the teacher itself, where the role stands on the backbone."""
        return self.backbone.init(role, key)

    def components(self, params: Mapping[str, Params]) -> dict[str, tuple[str, Any, Params]]:
        """The student's folders."""
        return self.backbone.components(params)

    @property
    def walk(self) -> WalkConfig:
        """The student's steps."""
        return self.config.walk

    @property
    def guidance(self) -> float:
        """w of the guided teacher in whose place the student stands; 1 where the method knows no guidance."""
        return getattr(self.config, "guidance", 1.0)

    def sampling(self) -> dict[str, Any]:
        """The sampling settings that the student is trained for: by default those of its few steps."""
        return self.walk.sampling()

    def student(self, params: Mapping[str, Params]) -> Velocity:
        """The student's velocity as it is sampled, with gradient."""
        return self.backbone.velocity(params, STUDENT, trained=True)

    def sampled(self, record: Record) -> Record:
        """What of a record samples are like: all of it, but where a method reads longer clips than it makes."""
        return record

    def told(self, params: Mapping[str, Params], record: Record, known: int) -> Conditioning:
        """What the student's walk to a sample is told."""
        return self.backbone.conditioner.clean(params[TEACHER].get("image_encoder"), record, known)

    def sample(
        self, params: Mapping[str, Params], record: Record, key: jax.Array, *, known: int, keep: bool = True
    ) -> Latents:
        """The student's samples like the record's latents, by its own walk from their first `known` frames."""
        record = self.sampled(record)
        cond = self.told(params, record, known)
        return rollout.generate(self.walk, self.student(params), cond, record["latents"].shape, key, keep=keep)

    def reference(
        self,
        params: Mapping[str, Params],
        record: Record,
        key: jax.Array,
        *,
        known: int,
        steps: int,
        keep: bool = True,
    ) -> Latents:
        """The guided teacher's samples by `steps` Euler steps, from the noise of `sample` with the same key.

        Only the frozen parameters are read, so a weak teacher is the plain one here.
        """
        frozen, conditioner, record = {TEACHER: params[TEACHER]}, self.backbone.conditioner, self.sampled(record)
        cond = conditioner.clean(frozen[TEACHER].get("image_encoder"), record, known)
        teacher = guided(self.backbone.velocity(frozen, TEACHER), conditioner.negative(cond), self.guidance)
        walk = WalkConfig(steps, self.walk.shift, "euler")
        return rollout.generate(walk, teacher, cond, record["latents"].shape, key, keep=keep)

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
