"""Which form each kernel gets: by its path, its shape, its zeros; and what a form takes."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magic141_jax.errors import UserError
from magic141_jax.models import mmdit
from magic141_jax.models.mmdit import MMDiT
from magic141_jax.models.network import Network
from magic141_jax.models.stored import QUANTIZED, Form, Stored
from magic141_jax.pytree import flatten
from magic141_jax.quantize import plan as lib
from magic141_jax.quantize.plan import FORMS, MAIN, bits, named, plan, suited

RNG = np.random.default_rng(0)


def kernel(*shape, keep=None):
    """A random kernel, pruned to n of every m rows."""
    values = RNG.normal(size=shape).astype(np.float32)
    if keep:
        n, m = keep
        grouped = (*shape[:-2], shape[-2] // m, m, shape[-1])
        values *= (RNG.random(grouped).argsort(-2) < n).reshape(shape)
    return jnp.asarray(values)


KERNELS = {
    "double_blocks.video.qkv.kernel": kernel(2, 128, 64),
    "double_blocks.video.mlp_down.kernel": kernel(2, 128, 64, keep=(2, 4)),
    "double_blocks.video.modulation.kernel": kernel(2, 128, 64),
    "patch_out.kernel": kernel(128, 64),
    "time_in.up.kernel": kernel(16, 8),
}


def test_the_main_form_is_for_attention_and_mlp_of_all_blocks():
    paths = [path for path in flatten(Network.create(MMDiT, mmdit.debug()).abstract_params) if path.endswith("kernel")]
    chosen = {path for path in paths if re.search(MAIN, path)}
    streams = ("double_blocks.video", "double_blocks.text", "single_blocks.joint", "text_in.blocks")
    maps = ("qkv", "attention_out", "mlp_up", "mlp_down")
    assert chosen == {f"{stream}.{name}.kernel" for stream in streams for name in maps}
    assert len(paths) > len(chosen) + 8


def test_a_plan():
    forms = plan(KERNELS, named("int4"), named("int8"))
    assert forms == {
        "double_blocks.video.qkv.kernel": Form("int4", group=32),
        "double_blocks.video.mlp_down.kernel": Form("int4", (2, 4), 32),
        "double_blocks.video.modulation.kernel": Form("int8"),
        "patch_out.kernel": Form("int8"),
        "time_in.up.kernel": Form("bfloat16"),  # too small to be worth rounding
    }
    spared = plan(KERNELS, named("int4"), spare=frozenset(["double_blocks.video.qkv.kernel"]), pack=False)
    assert spared == {
        **dict.fromkeys(KERNELS, Form("bfloat16")),
        "double_blocks.video.mlp_down.kernel": Form("int4", group=32),
    }
    chosen = plan(KERNELS, named("float8"), named("bfloat16"), paths="modulation|patch_out")
    assert {path for path, form in chosen.items() if form.values == "float8_e4m3fn"} == {
        "double_blocks.video.modulation.kernel",
        "patch_out.kernel",
    }


@pytest.mark.parametrize(("paths", "message"), [("attn", "no kernel's path matches 'attn'"), ("(", "no regular exp")])
def test_paths_that_name_nothing(paths, message):
    with pytest.raises(UserError, match=message):
        plan(KERNELS, named("int4"), paths=paths)


def test_an_unknown_form():
    with pytest.raises(UserError, match=r"'int3'\. Did you mean 'int"):
        named("int3")


@pytest.mark.parametrize(
    ("shape", "keep", "form", "want"),
    [
        ((128, 64), None, Form("int8"), Form("int8")),
        ((32, 64), None, Form("int8"), Form("bfloat16")),
        ((32, 64), None, Form("float32"), Form("float32")),
        ((2, 32, 64), None, Form("int8"), Form("bfloat16")),  # a layer counts, not the stack
        ((3, 3, 16, 64), None, Form("int8"), Form("int8")),  # a convolution counts whole
        ((96, 64), None, Form("int4", group=64), Form("int4")),
        ((65, 64), None, Form("int4", group=32), Form("int8")),
        ((128, 64), (2, 4), Form("int8"), Form("int8", (2, 4))),
        ((128, 64), (2, 4), Form("bfloat16"), Form("bfloat16", (2, 4))),
        ((128, 64), (2, 4), Form("int8", activations="int8"), Form("int8", (2, 4), activations="int8")),
        ((128, 64), (6, 8), Form("int8"), Form("int8", (96, 0))),
        ((128, 64), (6, 8), Form("int4"), Form("int4")),  # a bit of mask outweighs a quarter of four
        ((128, 64), (15, 16), Form("bfloat16"), Form("bfloat16")),
        ((3, 3, 16, 64), (2, 4), Form("int8"), Form("int8", (2, 4))),
    ],
)
def test_suited(shape, keep, form, want):
    made = suited(kernel(*shape, keep=keep), form)
    assert made == want
    rows = int(np.prod(shape[-3:-1] if len(shape) < 4 else shape[:-1])) // (shape[0] if len(shape) == 3 else 1)
    made.check(rows)


def test_small_kernels_are_told_by_a_number(monkeypatch):
    monkeypatch.setattr(lib, "SMALLEST", 0)
    assert suited(kernel(16, 8), Form("int8")) == Form("int8")


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("keep", [None, (2, 4), (40, 0)])
def test_bits_are_those_of_the_parts(name, keep):
    """What decides on packing is what the parts really take."""
    form = Form(FORMS[name].values, keep, FORMS[name].group, FORMS[name].activations)
    made = Stored((128, 8), form)
    parts = [made.values, *([made.mask] if keep else []), *([made.scale] if form.values in QUANTIZED else [])]
    held = sum(8 * part[...].nbytes for part in parts)
    assert bits(form, 128) == pytest.approx(held / (128 * 8))
    assert jax.tree.leaves(made.values)[0].dtype.itemsize <= 4
