"""Tables and verdicts from made-up values."""

import math

import pytest

from magic141_jax.evaluation import standing

TEACHER = {
    "t2v": {
        "first_identity": 0.9,
        "last_identity": 0.85,
        "last_colour": 1.0,
        "motion": 0.95,
        "motion_amount": 1.0,
        "diversity": 0.4,
        "frechet": 0.5,
        "dit_seconds": 2.0,
        "evaluations": 200,
    },
    "i2v": {
        "last_identity": 0.7,
        "last_colour": 1.0,
        "motion": 0.9,
        "first_frame_psnr": 30.0,
        "motion_amount": 0.9,
        "diversity": 0.1,
        "frechet": 0.4,
        "dit_seconds": 1.5,
        "evaluations": 100,
    },
}


def changed(**changes):
    """The teacher's values with others in both kinds; a function changes the value."""
    return {
        kind: {k: changes[k](v) if k in changes else v for k, v in values.items()} for kind, values in TEACHER.items()
    }


FASTER = {"dit_seconds": lambda v: v / 10}


LAST = "identity in the last"


def rows(*students, split="train"):
    """The teacher, and students s0, s1 of one seed each, or of several as lists."""
    several = max(len(s) if isinstance(s, list) else 1 for s in students)
    named = {"teacher": [TEACHER] * several, **{f"s{i}": s for i, s in enumerate(students)}}
    return {
        label: {
            "settings": {"num_inference_steps": 4, "guidance_scale": 1.5},
            "values": {split: {str(i): v for i, v in enumerate(of if isinstance(of, list) else [of])}},
        }
        for label, of in named.items()
    }


def cells(text, label):
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {label} |")]
    return [cell.strip() for cell in line.split("|")[2:-1]]


def test_table_has_a_row_a_line_and_only_its_kinds_columns():
    made = rows(changed(diversity=lambda v: v / 2))
    text = standing.table(made, "train", "t2v")
    head = cells(text, "")
    assert len(text.splitlines()) == 4
    assert "PSNR of the first frame (dB)" not in head
    assert "PSNR of the first frame (dB)" in cells(standing.table(made, "train", "i2v"), "")
    teacher, student = (dict(zip(head, cells(text, label), strict=True)) for label in ("teacher", "s0"))
    assert (teacher["steps"], teacher["guidance"], teacher["evaluations"]) == ("4", "1.5", "200")
    assert (teacher["diversity / the first row's"], student["diversity / the first row's"]) == ("1.00", "0.50")
    assert teacher["DiT seconds"] == "2"


def test_several_seeds_have_a_deviation():
    assert standing.spread([1.0], "{:.2f}") == "1.00"
    assert standing.spread([1.0, 2.0, 3.0], "{:.2f}") == "2.00 ± 1.00"
    assert standing.spread([-1.0, 1.0], "{:+.1f}") == "+0.0 ± 1.4"
    assert standing.spread([math.nan, 1.0], "{:.2f}") == "–"
    assert standing.spread([16, 16], "{:.0f}") == "16"


def test_bold_is_what_stands_apart_from_all_others():
    apart, touching = [[0.1, 0.2], [0.8, 0.9], [0.3, 0.4]], [[0.1, 0.9], [0.8, 0.9], [0.3, 0.4]]
    assert (standing.beyond_spread(apart, 1), standing.beyond_spread(apart, -1)) == (1, 0)
    assert standing.beyond_spread(touching, 1) is None
    assert standing.beyond_spread(apart, 0) is None
    for alone in ([[0.1], [0.8]], [[0.1, 0.2]], [[0.1, math.nan], [0.8, 0.9]], [[1.0, 1.0], [1.0, 1.0]]):
        assert standing.beyond_spread(alone, 1) is None
    students = [[changed(frechet=lambda v: v / 2), changed(frechet=lambda v: v / 2)], [TEACHER, TEACHER]]
    text = standing.table(rows(*students), "train", "t2v")
    assert cells(text, "s0").count("**0.25 ± 0.00**") == 1 and text.count("**") == 2


def test_equal_values_ten_times_as_fast_meet_the_goal():
    (line,) = standing.standing_lines(rows(changed(**FASTER)), "train")
    assert line.startswith("s0 against teacher: identity in the first frame T2V +0.0 points; identity in the last T2V")
    assert "first frame I2V +0.0 dB" in line
    assert "motion T2V 100, I2V 100 %" in line
    assert "DiT T2V 10.0, I2V 10.0 times the speed" in line
    assert line.endswith("**meets the goal**")


@pytest.mark.parametrize(
    ("measure", "just", "below", "missed"),
    [
        ("first_identity", lambda v: v - 0.01, lambda v: v - 0.02, ["T2V identity in the first frame"]),
        ("last_identity", lambda v: v - 0.01, lambda v: v - 0.02, [f"T2V {LAST}", f"I2V {LAST}"]),
        ("last_colour", lambda v: v - 0.01, lambda v: v - 0.02, ["T2V colour", "I2V colour"]),
        ("motion", lambda v: v - 0.01, lambda v: v - 0.02, ["T2V direction", "I2V direction"]),
        ("first_frame_psnr", lambda v: v - 0.5, lambda v: v - 0.6, ["I2V first frame"]),
        ("motion_amount", lambda v: v * 0.95, lambda v: v * 0.94, ["T2V motion", "I2V motion"]),
        ("diversity", lambda v: v * 0.85, lambda v: v * 0.84, ["T2V diversity", "I2V diversity"]),
        ("dit_seconds", lambda v: v / 10, lambda v: v / 9, ["T2V DiT"]),
        ("diversity", lambda v: v * 2, lambda v: math.nan, ["T2V diversity", "I2V diversity"]),
    ],
)  # fmt: skip
def test_every_aspect_can_miss_the_goal(measure, just, below, missed):
    made = rows(changed(**{**FASTER, measure: just}), changed(**{**FASTER, measure: below}))
    found = standing.standings(made, "train")
    assert found["s0"]["met"]
    assert (found["s1"]["met"], found["s1"]["missed"]) == (False, missed)
    assert standing.standing_lines(made, "train")[1].endswith(f"**misses the goal: {', '.join(missed)}**")


def test_differences_are_formed_seed_by_seed():
    made = rows([changed(motion=lambda v: v + 0.02), changed(motion=lambda v: v)])
    made["teacher"]["values"]["train"]["0"] = changed(motion=lambda v: v - 0.3)
    made["s0"]["values"]["train"]["0"] = changed(motion=lambda v: v - 0.28)
    found = standing.standings(made, "train")["s0"]["aspects"]
    assert found["t2v motion"] == pytest.approx([2, 0])
    assert "direction T2V +1.0 ± 1.4" in standing.standing_lines(made, "train")[0]


def test_nothing_to_compare_with_is_missed():
    made = rows(changed(**FASTER))
    made["teacher"]["values"]["train"]["0"] = changed(motion_amount=lambda v: 0.0)
    assert standing.standings(made, "train")["s0"]["missed"] == ["T2V motion", "I2V motion"]


def test_section():
    made = rows(changed(**FASTER))
    for row in made.values():
        row["values"]["subjects"] = {"0": {"i2v": row["values"]["train"]["0"]["i2v"]}}
    how = {"samples": 8, "draws": 4, "seeds": (0,), "splits": ("train", "subjects")}
    text = standing.section({"rows": made, "settings": how})
    assert "8 captions a seed, 4 noises for diversity, seeds 0." in text
    heads = [line for line in text.splitlines() if line.startswith(("T2V, ", "I2V, "))]
    assert heads == ["T2V, training captions:", "I2V, training captions:", "I2V, held-out emoji:"]
    assert text.count("- s0 against teacher") == 2
    assert standing.GOAL in text


def with_captions(values, each):
    return {kind: {**of, standing.BY_CAPTION: each} for kind, of in values.items()}


def paired_rows(seeds=2):
    """A student right in one more of ten captions a seed than its teacher, and wrong in none that is right there."""
    of = {"motion": [1.0] * 5 + [0.0] * 5, "motion_amount": [1.0, 2.0] * 5, "diversity": [0.5] * 4}
    better = {"motion": [1.0] * 6 + [0.0] * 4, "motion_amount": [0.9, 1.8] * 5, "diversity": [0.4] * 4}
    made = rows([with_captions(TEACHER, better) for _ in range(seeds)])
    made["teacher"]["values"]["train"] = {str(i): with_captions(TEACHER, of) for i in range(seeds)}
    return made


def test_pairs_of_all_seeds_have_an_interval():
    made = paired_rows()
    found = standing.paired(made, "train", "i2v")["s0"]
    assert set(found) == {"motion", "motion_amount", "diversity"}
    motion = found["motion"]
    assert (motion.value, motion.pairs) == (pytest.approx(10), 20) and 0 <= motion.low < 10 < motion.high <= 30
    assert found["motion_amount"][:3] == pytest.approx((90, 90, 90))
    assert found["diversity"] == pytest.approx((80, 80, 80, 8))
    assert standing.standings(made, "train")["s0"]["paired"]["i2v motion"] == motion._asdict()
    lines = standing.paired_lines(made, "train", "i2v")
    assert lines[1] == "Paired with teacher, 8 to 20 pairs, 95 % intervals:"
    head = cells(lines[-1], "")
    assert head == ["direction (points)", "amount of motion (%)", "diversity (%)"]
    motion, amount, diversity = cells(lines[-1], "s0")
    assert motion.startswith("**+10.0 [+0.0, +2") and amount == "90 [90, 90]" and diversity == "80 [80, 80]"
    assert lines[-1] in "\n".join(standing.tables(made, "train"))
    how = {"samples": 10, "draws": 2, "seeds": (0, 1), "splits": ("train",)}
    assert standing.MORE_NOTES[standing.BY_CAPTION] in standing.section({"rows": made, "settings": how})


def test_older_records_have_no_pairs():
    made = rows(changed())
    assert standing.paired(made, "train", "i2v") == {"s0": {}} and not standing.paired_lines(made, "train", "i2v")
    assert "paired" not in standing.standings(made, "train")["s0"]
    how = {"samples": 10, "draws": 2, "seeds": (0,), "splits": ("train",)}
    assert standing.MORE_NOTES[standing.BY_CAPTION] not in standing.section({"rows": made, "settings": how})
    grown = paired_rows()
    for row in grown.values():
        del row["values"]["train"]["0"]["i2v"][standing.BY_CAPTION]
    assert standing.paired(grown, "train", "i2v")["s0"]["motion"].pairs == 10, "of the seed that has them"
