"""Why a program fits or doesn't, from held sizes and from a compiler's message."""

from magic141_jax.aot import verdict

GIB = 2**30
EARLY = (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (35.50G) exceeds "
    "available HBM (31.25G)."
)
LATE = """RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 900.5M of 31.25G hbm. Exceeded hbm capacity by 3.76G.

Program hbm requirement 30.00G:
    HLO temp         30.00G (100.0% utilization: Unpadded (30.00G) Padded (30.00G), 0.0% fragmentation (16.0K))

  Largest program allocations in hbm:

  1. Size: 2.50G
     Operator: op_name="jit(step)/while/body/checkpoint/attend/dot_general" source_file="x.py" source_line=3
     Shape: bf16[1310720,1024]{1,0:T(8,128)(2,1)}
     Unpadded size: 2.50G
     XLA label: fusion.40 = fusion(copy-done, param), kind=kOutput, calls=fused_computation.55
     Allocation type: HLO temp
     ==========================

  2. Size: 2.50G
     Operator: op_name="jit(step)/while/body/checkpoint/attend/dot_general"
     Shape: bf16[1310720,1024]{1,0:T(8,128)(2,1)}
     ==========================

  3. Size: 512.00M
     Shape: f32[131072,1024]{1,0}
     Unpadded size: 512.00M
     ==========================

  Largest program arguments and outputs in hbm:

  1. Size: 20.00G
     Shape: bf16[1,1310720,1024]{2,1,0:T(8,128)(2,1)}
     XLA label: Argument 0 index {}
"""  # noqa: E501
HELD = {"teacher, frozen": 3 * GIB, "student, moments": 2 * GIB, "batch": GIB, "student, average": GIB // 2}


def reasons(**results):
    return [(reason["what"], reason["bytes"]) for reason in verdict.reasons({"held": HELD, **results})]


def test_what_a_refused_program_needs():
    assert verdict.needed(EARLY) == round(35.5 * GIB)
    assert verdict.needed(LATE) == round(900.5 * 2**20)
    assert verdict.needed("RESOURCE_EXHAUSTED: E1001: CompileTimeScopedVmemOom") is None


def test_the_largest_arrays_of_a_refused_program_once_each():
    assert verdict.allocations(EARLY) == []
    assert verdict.allocations(LATE) == [
        {"bytes": round(2.5 * GIB), "shape": "bf16[1310720,1024]", "operator": "attend/dot_general"},
        {"bytes": 512 * 2**20, "shape": "f32[131072,1024]", "operator": "unknown"},
    ]


def test_three_reasons():
    held = [("teacher, frozen", 3 * GIB), ("student, moments", 2 * GIB)]
    assert reasons(fits=True, memory={"temporaries": 9 * GIB}) == [("temporaries", 9 * GIB), *held]
    assert reasons(fits=True, memory={"temporaries": 0}) == [*held, ("batch", GIB)]
    found = reasons(fits=False, memory={"total": 36 * GIB}, allocations=verdict.allocations(LATE))
    assert found == [held[0], ("attend/dot_general bf16[1310720,1024]", round(2.5 * GIB)), held[1]]
    # The compiler names no array: all beside what is held is one thing.
    assert reasons(fits=False, memory={"total": 36 * GIB}, allocations=[])[0] == (
        "temporaries and outputs",
        36 * GIB - sum(HELD.values()),
    )
    assert reasons(fits=False) == [*held, ("batch", GIB)]
