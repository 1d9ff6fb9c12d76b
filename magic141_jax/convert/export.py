"""Our weights folders written as repositories that diffusers loads: the way out, tensor by tensor.

    model_index.json                     the pipeline's class and, for each component, its library and class
    scheduler/scheduler_config.json      flow matching with the folder's shift
    {transformer,vae}/                   config.json, diffusion_pytorch_model*.safetensors
    everything else                      copied; it must be in the published layout already

A component that the folder lacks is null in model_index.json; diffusers then wants it as an argument (None will do).
Values keep the dtype in which they are stored, so published -> ours -> published is equal bit for bit. The new folder
appears only when all of it is on disk.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from magic141_jax import settings, weights
from magic141_jax.convert import scheduler, tensors
from magic141_jax.convert.engine import Job, plan_out, run_out
from magic141_jax.convert.memory import require_disk
from magic141_jax.convert.repository import PUBLISHED, is_published
from magic141_jax.convert.tensors import LazyTensor
from magic141_jax.errors import UserError, nearest
from magic141_jax.models import MODELS, stored
from magic141_jax.models.network import Network
from magic141_jax.pytree import require_match, unflatten

FORMATS = ("diffusers",)
DTYPES = ("float32", "bfloat16", "float16")
DIFFUSERS_VERSION = "0.33.0"  # the first one with all the classes below
SHIFT = 7.0  # of the published scheduler

_HUNYUAN = {
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder_2": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "LlamaTokenizerFast"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "transformer": ["diffusers", "HunyuanVideoTransformer3DModel"],
    "vae": ["diffusers", "AutoencoderKLHunyuanVideo"],
}
# the pipeline's class -> its components
PIPELINES = {
    "HunyuanVideoPipeline": _HUNYUAN | {"text_encoder": ["transformers", "LlamaModel"]},
    "HunyuanVideoImageToVideoPipeline": _HUNYUAN
    | {
        "text_encoder": ["transformers", "LlavaForConditionalGeneration"],
        "image_processor": ["transformers", "CLIPImageProcessor"],
    },
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one component will be: its published config, and the jobs that make its tensors."""

    config: dict[str, Any]
    leaves: Mapping[str, LazyTensor]
    jobs: list[Job]
    abstract: dict[str, jax.ShapeDtypeStruct]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.size * np.dtype(tensor.dtype).itemsize for tensor in self.abstract.values())

    def write(self, folder: Path) -> None:
        """Writes config.json and the safetensors; one layer of one parameter is in memory at a time."""
        folder.mkdir(parents=True, exist_ok=True)
        _write_json(folder / "config.json", self.config)
        made = (pair for job in self.jobs for pair in run_out(job, self.leaves))
        tensors.write(folder, "diffusion_pytorch_model", self.abstract, made)


def export(src: Path, dst: Path, *, format: str = "diffusers", dtype: str | None = None) -> None:
    """Writes our weights folder `src`, or one component folder, as the new folder `dst`.

    Args:
      src: with model_index.json, or with the config.json of a component.
      dst: must not exist.
      format: "diffusers".
      dtype: of the floating tensors of our components; as stored unless given.

    Raises:
      UserError: `src` is missing or damaged, a network has no published layout, `dst` exists, or the disk is too full.
    """
    src, dst = Path(src), Path(dst)
    for name, value, known in (("format", format, FORMATS), ("dtype", dtype, (None, *DTYPES))):
        if value not in known:
            raise UserError(f"{name} is {value!r}.{nearest(str(value), filter(None, known))}")
    if not src.is_dir():
        raise UserError(f"no weights folder {src}")
    if dst.exists():
        raise UserError(f"{dst} exists already; remove it, or name another folder")
    if (src / "config.json").exists():
        plan = plan_component(src, dtype)
        require_disk(dst.parent, plan.nbytes, f"the export of {src}")
        with weights.new_folder(dst) as temporary:
            plan.write(temporary)
    else:
        _export_pipeline(src, dst, dtype)


def plan_component(folder: Path, dtype: str | None = None) -> Plan:
    """Plans one of our component folders; nothing but headers is read.

    Raises:
      UserError: it is damaged, doesn't fit its config, or can't be expressed in a published layout.
    """
    mapping = weights.read_config(folder / "config.json")
    kind = mapping.pop("model", None)
    if kind not in MODELS:
        raise UserError(f"{folder / 'config.json'} names the model {kind!r}.{nearest(str(kind), MODELS)}")
    if mapping.pop(stored.KEY, None):
        raise UserError(f"{folder} holds kernels in forms of our own: {stored.EXPAND}")
    config_class, module = MODELS[kind]
    config = settings.build(config_class, mapping, where=f"{folder.name}/config.json")
    name, theirs = _published_config(kind, config, folder)
    leaves = open_ours(folder)
    require_match(unflatten(leaves), Network.create(module, config).abstract_params, what=str(folder))
    jobs, made = plan_out(leaves, PUBLISHED[name].table(config))
    cast = {key: _as_dtype(made[key], dtype) for key in sorted(made)}
    return Plan({"_class_name": name, "_diffusers_version": DIFFUSERS_VERSION} | theirs, leaves, jobs, cast)


def open_ours(folder: Path) -> dict[str, LazyTensor]:
    """The parameters of one of our component folders, still on disk; int8 ones become float32 when read."""
    held = tensors.open_tensors(folder)
    leaves = {}
    for path, tensor in held.items():
        scale = held.get(path + weights.SCALE)
        if scale is not None:
            tensor = LazyTensor(tensor.shape, np.dtype(np.float32), _scaled(tensor, scale))
        if not path.endswith(weights.SCALE):
            leaves[path] = tensor
    return leaves


def _scaled(values: LazyTensor, scale: LazyTensor) -> Any:
    return lambda index: values.read(index).astype(np.float32) * scale.read(index)


def _as_dtype(leaf: jax.ShapeDtypeStruct, dtype: str | None) -> jax.ShapeDtypeStruct:
    floating = jnp.issubdtype(leaf.dtype, jnp.floating)
    return jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype)) if dtype and floating else leaf


def _published_config(kind: str, config: Any, folder: Path) -> tuple[str, dict[str, Any]]:
    """The first published class that can express our config, and its config.json."""
    reasons = []
    for name, architecture in PUBLISHED.items():
        if architecture.kind == kind and architecture.config_from_ours:
            try:
                return name, architecture.config_from_ours(config)
            except UserError as error:
                reasons.append(str(error))
    why = "; ".join(reasons) or f"no published layout holds a {kind}"
    raise UserError(f"{folder} can't be exported: {why}")


def _export_pipeline(src: Path, dst: Path, dtype: str | None) -> None:
    index = weights.read_config(src / "model_index.json")
    folders = {path.name: path for path in sorted(src.iterdir()) if path.is_dir() and not path.name.startswith(".")}
    ours = {name: path for name, path in folders.items() if _is_ours(path)}
    if "transformer" not in ours:
        raise UserError(f"{src} has no transformer of ours to export; its transformer/config.json names no model")
    plans = {name: plan_component(path, dtype) for name, path in ours.items()}
    image = plans["transformer"].config.get("image_condition_type") is not None
    pipeline = "HunyuanVideoImageToVideoPipeline" if image else "HunyuanVideoPipeline"
    strange = sorted(folders.keys() - PIPELINES[pipeline].keys())
    if strange:
        raise UserError(f"a {pipeline} has no {', '.join(strange)}; move it out of {src} to export the rest")
    copied = [path for name, path in folders.items() if name not in ours]
    size = sum(plan.nbytes for plan in plans.values())
    size += sum(file.stat().st_size for path in copied for file in path.rglob("*") if file.is_file())
    require_disk(dst.parent, size, f"the export of {src}")
    with weights.new_folder(dst) as temporary:
        for name, plan in plans.items():
            plan.write(temporary / name)
        for path in copied:
            shutil.copytree(path, temporary / path.name)
        if "scheduler" not in folders:
            (temporary / "scheduler").mkdir()
            times = scheduler.TimeShift(index.get("sampling", {}).get("shift", SHIFT))
            version = {"_diffusers_version": DIFFUSERS_VERSION}
            settings_of_times = scheduler.config_from_ours(times) | version
            _write_json(temporary / "scheduler" / "scheduler_config.json", settings_of_times)
        parts = {
            name: pair if (temporary / name).exists() else [None, None]
            for name, pair in sorted(PIPELINES[pipeline].items())
        }
        head = {"_class_name": pipeline, "_diffusers_version": DIFFUSERS_VERSION}
        _write_json(temporary / "model_index.json", head | parts)


def _is_ours(folder: Path) -> bool:
    """Whether a component is to be converted; a folder without config.json is a tokenizer or the like."""
    file = folder / "config.json"
    return file.exists() and not is_published(weights.read_config(file))


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(dict(value), indent=2) + "\n", encoding="utf-8")
