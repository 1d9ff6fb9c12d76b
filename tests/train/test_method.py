"""Which roles a step updates."""

from magic141_jax.train.method import active_roles


def test_cadence_counts_steps_from_zero(toys):
    method = toys.Line(roles=("student", "fake"), cadence={"student": 5})
    turns = [active_roles(method, step) for step in range(6)]
    assert turns == [("student", "fake"), *[("fake",)] * 4, ("student", "fake")]
