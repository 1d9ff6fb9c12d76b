"""The races at tiny sizes: both sides compute the same, and one that does not ends the run."""

import dataclasses

import numpy as np
import pytest

from magic141_jax.errors import UserError
from magic141_jax.evaluation.speed import clock

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from benchmarks import against_torch as races  # noqa: E402
from magic141_jax.models.hunyuan_vae import HunyuanVAEConfig  # noqa: E402
from magic141_jax.models.mmdit import MMDiTConfig  # noqa: E402

TINY = MMDiTConfig(
    in_channels=9,
    out_channels=4,
    width=32,
    heads=2,
    head_width=16,
    double_blocks=1,
    single_blocks=1,
    refiner_blocks=1,
    rope_axes=(4, 6, 6),
    text_width=24,
    pooled_width=12,
)
CASES = {
    "evaluation": (races.DiT(TINY, (3, 4, 6), 7, 5), "float32"),
    "walk": (races.DiT(TINY, (3, 4, 6), 7, 5, steps=2), "float32"),
    "one frame in bfloat16": (races.DiT(TINY, (1, 4, 6), 7, 7), "bfloat16"),
    "published autoencoder": (
        races.VAE(HunyuanVAEConfig(block_out_channels=(4, 4, 8, 8), norm_num_groups=2, layers_per_block=1), (2, 2, 3)),
        "float32",
    ),
    "light autoencoder": (races.VAE(None, (2, 2, 3)), "float32"),
}


@pytest.fixture(scope="module")
def ceiling():
    return clock.matmul(np.float32, 1, side=32)


@pytest.mark.heavy
@pytest.mark.parametrize("case", CASES)
def test_a_race(case, ceiling):
    given, dtype = CASES[case]
    race = races.prepare(given, torch, device="cpu", dtype=dtype, modes=("eager",))
    found = races.run(race, ceiling, repeats=1, dtype=dtype)
    assert found["operations"] > 0 and found["times"].keys() == {"eager", "jax"}
    assert 0 < found["differences"]["jax"] < (1e-5 if dtype == "float32" else 0.05)
    machine = {"threads": 2}
    rows = races.table({"machine": machine, "races": {case: found}}).splitlines()
    assert len(rows) == 5 and all(row.count("|") == rows[0].count("|") for row in rows)


def test_the_ratio_is_to_the_best_of_torch_and_other_results_are_refused(ceiling):
    answers = {"eager": np.arange(3.0), "compile": np.arange(3.0), "jax": np.arange(3.0)}
    race = races.Race({name: lambda value=value: value for name, value in answers.items()}, 1.0)
    found = races.run(race, ceiling, repeats=3, dtype="float32")
    best = min(found["times"][name]["least"] for name in ("eager", "compile"))
    assert found["ratios"]["least"] == pytest.approx(found["times"]["jax"]["least"] / best)
    race.sides["jax"] = lambda: np.array([0.0, 1.0, 2.1])
    with pytest.raises(UserError, match="don't compute the same"):
        races.run(race, ceiling, repeats=1, dtype="float32")


def test_masks_are_left_out_on_cuda_only_where_all_text_counts():
    """The processor that drops the mask gives the same as the usual one there."""
    assert all(case.valid == case.text for case in races.CASES["cuda"].values())


def test_configs_of_the_races_can_be_published():
    for case in (*races.CASES["cpu"].values(), *races.CASES["cuda"].values()):
        if isinstance(case, races.DiT):
            races.hunyuan_dit.config_from_ours(case.config)
            assert case.config.prediction == "velocity"  # which a loop of theirs takes the output for
    switches = {"absolute_positions": True, "hold_known": True, "prediction": "sample"}
    assert dataclasses.replace(races.default_transformer(), **switches) == races.emoji()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--device", "cuda"], "no CUDA device"),
        (["--cases", "dit-clop"], "known are dit-image"),
        (["--modes", "fast"], "known are eager"),
        (["--repeats", "0"], "at least 1"),
    ],
)
def test_bad_flags(flags, message):
    with pytest.raises(UserError, match=message):
        races.main(flags)
