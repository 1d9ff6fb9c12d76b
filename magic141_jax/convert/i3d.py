"""I3D over RGB in pytorch-i3d's names (`rgb_imagenet.pt`, made from DeepMind's) -> `I3D`: its table of names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from magic141_jax.convert.engine import CONV, Rule, Table, chain, each
from magic141_jax.errors import UserError
from magic141_jax.models.i3d import I3DConfig

_POINT = chain(CONV, each("a convolution of one point as a map", lambda a: a[0, 0, 0], lambda a: a[None, None, None]))
TABLE: Table = (
    Rule("logits.conv3d.weight", "logits.kernel", _POINT),
    Rule("logits.conv3d.bias", "logits.bias"),
    Rule("{*unit}.conv3d.weight", "{*unit}.kernel", CONV),
    Rule("{*unit}.bn.weight", "{*unit}.scale"),
    Rule("{*unit}.bn.bias", "{*unit}.bias"),
    Rule("{*unit}.bn.running_mean", "{*unit}.mean"),
    Rule("{*unit}.bn.running_var", "{*unit}.variance"),
    Rule("{*unit}.bn.num_batches_tracked", ()),
)


def config_of(tensors: Mapping[str, Any]) -> I3DConfig:
    """The config of published tensors, which have none beside them; raises `UserError` for those of another network."""
    if "logits.conv3d.bias" not in tensors:
        raise UserError("no tensor logits.conv3d.bias; an I3D has pytorch-i3d's names, as in rgb_imagenet.pt")
    return I3DConfig(tensors["logits.conv3d.bias"].shape[0])
