"""What a run on the devices at hand will take, told before it is started: memory, programs, time and disk.

Nothing is read but configs and one record of each size, and nothing is written. Parameters are counted by their
shapes, what a program needs besides is the compiler's own account of it, and it is compiled only where the parameters
fit. On a CPU this process counts too, which by then has compiled what the run compiles. Time is the operations of all
that is run over the rate at which the devices multiply matrices, measured for a moment: at best, and at worst `SLOWER`
times as long. Compiling, reading and writing come on top.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from magic141_jax import flops, sharding
from magic141_jax.aot import dry, here
from magic141_jax.aot.program import memory_account, struct
from magic141_jax.convert.memory import gigabytes
from magic141_jax.data.sources import Source
from magic141_jax.errors import UserError
from magic141_jax.experiment import RULES, Experiment, record_shape
from magic141_jax.pipelines.components import default_dtype
from magic141_jax.pipelines.long_video import stream_video
from magic141_jax.train import streams
from magic141_jax.train.method import active_roles
from magic141_jax.train.step import jit_step

SLOWER = 6  # than matrix products alone: the slowest of what was measured (docs/performance.md)
VIDEO_BYTES = 0.5  # a pixel of a frame, at most, in a file
TILE = 256  # pixels
MAX_SPLIT = 1024


@dataclasses.dataclass
class Report:
    """What a run takes.

    Attributes:
      devices: over which it runs.
      held: {what: bytes of it on each device} all the time.
      temporaries: bytes on each device beside these, at the most; None where it isn't known.
      free: bytes free on each device; None where that isn't known.
      programs: how many are compiled.
      operations: of the whole run.
      rate: operations a second, measured.
      disk, place: bytes that are written, and the folder where.
      remedies: what would make it fit.
      notes: what else is to be said.
    """

    devices: Sequence[jax.Device]
    held: Mapping[str, int]
    temporaries: int | None
    free: int | None
    programs: int
    operations: float
    rate: float
    disk: int
    place: Path
    remedies: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)

    @property
    def needed(self) -> int:
        """Bytes on each device."""
        return sum(self.held.values()) + (self.temporaries or 0)

    @property
    def disk_free(self) -> int:
        """Bytes free where it is written."""
        place = self.place.absolute()
        while not place.exists():
            place = place.parent
        return shutil.disk_usage(place).free

    @property
    def fits(self) -> bool:
        """Whether memory and disk are enough, as far as they are known."""
        return (self.free is None or self.needed <= self.free) and self.disk <= self.disk_free

    def text(self) -> str:
        """Lines for people; the last says whether it fits."""
        device = self.devices[0]
        rows = [*self.held.items(), ("temporaries", self.temporaries), ("in all", self.needed), ("free", self.free)]
        lines = [f"memory on each of {len(self.devices)} {device.device_kind}"]
        lines += [f"  {name:<28}{'unknown' if size is None else gigabytes(size):>12}" for name, size in rows]
        seconds = self.operations / self.rate
        lines += [
            f"programs to compile             {self.programs:>10}",
            f"time, once they are compiled    {_duration(seconds)} to {_duration(SLOWER * seconds)} "
            f"({self.operations:.2g} operations, {self.rate:.2g} a second)",
            f"disk                            {gigabytes(self.disk):>10} of {gigabytes(self.disk_free)} free",
            *self.notes,
        ]
        return "\n".join([*lines, self._verdict()])

    def _verdict(self) -> str:
        if self.fits:
            return "it fits" if self.free is not None else "whether it fits is not known: the device does not say"
        if self.disk > self.disk_free:
            return f"it does not fit: the disk of {self.place} has too little room; free some, or write elsewhere"
        mend = f"; it would with {', or '.join(self.remedies)}" if self.remedies else "; a larger machine is needed"
        return f"it does not fit{mend}"


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.2g} s"


def sampling(
    loading: Mapping[str, Any], prompt: str, told: Mapping[str, Any], *, videos: int, pixels: int, place: Path
) -> Report:
    """What making videos takes.

    Args:
      loading: keywords of `dry.pipeline`.
      prompt: one.
      told: keywords of `stream_video`.
      videos: how many.
      pixels: of all frames that are written.
      place: the folder that they are written to.
    """
    mesh = loading.get("mesh")
    devices = list(mesh.devices.flat) if mesh is not None else jax.local_devices()[:1]
    free = here.free_memory(devices)
    book, held, temporaries = _walk(loading, prompt, told, free)
    dtype = jnp.dtype(loading.get("dtype") or default_dtype())
    report = Report(
        devices=devices,
        held=held | _process(devices),
        temporaries=temporaries,
        free=free,
        programs=len(book.programs),
        operations=book.operations * videos,
        rate=here.matmul_rate(devices, dtype),
        disk=round(pixels * VIDEO_BYTES),
        place=place,
    )
    if temporaries is None:
        report.notes.append("the parameters alone are too many: what programs need besides was not looked at")
    if not report.fits and report.needed > (free or 0):
        report.remedies = list(_sampling_remedies(loading, prompt, told, free))
    return report


def _process(devices: Sequence[jax.Device]) -> dict[str, int]:
    """This process among what is held, where it counts."""
    size = here.process_memory(devices)
    return {"the process and its compiler": size} if size else {}


def _walk(
    loading: Mapping[str, Any], prompt: str, told: Mapping[str, Any], free: int | None
) -> tuple[dry.Book, dict[str, int], int | None]:
    """The book of a walk, what is held at the most, and what programs need besides, where that fits."""
    book = dry.Book()
    for _ in stream_video(dry.pipeline(book, **loading), prompt, **told):
        pass
    held = book.held
    return book, held, book.temporaries() if free is None or sum(held.values()) <= free else None


def _sampling_remedies(loading: Mapping[str, Any], prompt: str, told: Mapping[str, Any], free: int) -> Iterator[str]:
    """The flags of sample.py with which it fits: the first that does of what is tried, from the cheapest."""
    smaller = {"--vae_tiles 256": {"vae_tiles": TILE}, "--offload": {"offload": True}}
    if loading.get("dtype") != "bfloat16":
        smaller["--dtype bfloat16"] = {"dtype": "bfloat16"}
    count = len(jax.devices())
    if loading.get("mesh") is None and count > 1 and jax.default_backend() != "cpu":
        mesh = sharding.make_mesh(sharding.MeshConfig(data=1, fsdp=count))
        smaller[f"--mesh fsdp={count}"] = {"mesh": mesh}
    smaller = {flag: change for flag, change in smaller.items() if not all(loading.get(k) for k in change)}
    for size in range(1, len(smaller) + 1):
        for flags in itertools.combinations(smaller, size):
            changed = {**loading, **{k: v for flag in flags for k, v in smaller[flag].items()}}
            _, held, temporaries = _walk(changed, prompt, told, free)
            needed = sum(held.values()) + (temporaries or 0) + here.process_memory(jax.local_devices()[:1])
            if temporaries is not None and needed <= free:
                yield " ".join(flags)
                return


def training(values: Mapping[str, Any], workdir: Path) -> Report:
    """What the run of a config takes; clips that are not prepared yet are stood in for by random ones.

    Raises:
      UserError: what `Experiment.from_config` refuses.
    """
    values, notes = _with_data(values)
    experiment = Experiment.from_config(values, workdir, abstract=True)
    config, devices = experiment.config, list(experiment.mesh.devices.flat)
    state, frozen = experiment.abstract_state, _frozen(experiment)
    batches = list(_batches(experiment))
    held = {f"{role}, frozen": _bytes(tree) for role, tree in frozen.items()}
    for role in state.params:
        held[f"{role}, parameters"] = _bytes(state.params[role]) + _bytes(state.ema.get(role, {}))
        held[f"{role}, moments"] = _bytes(state.opt_state[role])
    free = here.free_memory(devices)
    largest = max(batches, key=_bytes)
    held["batch"] = 2 * _bytes(largest)  # the next one comes while one is worked on
    period = math.lcm(*(experiment.method.cadence.get(role, 1) for role in experiment.method.roles))
    turns = [active_roles(experiment.method, number) for number in range(period)]
    step = jit_step(
        experiment.method, experiment.optimizers, accumulate=config.train.accumulate, layout=experiment.layout
    )
    traced = {roles: step.trace(state, largest, frozen, active=roles) for roles in dict.fromkeys(turns)}
    operations = {roles: flops.count(each.jaxpr) for roles, each in traced.items()}
    temporaries = None
    if free is None or sum(held.values()) <= free:
        account = memory_account(traced[turns[0]].lower().compile().memory_analysis())
        temporaries = max(account["total"] - account["arguments"], 0)
    else:
        notes.append("what is held alone is too much: what a step needs besides was not looked at")
    whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    weights = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.params))
    report = Report(
        devices=devices,
        held=held | _process(devices),
        temporaries=temporaries,
        free=free,
        programs=len(traced) * len(batches) + 1,  # and the one that draws the first state
        operations=sum(operations[roles] for roles in turns) / period * config.train.steps,
        rate=here.matmul_rate(devices, _compute_dtype(experiment)),
        disk=(config.train.keep + 1) * whole + weights,  # a checkpoint is written before one is deleted
        place=workdir,
        notes=notes,
    )
    if config.train.sample_every or config.watch.every:
        report.notes.append("samples and the watch's looks come on top: programs, time and memory of their own")
    if free is not None and report.needed > free:
        report.remedies = list(_training_remedies(report, experiment, free))
    return report


def _with_data(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The config with data that are there, and what is to be said of that."""
    data = dict(values["data"])
    path = data.get("path", "")
    if path in ("", streams.EMOJI, streams.RANDOM) or (Path(path) / "metadata.json").is_file():
        return dict(values), []
    if not Path(path).exists():
        raise UserError(f"no data at {path} (config.data.path)")
    data["path"] = streams.RANDOM if data.get("encoders") else streams.EMOJI
    note = f"{path} is prepared when the run starts, which takes time and disk of its own; sizes are the config's"
    return {**values, "data": data}, [note]


def _batches(experiment: Experiment) -> Iterator[dict[str, Any]]:
    """A batch by its shapes for each combination of the sizes that images and videos have."""
    data, split = experiment.config.data, sharding.batch_sharding(experiment.mesh)
    parts: dict[str, list[dict[str, Any]]] = {}

    def records(sources: Sequence[Source], transform: Callable[..., Any] | None) -> list[dict[str, Any]]:
        samples = [source[0] for source in sources]
        return [sample if transform is None else transform(sample, None) for sample in samples]

    shape = record_shape(experiment.config)
    if data.image_batch:
        parts["image"] = records(*streams.image_sources(data, shape))
    if data.video_batch:
        parts["video"] = records(streams.video_sources(data, shape), None)
    sizes = {"image": data.image_batch, "video": data.video_batch}
    for combination in itertools.product(*parts.values()):
        batch = streams.arrays(dict(zip(parts, combination, strict=True)))
        yield {
            part: {name: struct(x, split, (sizes[part], *x.shape)) for name, x in record.items()}
            for part, record in batch.items()
        }


def _frozen(experiment: Experiment) -> dict[str, Any]:
    frozen = dict(experiment.method.frozen)
    return jax.tree.map(struct, frozen, sharding.shardings(frozen, experiment.mesh, RULES))


def _bytes(tree: Any) -> int:
    return sharding.bytes_per_device(tree, jax.tree.map(lambda x: x.sharding, tree))


def _compute_dtype(experiment: Experiment) -> Any:
    return jnp.dtype(experiment.config.model.get("compute_dtype", "float32"))


def _training_remedies(report: Report, experiment: Experiment, free: int) -> Iterator[str]:
    """The flags of train.py with which it would fit.

    Of what a step needs besides, gradients stay, twice where they are summed; the rest is taken to go with the batch.
    """
    config, held = experiment.config, sum(report.held.values())
    if report.temporaries is not None:
        gradients = _bytes(experiment.abstract_state.params)
        rest, done = max(report.temporaries - gradients, 1), config.train.accumulate
        sizes = {name: getattr(config.data, name) for name in ("image_batch", "video_batch")}
        sizes = {name: size for name, size in sizes.items() if size}
        for copies in (2, 1):
            room = free - held - copies * gradients
            ways = 2 ** max(1, math.ceil(math.log2(rest / room))) if room > 0 else math.inf
            least = experiment.mesh.size * ways * done
            if any(size < least or size % least for size in sizes.values()):
                continue
            if copies == 2:
                yield f"--config.train.accumulate={done * ways}"
            else:
                yield " ".join(f"--config.data.{name}={size // ways}" for name, size in sizes.items())
        if config.model.get("remat") == "none":
            yield "--config.model.remat=full (less beside what is held, for a third more time)"
    if report.devices[0].platform != "cpu":
        count = len(report.devices) * math.ceil(report.needed / free)
        yield f"{count} devices or more, --config.mesh.fsdp={count}"
