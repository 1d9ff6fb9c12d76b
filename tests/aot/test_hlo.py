"""Collectives read from a program's text: in loops, in branches, fused, asynchronous."""

from magic141_jax.aot.hlo import collectives

PROGRAM = """HloModule step, is_scheduled=true

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
    assert collectives(PROGRAM) == {
        "all-gather": {"count": 20 + 1, "bytes": 20 * 8 * 8 * 2 + (8 + 12) * 2},
        "all-reduce": {"count": 60 + 7 + 1, "bytes": 67 * 4 * 4 + 4 * 4 + 4},
        "collective-permute": {"count": 1, "bytes": 16},
    }


def test_a_program_without_any():
    assert collectives("ENTRY %main (p: f32[2]) -> f32[2] {\n  ROOT %n = f32[2]{0} negate(%p)\n}\n") == {}
