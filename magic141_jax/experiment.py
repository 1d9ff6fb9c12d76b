"""An experiment: networks + data + method + optimizer + mesh, composed from one config.

    config file -> `make_config` (every key with its default) -> overrides -> `Experiment.from_config` -> `.train(...)`

The sections are the dataclasses that stand beside what they configure; this module only puts them together. A work
folder holds config.json, checkpoints/, metrics.jsonl, tensorboard/ and, at the end, weights/.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from magic141_jax import processes, settings, sharding, weights
from magic141_jax.data import __main__ as data_cli
from magic141_jax.data import cache
from magic141_jax.distill.consistency import Consistency
from magic141_jax.distill.continuation import Continuation
from magic141_jax.distill.dmd import DMD
from magic141_jax.distill.guidance import GuidanceDistillation
from magic141_jax.distill.regression import Regression
from magic141_jax.distill.streaming import Streaming
from magic141_jax.distill.trajectory import Trajectory
from magic141_jax.errors import UserError, nearest
from magic141_jax.models import MODELS, SHARDING_RULES, lora, patch_vae, stored, whitening
from magic141_jax.models.network import Network
from magic141_jax.pipelines.components import SamplingSettings, find_folder, load_model, load_plain
from magic141_jax.pytree import Params, flatten, require_match
from magic141_jax.sparsity import pruning
from magic141_jax.train import loop, optim, preview, streams
from magic141_jax.train.autoencoding import VAE, Autoencoding
from magic141_jax.train.checkpoint import Checkpoints
from magic141_jax.train.conditioner import Conditioner, ConditioningConfig, NullText, as_float
from magic141_jax.train.flow_matching import STUDENT, FlowMatching
from magic141_jax.train.method import Method, Parts
from magic141_jax.train.metrics import MetricWriter, SilentWriter
from magic141_jax.train.state import TrainState, memory_table
from magic141_jax.train.step import make_step
from magic141_jax.train.watch import Watch, WatchConfig

NETWORKS = ("mmdit", "image_encoder", "patch_vae", "feature_heads")
RULES = (*lora.SHARDING_RULES, *(rule for name in NETWORKS for rule in SHARDING_RULES[name]))
MAY_CHANGE = (
    *("train.", "watch.", "mesh.", "data.threads", "sampling.", "components_from", "borrow", "storage"),
    *("model.attention", "model.ulysses", "model.remat"),  # how the same numbers are computed
)
STATISTICS_BATCHES = 16
PREVIEW_CLIPS = 4


@dataclasses.dataclass(frozen=True)
class ExperimentConfig:
    """The whole experiment; `model`, `image_encoder` and `method` are named mappings, the rest dataclasses.

    Attributes:
      model: {"model": name in MODELS, ...fields of its config}: what is trained.
      method: {"name": name in METHODS or "package.module:Class", ...fields of its config}.
      image_encoder: like `model`; empty trains without image tokens.
      data, optimizer, train, watch, mesh: see their classes.
      role_optimizers: {role: {field: value}} where a role differs from `optimizer`.
      pruning: of the role "student", or the first one of a method without it.
      teacher: a weights folder: the frozen networks that a distillation starts from and is measured against.
      init_from: a weights folder whose components training starts from; empty starts fresh.
      components_from: a weights folder whose other components (VAE, text encoder) the export copies.
      borrow: the export, written beside `components_from`, names it as its base in place of copying: it holds only
        components that differ.
      sampling: the export's sampling settings; empty copies those of `components_from`.
      storage: how the export stores floats: float32, bfloat16 or int8.
      seed: of parameters, data order and every draw of a step.
    """

    model: dict
    method: dict
    data: streams.DataConfig
    image_encoder: dict = dataclasses.field(default_factory=dict)
    optimizer: optim.OptimizerConfig = dataclasses.field(default_factory=optim.OptimizerConfig)
    role_optimizers: dict = dataclasses.field(default_factory=dict)
    pruning: pruning.PruningConfig = dataclasses.field(default_factory=pruning.PruningConfig)
    train: loop.TrainConfig = dataclasses.field(default_factory=loop.TrainConfig)
    watch: WatchConfig = dataclasses.field(default_factory=WatchConfig)
    mesh: sharding.MeshConfig = dataclasses.field(default_factory=sharding.MeshConfig)
    sampling: dict = dataclasses.field(default_factory=dict)
    teacher: str = ""
    init_from: str = ""
    components_from: str = ""
    borrow: bool = False
    storage: weights.Storage = "float32"
    seed: int = 0


def make_config(
    *, model: Mapping[str, Any], method: Mapping[str, Any], image_encoder: Mapping[str, Any] | None = None, **rest: Any
) -> ConfigDict:
    """A config for a file in configs/: what is given, and every other key with its default, so all can be overridden.

    Raises:
      UserError: an unknown key or name, or a wrong type.
    """
    made = settings.build(
        ExperimentConfig,
        {"model": dict(model), "method": dict(method), "image_encoder": dict(image_encoder or {}), **rest},
    )
    named = {
        "model": {"model": model.get("model"), **settings.to_dict(_model_config(made.model, "model"))},
        "method": {"name": method.get("name"), **settings.to_dict(_method_config(made.method))},
    }
    if image_encoder:
        values = settings.to_dict(_model_config(made.image_encoder, "image_encoder"))
        named["image_encoder"] = {"model": image_encoder.get("model"), **values}
    return ConfigDict({**settings.to_dict(made), **named})


def _model_config(values: Mapping[str, Any], where: str) -> Any:
    config_class, _ = _entry(MODELS, values.get("model"), f"config.{where}.model")
    return settings.build(config_class, {k: v for k, v in values.items() if k != "model"}, where=f"config.{where}")


def _method_config(values: Mapping[str, Any]) -> Any:
    config_class = _method_class(values.get("name")).Config
    return settings.build(config_class, {k: v for k, v in values.items() if k != "name"}, where="config.method")


def _entry(table: Mapping[str, Any], name: Any, where: str) -> Any:
    if name not in table:
        raise UserError(f"{where} is {name!r}.{nearest(str(name), table)}")
    return table[name]


def _network(values: Mapping[str, Any], where: str) -> Network:
    _, module = _entry(MODELS, values.get("model"), f"config.{where}.model")
    return Network.create(module, _model_config(values, where))


# Method name -> its class, see `magic141_jax.train.method`
METHODS = {
    "flow_matching": FlowMatching,
    "autoencoding": Autoencoding,
    "dmd": DMD,
    "consistency": Consistency,
    "guidance": GuidanceDistillation,
    "regression": Regression,
    "trajectory": Trajectory,
    "streaming": Streaming,
    "continuation": Continuation,
}


def _method_class(name: Any) -> Any:
    """The class of a name of `METHODS` or of "package.module:Class"."""
    if not isinstance(name, str) or ":" not in name:
        return _entry(METHODS, name, "config.method.name")
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except ImportError as error:
        raise UserError(f"config.method.name is {name!r}, and {module} can't be imported: {error}") from None
    if not (hasattr(found, "Config") and hasattr(found, "build")):
        raise UserError(f"config.method.name is {name!r}, which is no class with Config and build (train/method.py)")
    return found


def _build_method(config: ExperimentConfig, mesh: jax.sharding.Mesh, *, abstract: bool = False) -> Method:
    settings_of_method = _method_config(config.method)
    roles = getattr(settings_of_method, "roles", None)
    teacher = functools.partial(_teacher, config, mesh, dtype=getattr(roles, "teacher_dtype", "float32"))
    parts = Parts(
        network=_network(config.model, "model"),
        model_name=config.model["model"],
        conditioner=functools.partial(_conditioner, config),
        teacher=functools.partial(_teacher_shapes, config) if abstract else teacher,
        raw_records=functools.partial(_require_raw, config),
        vae=functools.partial(_vae, config, mesh),
    )
    try:
        return _method_class(config.method.get("name")).build(settings_of_method, parts)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"config.method: {error}") from None


def _conditioner(config: ExperimentConfig, drawn: ConditioningConfig) -> Conditioner:
    encoder = _network(config.image_encoder, "image_encoder") if config.image_encoder else None
    image_rows = streams.image_tokens(config.data)
    if image_rows and drawn.known_frames[0]:
        raise UserError(
            f"the text states of {config.data.path} were read with the first frame, so there is no text to video: "
            "set config.method.known_frames to (0, ...)"
        )
    windows = getattr(drawn, "windows", 1)
    if config.data.video_batch:
        streams.require_windows(config.data, windows)
    null = {name: jnp.asarray(value) for name, value in streams.null_text(config.data, record_shape(config)).items()}
    return Conditioner(drawn, encoder, NullText(**null), image_rows)


def _vae(config: ExperimentConfig, mesh: jax.sharding.Mesh) -> tuple[Network, Params]:
    """The autoencoder of config.components_from."""
    if not config.components_from:
        raise UserError("this method decodes what it makes: set --config.components_from to weights with a VAE")
    return load_model(weights.part(find_folder(config.components_from), "vae"), mesh=mesh)


def _require_raw(config: ExperimentConfig) -> None:
    if config.data.path not in (streams.EMOJI, streams.RANDOM):
        streams.open_cache(config.data.path, "raw")


def _teacher(config: ExperimentConfig, mesh: jax.sharding.Mesh, *, dtype: str) -> dict[str, tuple[Any, Params]]:
    """The transformer and, if there is one, the image encoder of config.teacher: {name: (config, parameters)}.

    A published folder's tensors are read one by one onto the mesh, so the whole never has to fit one device or the
    host. It has no image encoder beside: what its transformer sees of the image is part of the cached text states.
    """
    if not config.teacher:
        raise UserError("this method distils a teacher: set --config.teacher to a weights folder")
    folder = find_folder(config.teacher)
    found = {}
    for name in ("transformer", "image_encoder"):
        part = weights.part(folder, name)
        if part.is_dir():
            overrides = {"compute_dtype": dtype} if name == "transformer" else {}
            model = load_plain(part, overrides=overrides, mesh=mesh)
            found[name] = (model.network.config, model.params)
    if "transformer" not in found:
        raise UserError(f"{config.teacher} has no transformer (config.teacher)")
    return found


def _teacher_shapes(config: ExperimentConfig) -> dict[str, tuple[Any, Params]]:
    """A teacher such as the experiment wants, its parameters as shape structs: nothing is read."""
    networks = {"transformer": _network(config.model, "model")}
    if config.image_encoder:
        networks["image_encoder"] = _network(config.image_encoder, "image_encoder")
    return {name: (network.config, network.abstract_params) for name, network in networks.items()}


def _fit_vae(params: dict[str, Params], record: Mapping[str, jax.Array]) -> dict[str, Params]:
    return params | {VAE: patch_vae.fit_shortcut(params[VAE], 2 * as_float(record["frames"]) - 1)}


def _fit_transformer(params: dict[str, Params], record: Mapping[str, jax.Array]) -> dict[str, Params]:
    student = params[STUDENT]
    fitted = whitening.fit_text(student["transformer"], record["text"], record["text_mask"], record["pooled"])
    return params | {STUDENT: student | {"transformer": fitted}}


# Networks whose training starts from a fit to the first records of the run: (parameters, record) -> parameters
DATA_STARTS = {"patch_vae": _fit_vae, "mmdit": _fit_transformer}


def record_shape(config: ExperimentConfig) -> streams.RecordShape:
    """The sizes that the model wants of a latent record."""
    model = _model_config(config.model, "model")
    if not hasattr(model, "text_width"):
        return streams.RecordShape()
    windows = config.method.get("windows", 1)
    return streams.RecordShape(model.out_channels, model.text_width, model.pooled_width, windows)


@dataclasses.dataclass(frozen=True, eq=False)
class Experiment:
    """A config with what it stands for, ready to train or to export."""

    config: ExperimentConfig
    workdir: Path
    method: Method
    optimizers: dict[str, optim.Optimizer]
    mesh: jax.sharding.Mesh

    @classmethod
    def from_config(
        cls,
        values: Mapping[str, Any] | ConfigDict,
        workdir: Path,
        *,
        devices: Sequence[jax.Device] | None = None,
        abstract: bool = False,
    ) -> Experiment:
        """Builds and checks everything; a folder of clips is prepared here, into `workdir`/data.

        Args:
          values: the config, see `make_config`.
          workdir: the run's folder; nothing is written before `train`, but for prepared clips.
          devices: of the mesh; all of them unless said.
          abstract: the teacher is not read and only its shapes are known: enough to compile, not to train.

        Raises:
          UserError: a bad key, type, size or path.
        """
        values = values.to_dict() if isinstance(values, ConfigDict) else values
        config = settings.build(ExperimentConfig, values)
        config = dataclasses.replace(config, data=prepared(config.data, Path(workdir)))
        mesh = sharding.make_mesh(config.mesh, devices=devices)
        for size in (config.data.image_batch, config.data.video_batch):
            if size:
                sharding.require_split(size, mesh)
        if config.sampling:
            settings.build(SamplingSettings, config.sampling, where="config.sampling")
        method = _build_method(config, mesh, abstract=abstract)
        optimizers, sparse = {}, STUDENT if STUDENT in method.roles else method.roles[0]
        for role in method.roles:
            own = {**settings.to_dict(config.optimizer), **config.role_optimizers.get(role, {})}
            own = settings.build(optim.OptimizerConfig, own, where=f"config.role_optimizers.{role}")
            updates = config.train.steps // method.cadence.get(role, 1)
            optimizers[role] = optim.make(own, updates)
            if role == sparse and config.pruning.active:
                shapes = jax.eval_shape(method.init, jax.random.key(0))[role]
                optimizers[role] = pruning.sparse(optimizers[role], config.pruning, shapes, updates=updates)
        return cls(config, Path(workdir), method, optimizers, mesh)

    @functools.cached_property
    def abstract_state(self) -> TrainState:
        """The training state's shapes, with their shardings."""
        key = jax.random.key(self.config.seed)
        abstract = jax.eval_shape(lambda: self._state(self.method.init(key)))
        placed = sharding.shardings(abstract, self.mesh, RULES)
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, placed)

    @property
    def layout(self) -> TrainState:
        """The shardings of the training state."""
        return jax.tree.map(lambda x: x.sharding, self.abstract_state)

    def initial_state(self) -> TrainState:
        """The state before the first step, laid over the mesh.

        Parameters are those of `init_from` where it is given, else fresh ones, fitted to the data where the network
        has such a start.
        """
        key = jax.random.key(self.config.seed)
        fit = DATA_STARTS.get(self.config.model["model"])
        count = getattr(self.method.config, "init_records", 0)
        if self.config.init_from:
            with sharding.on_host():
                params = self._loaded_params()
        elif fit is not None and count:
            params = fit(self.method.init(key), self._records(count))
        elif self.method.frozen:
            # Not under jit, where a teacher's parameters would be constants, which are copied to every device.
            params = self.method.init(key)
        else:
            return jax.jit(lambda: self._state(self.method.init(key)), out_shardings=self.layout)()
        return jax.jit(self._state, out_shardings=self.layout)(sharding.place(params, self.layout.params))

    def memory(self) -> str:
        """What the roles take on each device, see `train.state.memory_table`."""
        return memory_table(self.abstract_state, self.method.frozen)

    def batches(self) -> Any:
        """The run's batches of host arrays, the rows of this process."""
        return self._batches(self.mesh)

    def train(self, *, progress: bool = True) -> loop.Result:
        """Trains to the end or to a stop signal, from the last checkpoint of the work folder if there is one."""
        config = self.config
        watch = self._watch()
        processes.once(self._remember_config)
        step = make_step(self.method, self.optimizers, accumulate=config.train.accumulate, layout=self.layout)
        checkpoints = Checkpoints(self.workdir / "checkpoints", keep=config.train.keep)
        writer = SilentWriter()
        if processes.leads():
            writer = MetricWriter(self.workdir, steps=config.train.steps, progress=progress)
        try:
            return loop.fit(
                step,
                self.initial_state() if checkpoints.latest is None else self.abstract_state,
                self.batches(),
                config=config.train,
                checkpoints=checkpoints,
                writer=writer,
                place=lambda batch: sharding.shard_batch(streams.arrays(batch), self.mesh),
                callback=self._preview(writer),
                watch=watch,
            )
        finally:
            writer.close()
            checkpoints.close()

    def restore(self) -> TrainState:
        """The state of the last checkpoint; raises `UserError` where there is none."""
        folder = self.workdir / "checkpoints"
        if not folder.is_dir():
            raise UserError(f"no checkpoint in {self.workdir}; train first")
        checkpoints = Checkpoints(folder, keep=self.config.train.keep)
        try:
            restored = checkpoints.restore(self.abstract_state, None)
        finally:
            checkpoints.close()
        if restored is None:
            raise UserError(f"no checkpoint in {self.workdir}; train first")
        return restored[0]

    def export(self, state: TrainState, folder: Path) -> None:
        """Writes the averaged weights as component folders, and completes them from `components_from`.

        Raises:
          UserError: the export is to borrow from a folder that is not beside it.
        """
        folder, borrow = Path(folder), self.config.borrow
        base = Path(self.config.components_from) if self.config.components_from else None
        if borrow and (base is None or base.resolve().parent != folder.resolve().parent):
            raise UserError(f"config.borrow needs components_from, beside {folder}; it is {str(base or '')!r}")
        for name, (model, config, params) in self.method.components(state.averaged()).items():
            if name == VAE:
                config = self._with_statistics(config, params)
            fields = {"model": model, **settings.to_dict(config)}
            own = sharding.to_host(params, keep=processes.leads())
            lent = base / name if borrow else None
            processes.once(functools.partial(self._write, folder / name, fields, own, lent=lent))
        processes.once(functools.partial(self._complete, folder, base))

    def _write(self, target: Path, fields: dict[str, Any], params: Params, *, lent: Path | None) -> None:
        """Writes a component folder, unless the base lends just these parameters."""
        if lent is None or not _holds(lent, params):
            weights.save(target, fields, params, storage=self.config.storage)

    def _complete(self, folder: Path, base: Path | None) -> None:
        """Adds what an export has from `base`: other components, sampling settings."""
        borrow = self.config.borrow
        folder.mkdir(parents=True, exist_ok=True)
        index = {"base": base.name} if borrow and base is not None else {}
        if base is not None and not borrow:
            new = (folder / "transformer").exists()
            for name in weights.COMPONENTS:
                given = weights.part(base, name)
                if name == "continuation" and new:  # it is of the base's transformer
                    continue
                if given.is_dir() and not (folder / name).exists():
                    shutil.copytree(given, folder / name)
        sampling = dict(self.config.sampling)
        if not sampling and base is not None and (base / "model_index.json").exists():
            sampling = weights.read_config(base / "model_index.json")["sampling"]
        if sampling:
            # a distilled student is sampled as it was trained to be
            index |= {"sampling": sampling | getattr(self.method, "sampling", dict)()}
            weights.write_config(folder / "model_index.json", index)

    def _state(self, params: dict[str, Params]) -> TrainState:
        return TrainState.create(params, self.optimizers, seed=self.config.seed)

    def _watch(self) -> Watch | None:
        """The watch that looks at the first records of the run; None if it never looks."""
        config = self.config.watch
        if not config.every:
            return None
        record = {k: np.repeat(v, config.seeds, axis=0) for k, v in self._records(config.prompts).items()}
        key = jax.random.key(self.config.seed)
        return Watch.of(config, self.method, sharding.spread(record, self.mesh), key=key)

    def _preview(self, writer: MetricWriter) -> Any:
        """The loop's callback that shows sample videos; None if none are asked for or no VAE is there to decode."""
        config = self.config
        if not config.train.sample_every or not config.data.video_batch:
            return None
        record = sharding.spread(self._records(PREVIEW_CLIPS), self.mesh)
        if isinstance(self.method, Autoencoding):
            draw = preview.reconstruction(self.method)
        elif not hasattr(self.method, "sample"):
            logging.warning("train.sample_every is set, but the method can't draw samples")
            return None
        elif config.components_from and (Path(config.components_from) / "vae").is_dir():
            draw = preview.generation(self.method, *_vae(config, self.mesh), seed=config.seed)
        else:
            logging.warning("train.sample_every is set, but components_from has no VAE to decode samples with")
            return None

        def callback(state: TrainState, step: int) -> None:
            shown = sharding.to_host(draw(state.averaged(), record))
            writer.video(step, "samples", shown, round(config.data.fps))

        return callback

    def _records(self, count: int) -> dict[str, jax.Array]:
        """The first `count` records of the run's videos (of its images if it has none), the same in all processes."""
        part = "video" if self.config.data.video_batch else "image"
        batches, found = self._batches(None), []
        while sum(len(next(iter(record.values()))) for record in found) < count:
            found.append(streams.arrays(next(batches))[part])
        return {name: jnp.asarray(np.concatenate([r[name] for r in found])[:count]) for name in found[0]}

    def _batches(self, mesh: jax.sharding.Mesh | None) -> Any:
        shape = record_shape(self.config)
        return streams.make_batches(self.config.data, seed=self.config.seed, shape=shape, mesh=mesh)

    def _loaded_params(self) -> dict[str, Params]:
        """Fresh parameters with the components that `init_from` has put in their places."""
        folder = Path(self.config.init_from)
        if not folder.is_dir():
            raise UserError(f"no weights folder {folder} (config.init_from)")
        fresh = self.method.init(jax.random.key(self.config.seed))
        found = 0
        for name, (_, _, params) in self.method.components(fresh).items():
            if (folder / name).is_dir():
                own, loaded = weights.load(folder / name)
                loaded = load_plain(folder / name).params if stored.KEY in own else loaded
                require_match(loaded, params, what=str(folder / name))
                # `params` is the very dict inside `fresh`, so filling it in place fills the role.
                _fill(params, loaded)
                found += 1
        if not found:
            raise UserError(f"{folder} has none of {', '.join(self.method.components(fresh))} (config.init_from)")
        return fresh

    def _with_statistics(self, config: Any, params: Params) -> Any:
        """The VAE's config with the means and the deviation of its latents on the data: diffusion sees unit size.

        An encoder that is not trained keeps the statistics that came with it.
        """
        if self.config.init_from and not self.method.config.train_encoder:
            given = weights.read_config(Path(self.config.init_from) / "vae" / "config.json")
            return dataclasses.replace(config, **{k: tuple(given[k]) for k in ("latent_mean", "latent_std")})
        network = Network.create(MODELS[self.config.model["model"]][1], config)
        encode = jax.jit(lambda p, frames: network(p, 2 * as_float(frames) - 1, method="encode")[0])
        batches, sums = self.batches(), []
        for _ in range(STATISTICS_BATCHES):
            for record in sharding.shard_batch(streams.arrays(next(batches)), self.mesh).values():
                mean = sharding.to_host(encode(params, record["frames"]))
                mean = np.asarray(mean, np.float64).reshape(-1, config.latent_channels)
                sums.append((mean.sum(0), (mean**2).sum(0), len(mean)))
        total, square, count = (sum(parts) for parts in zip(*sums, strict=True))
        mean = total / count
        # One deviation for all channels: fine detail stays quieter than the picture, as the VAE made it.
        std = np.sqrt(np.maximum(square / count - mean**2, 1e-12).mean(keepdims=True))
        rounded = {"latent_mean": mean, "latent_std": std}
        return dataclasses.replace(config, **{k: tuple(round(float(x), 6) for x in v) for k, v in rounded.items()})

    def _remember_config(self) -> None:
        """Writes config.json; on resuming, refuses what can't go on and names what is different."""
        path = self.workdir / "config.json"
        now = settings.to_dict(self.config)
        if path.exists():
            before, after = flatten(weights.read_json(path)), flatten(json.loads(json.dumps(now)))
            keys = [k for k in sorted({*before, *after}) if before.get(k) != after.get(k)]
            keys = [k for k in keys if not k.startswith(MAY_CHANGE)]
            lines = [f"{k} was {before.get(k)!r} and is {after.get(k)!r}" for k in keys]
            fatal = [
                x for k, x in zip(keys, lines, strict=True) if k.startswith(("model.", "image_encoder.", "method.name"))
            ]
            if fatal and (self.workdir / "checkpoints").is_dir():
                raise UserError(f"{path} is of another network: {'; '.join(fatal[:4])}; use another --workdir")
            if lines:
                logging.warning("resuming with another config: %s", "; ".join(lines))
        self.workdir.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(now, indent=2) + "\n")
        temporary.replace(path)


def prepared(data: streams.DataConfig, workdir: Path) -> streams.DataConfig:
    """The data config with clips that are not prepared yet prepared into `workdir`/data (once).

    Raises:
      UserError: no clips there, or `workdir`/data was prepared from others.
    """
    path = Path(data.path)
    if data.path in ("", streams.EMOJI, streams.RANDOM) or (path / "metadata.json").is_file():
        return data
    if not path.exists():
        raise UserError(f"no data at {path} (config.data.path)")
    target = workdir / "data"
    if (target / "metadata.json").is_file():
        cache.require_source(target, path)
    arguments = ["prepare", str(path), str(target), "--size", f"{data.height}x{data.width}"]
    arguments += ["--num_frames", str(data.num_frames), "--fps", str(data.fps)]
    arguments += ["--weights", data.encoders] if data.encoders else []
    processes.once(lambda: (target / "metadata.json").is_file() or data_cli.main(arguments))
    return dataclasses.replace(data, path=str(target))


def _holds(component: Path, params: Params) -> bool:
    """Whether a component folder holds just these parameters."""
    if not component.is_dir():
        return False
    held, own = flatten(weights.load(component)[1]), flatten(params)
    return held.keys() == own.keys() and all(np.array_equal(held[name], own[name]) for name in own)


def _fill(params: Params, values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, Mapping):
            _fill(params[key], value)
        else:
            params[key] = jnp.asarray(value, params[key].dtype)
