"""Component folders of published repositories: config.json and safetensors -> our network with its parameters.

    folder/config.json                                 "_class_name" (diffusers) or "architectures" (transformers)
    folder/{diffusion_pytorch_model,model}.safetensors  or shards with <stem>.safetensors.index.json

`PUBLISHED` is what we know. Names and shapes are compared before any data is read, memory is checked before any is
taken, and the parameters go onto their devices layer by layer.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import Mesh

from magic141_jax import settings, sharding, weights
from magic141_jax.convert import (
    bert,
    clip,
    flux_dit,
    hunyuan_dit,
    hunyuan_original,
    hunyuan_vae,
    kl_vae,
    llama,
    llava,
    t5,
)
from magic141_jax.convert.engine import OnDevices, Table, plan_in, to_ours
from magic141_jax.convert.memory import layout, require_memory
from magic141_jax.convert.tensors import LazyTensor, open_tensors
from magic141_jax.errors import UserError, nearest
from magic141_jax.models import MODELS, SHARDING_RULES
from magic141_jax.models.network import Network
from magic141_jax.models.resident import Held, Lend, Source, at_once
from magic141_jax.pytree import Params, flatten


class Architecture(NamedTuple):
    """How one published class is read and written.

    kind: our name of the network, a key of `MODELS`.
    config_to_ours: (their config.json, **overrides) -> our config dataclass.
    table: our config -> the rules between their names and ours.
    config_from_ours: our config -> their config.json; None where there is no way back.
    """

    kind: str
    config_to_ours: Callable[..., Any]
    table: Callable[[Any], Table]
    config_from_ours: Callable[[Any], dict[str, Any]] | None = None


PUBLISHED: dict[str, Architecture] = {
    hunyuan_dit.CLASS_NAME: Architecture(
        "mmdit", hunyuan_dit.config_to_ours, hunyuan_dit.table, hunyuan_dit.config_from_ours
    ),
    hunyuan_original.CLASS_NAME: Architecture("mmdit", hunyuan_original.config_to_ours, hunyuan_original.table),
    hunyuan_vae.CLASS_NAME: Architecture(
        "hunyuan_vae", hunyuan_vae.config_to_ours, hunyuan_vae.table, hunyuan_vae.config_from_ours
    ),
    flux_dit.CLASS_NAME: Architecture("mmdit", flux_dit.config_to_ours, flux_dit.table, flux_dit.config_from_ours),
    kl_vae.CLASS_NAME: Architecture("kl_vae", kl_vae.config_to_ours, kl_vae.table, kl_vae.config_from_ours),
    "BertModel": Architecture("bert", bert.config_to_ours, lambda config: bert.TABLE),
    "CLIPTextModel": Architecture("clip_text", clip.text_config_to_ours, lambda config: clip.TEXT_TABLE),
    "LlamaModel": Architecture("llama", llama.config_to_ours, llama.table),
    "T5EncoderModel": Architecture("t5", t5.config_to_ours, t5.table, t5.config_from_ours),
    "LlavaForConditionalGeneration": Architecture("llava", llava.config_to_ours, llava.table),
}


@dataclasses.dataclass(frozen=True)
class Component:
    """A published component, opened: its tensors fit its network, but none of them has been read.

    Attributes:
      architecture: its key in `PUBLISHED`.
      written_by: the library and version that its config.json tells of, or "".
    """

    folder: Path
    architecture: str
    written_by: str
    network: Network
    tensors: dict[str, LazyTensor]
    table: Table

    @property
    def kind(self) -> str:
        """Our name of the network."""
        return PUBLISHED[self.architecture].kind

    @property
    def rules(self) -> sharding.Rules:
        """Where its parameters go on a mesh."""
        return SHARDING_RULES.get(self.kind, ())


def is_published(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of a published component, not of one of ours."""
    return "model" not in config and ("_class_name" in config or "architectures" in config)


def open_component(folder: Path, **overrides: Any) -> Component:
    """Opens a published component folder; `overrides` go to its `config_to_ours`, such as compute_dtype.

    Raises:
      UserError: a file is missing or damaged, the architecture is unknown, or weights and config contradict each
        other, with the first mismatches.
    """
    folder = Path(folder)
    theirs = weights.read_json(folder / "config.json")
    name = class_name(theirs, folder)
    architecture = PUBLISHED[name]
    tensors = open_tensors(folder)
    if name == hunyuan_original.CLASS_NAME:
        tensors = hunyuan_original.without_prefix(tensors)
        theirs = theirs | {"shapes": {name: tensor.shape for name, tensor in tensors.items()}}
    try:
        config = _our_config(architecture, theirs, overrides)
        network, table = Network.create(MODELS[architecture.kind][1], config), architecture.table(config)
        plan_in(tensors, table, network.abstract_params)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    libraries = {"diffusers": "_diffusers_version", "transformers": "transformers_version"}
    written_by = [f"{library} {theirs[key]}" for library, key in libraries.items() if key in theirs]
    return Component(folder, name, ", ".join(written_by), network, tensors, table)


def load(
    folder: Path, *, dtype: Any = None, mesh: Mesh | None = None, lend: Lend = at_once, **overrides: Any
) -> tuple[Network, Held]:
    """Loads a published component folder onto a mesh, or onto the default device.

    Host memory stays within a few times the largest tensor of the files, whatever the size of the network.

    Args:
      folder: with config.json and safetensors.
      dtype: of floating-point parameters; the config's compute_dtype unless given, float32 where it has none.
      mesh: devices over which the parameters are laid by the network's rules.
      lend: when they are read, and how long they stay.
      overrides: what the published config doesn't say, such as compute_dtype or remat.

    Raises:
      UserError: see `open_component`; or the devices have too little memory.
    """
    component = open_component(folder, **overrides)
    abstract = component.network.abstract_params
    dtype = dtype or getattr(component.network.config, "compute_dtype", "float32")
    check = functools.partial(require_memory, dtype=dtype, what=str(folder), rules=component.rules)

    def read(mesh: Mesh | None) -> Params:
        place = OnDevices(flatten(layout(abstract, mesh, component.rules)), dtype)
        return to_ours(component.tensors, component.table, abstract, place=place)

    return component.network, lend(Source(component.network, read, mesh, component.rules, check))


def class_name(config: Mapping[str, Any], folder: Path) -> str:
    """The key in `PUBLISHED` that a config.json names.

    Raises:
      UserError: it names none, or one that isn't known.
    """
    named = config.get("_class_name") or config.get("architectures")
    name = named[0] if isinstance(named, list) and named else named
    if not isinstance(name, str):
        raise UserError(f"{folder / 'config.json'} has neither _class_name nor architectures; is it a published model?")
    if name not in PUBLISHED:
        raise UserError(f"{folder / 'config.json'} is of a {name}, which is not known here.{nearest(name, PUBLISHED)}")
    return name


def _our_config(architecture: Architecture, theirs: Mapping[str, Any], overrides: Mapping[str, Any]) -> Any:
    """Our config with its types checked: a number may be a string in a config.json that someone has edited."""
    try:
        config = architecture.config_to_ours(theirs, **overrides)
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        given = f" or the settings {', '.join(overrides)} are wrong" if overrides else ""
        raise UserError(f"config.json is malformed{given}: {error!r}") from None
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return settings.build(type(config), fields, where=architecture.kind)
