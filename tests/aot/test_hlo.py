"""Programs by their text: collectives in loops, branches, fused and asynchronous; bytes touched; the largest arrays."""

import jax
import jax.numpy as jnp
import pytest

from magic141_jax.aot import hlo
from magic141_jax.aot.hlo import collectives

PROGRAM = """HloModule step, is_scheduled=true, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%gathered (p: bf16[2,8]) -> bf16[8,8] {
  %p = bf16[2,8]{1,0} parameter(0)
  ROOT %all-gather.9 = bf16[8,8]{1,0:T(8,128)(2,1)} all-gather(%p), dimensions={0}, replica_groups=[2,4]<=[8]
}

%inner (c: (s32[], f32[4])) -> (s32[], f32[4]) {
  %all-reduce.1 = f32[4]{0:T(128)} all-reduce(%x), to_apply=%add
}

%body (c: (s32[], f32[4])) -> (s32[], f32[4]) {
  %fusion.1 = bf16[8,8]{1,0} fusion(%w), kind=kCustom, calls=%gathered
  %while.2 = (s32[], f32[4]{0:T(128)}) while(%t), condition=%turning, body=%inner, backend_config={"known_trip_count":{"n":"3"}}
}

%walk (c: (s32[], f32[4])) -> (s32[], f32[4]) {
  %permuted = (f32[4]{0}, f32[4]{0}, u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,1}}
  %done = f32[4]{0} collective-permute-done(%permuted)
}

%turning (c: (s32[], f32[4])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%counted (c: (s32[], f32[4])) -> pred[] {
  %seven = s32[]{:T(128)} constant(7)
  %i = s32[]{:T(128)} get-tuple-element(%c), index=0
  ROOT %less.2 = pred[]{:T(512)} compare(%i, %seven), direction=LT
}

ENTRY %main (p0: bf16[2,8]) -> f32[4] {
  %while.1 = (s32[], f32[4]{0:T(128)}) while(%t), condition=%turning, body=%body, backend_config={"known_trip_count":{"n":"20"}}
  %while.3 = (s32[], f32[4]{0}) while(%t), condition=%turning, body=%walk
  %while.4 = (s32[], f32[4]{0}) while(%t), condition=%counted, body=%inner
  %ar = (f32[4]{0}, /*index=1*/s8[2,2]{1,0}) all-reduce(%a, %b), to_apply=%add
  %start = ((bf16[2]{0:T(256)(2,1)}, bf16[3]{0}), (bf16[8]{0:T(256)(2,1)}, bf16[12]{0})) all-gather-start(%a, %b)
  ROOT %out = f32[4]{0} get-tuple-element(%while.1), index=1
}
"""  # noqa: E501


def test_loops_multiply_and_unknown_ones_count_once():
    gathered, summed = 20 * 8 * 8 * 2, 67 * 4 * 4 + 4 * 4 + 4
    assert collectives(PROGRAM) == {
        # The first is over groups of four devices, the second doesn't say and is over all eight.
        "all-gather": {"count": 20 + 1, "bytes": gathered + 40, "received": gathered * 3 // 4 + 40 * 7 // 8},
        "all-reduce": {"count": 60 + 7 + 1, "bytes": summed, "received": 60 * 28 + 7 * 28 + 2 * 20 * 7 // 8},
        "collective-permute": {"count": 1, "bytes": 16, "received": 16},
    }


def test_a_program_without_any():
    assert collectives("ENTRY %main (p: f32[2]) -> f32[2] {\n  ROOT %n = f32[2]{0} negate(%p)\n}\n") == {}


def test_one_that_overlaps_with_several_fusions_counts_once():
    """Also where one of these is in a loop that turns meanwhile."""
    part = "%part.{0} (p: f32[4]) -> f32[8] {{\n  ROOT %g.{0} = f32[8]{{0}} all-gather(%p), channel_id={1}\n}}\n"
    fusion = "  %f.{0} = f32[8]{{0}} fusion(%x), kind=kCustom, calls=%part.{0}\n"
    parts = [(0, 5), (1, 5), (2, 6), (3, 5)]
    *first, last = (fusion.format(*each) for each in parts)
    loop = '  %w = f32[8] while(%x), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"9"}}\n'
    text = "".join(part.format(*each) for each in parts) + f"%body (x: f32[4]) -> f32[8] {{\n{last}}}\n"
    text += f"ENTRY %main (x: f32[4]) -> f32[8] {{\n{loop}{''.join(first)}}}\n"
    assert collectives(text)["all-gather"]["count"] == 2


@pytest.mark.parametrize(
    ("groups", "devices"),
    [
        ("{{0,1},{2,3}}", 2),
        ("[2,4]<=[8]", 4),
        ("[2,4]<=[2,2,2]T(0,2,1)", 4),
        ("mesh['a'=2,'b'=4] {'b'}", 4),
        ("mesh['a'=2,'b'=4] {'a','b'}", 8),
        ("mesh['a'=2,'b'=4] {'b':(1)2}", 2),
        ("{}", 8),
    ],
)
def test_bytes_received_are_those_of_other_devices(groups, devices):
    n, size = devices, 1024 * 4
    received = {
        "all-gather": size * (n - 1) / n,
        "all-reduce": 2 * size * (n - 1) / n,
        "reduce-scatter": size * (n - 1),
        "all-to-all": size * (n - 1) / n,
    }
    for kind, wanted in received.items():
        line = f"  ROOT %x = f32[1024]{{0}} {kind}(%p), channel_id=1, replica_groups={groups}, dimensions={{0}}"
        text = f"HloModule m, num_partitions=8\nENTRY %main (p: f32[8]) -> f32[8] {{\n{line}\n}}\n"
        assert collectives(text)[kind]["received"] == wanted


SLICED = """HloModule m

%layer (stack: bf16[6,256,128], i: s32[], x: f32[64]) -> bf16[256,128] {
  %stack = bf16[6,256,128]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %x = f32[64]{0} parameter(2)
  %same = bf16[6,256,128]{2,1,0} bitcast(%stack)
  %one = bf16[1,256,128]{2,1,0} dynamic-slice(%same, %i, %i, %i), dynamic_slice_sizes={1,256,128}
  ROOT %out = bf16[256,128]{1,0} custom(%one, %x)
}

%keep (all: f32[6,64], i.1: s32[], new: f32[1,64]) -> f32[6,64] {
  %all = f32[6,64]{1,0} parameter(0)
  %i.1 = s32[] parameter(1)
  %new = f32[1,64]{1,0} parameter(2)
  ROOT %kept = f32[6,64]{1,0} dynamic-update-slice(%all, %new, %i.1, %i.1)
}

%body (c: (s32[], bf16[6,256,128], f32[6,64])) -> (s32[], bf16[6,256,128], f32[6,64]) {
  %c = (s32[], bf16[6,256,128]{2,1,0}, f32[6,64]{1,0}) parameter(0)
  %n = s32[]{:S(2)} get-tuple-element(%c), index=0
  %w = bf16[6,256,128]{2,1,0} get-tuple-element(%c), index=1
  %y = f32[6,64]{1,0} get-tuple-element(%c), index=2
  %near = f32[64]{0:T(128)S(1)} negate(%far), metadata={op_name="jit(f)/while/body/checkpoint/neg"}
  %used = bf16[256,128]{1,0:T(8,128)(2,1)S(1)} fusion(%w, %n, %near), kind=kLoop, calls=%layer
  %new.1 = f32[1,64]{1,0} reduce(%used, %zero), to_apply=%add, metadata={op_name="jit(f)/while/body/reduce_sum"}
  %y.1 = f32[6,64]{1,0} fusion(%y, %n, %new.1), kind=kLoop, calls=%keep
  %copy-start.1 = (f32[64]{0:S(1)}, f32[64]{0}, u32[]{:S(2)}) copy-start(%host)
  %copy-done.1 = f32[64]{0:S(1)} copy-done(%copy-start.1)
  ROOT %t = (s32[], bf16[6,256,128]{2,1,0}, f32[6,64]{1,0}) tuple(%n, %w, %y.1)
}

%turning (c: (s32[], bf16[6,256,128], f32[6,64])) -> pred[] {
  ROOT %less = pred[]{:S(2)} custom-call(%c)
}

ENTRY %main (p: bf16[6,256,128]) -> f32[6,64] {
  %loop = (s32[], bf16[6,256,128]{2,1,0}, f32[6,64]{1,0}) while(%t), condition=%turning, body=%body, backend_config={"known_trip_count":{"n":"6"}}
  %slice-start.1 = ((f32[6,64]{1,0}), f32[2,64]{1,0:S(1)}, u32[]{:S(2)}) slice-start(%y), slice={[0:2], [0:64]}
  %slice-done.1 = f32[2,64]{1,0:S(1)} slice-done(%slice-start.1)
  %cut = f32[1,64]{1,0} dynamic-slice(%y, %n, %n), dynamic_slice_sizes={1,64}
  ROOT %out.1 = f32[6,64]{1,0} get-tuple-element(%loop), index=2
}
"""  # noqa: E501


def test_slices_count_and_not_the_stacks_that_they_are_cut_from():
    layer = 256 * 128 * 2  # read from the stack into the core's own memory
    row = 64 * 4
    reduced = row  # written; it reads what is near
    kept = row + row  # the new row read and written in place
    copied = row  # from HBM to the core
    program = hlo.parse(SLICED)
    assert hlo.touched(program) == 6 * (layer + reduced + kept + copied) + 2 * row + row
    assert hlo.largest(program) == [
        {"bytes": 6 * row, "shape": "f32[6,64]", "operator": "fusion"},
        {"bytes": row, "shape": "f32[1,64]", "operator": "reduce_sum"},
        {"bytes": row, "shape": "f32[1,64]", "operator": "dynamic-slice"},
    ]


def test_the_compiler_touches_as_many_bytes_where_nothing_loops():
    def mlp(x, w, v):
        return jnp.tanh(x @ w) @ v

    x, w, v = jnp.ones((256, 128)), jnp.ones((128, 512)), jnp.ones((512, 64))
    compiled = jax.jit(mlp).lower(x, w, v).compile()
    least = 4 * (x.size + w.size + v.size + 2 * 256 * 512 + 256 * 64)
    found = hlo.touched(hlo.parse(compiled.as_text()))
    assert least <= found <= least + 2 * 4 * 256 * 512  # the activation may be a pass of its own
    assert found == pytest.approx(compiled.cost_analysis()["bytes accessed"], rel=0.05)


def test_bytes_of_scanned_layers_are_those_of_all_layers():
    def stack(kernels, x):
        return jax.lax.scan(lambda x, kernel: (x @ kernel, None), x, kernels)[0]

    def touched(layers):
        kernels = jax.ShapeDtypeStruct((layers, 256, 256), jnp.float32)
        compiled = jax.jit(stack).lower(kernels, jax.ShapeDtypeStruct((8, 256), jnp.float32)).compile()
        return hlo.touched(hlo.parse(compiled.as_text()))

    weights = 4 * 256 * 256  # cut from the stack, written and read again at most
    assert weights <= (touched(12) - touched(6)) / 6 <= 3.5 * weights


def test_operators_are_shortened():
    name = "jit(_denoise)/while/body/closed_call/checkpoint/single_blocks/attend/dot_general"
    assert hlo.short_operator(name) == "single_blocks/attend/dot_general"
    assert hlo.short_operator("jit(f)/while") == "jit(f)/while"
