"""Resume to the bit, the stop on a bad step, SIGTERM: with a toy method in this process."""

import os
import signal

import jax
import pytest

from magic141_jax.errors import UserError
from magic141_jax.train import loop, metrics, optim
from magic141_jax.train.checkpoint import Checkpoints
from magic141_jax.train.state import TrainState
from magic141_jax.train.step import make_step


def run(method, points, folder, *, config, callback=None):
    optimizers = {role: optim.make(optim.OptimizerConfig(warmup_steps=2), 20) for role in method.roles}
    state = TrainState.create(method.init(jax.random.key(0)), optimizers)
    checkpoints, writer = Checkpoints(folder / "checkpoints"), metrics.MetricWriter(folder, steps=20, progress=False)
    step = make_step(method, optimizers)
    try:
        return loop.fit(step, state, points, config=config, checkpoints=checkpoints, writer=writer, callback=callback)
    finally:
        writer.close()
        checkpoints.close()


def lines(folder):
    return [{k: v for k, v in line.items() if k != "time"} for line in metrics.read(folder)]


def config(**changes):
    return loop.TrainConfig(**{"steps": 12, "log_every": 5, "save_every": 4, **changes})


def test_resuming_writes_the_same_numbers(toys, tmp_path):
    run(toys.Line(), toys.Points(), tmp_path / "whole", config=config())

    def crash(state, step):
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        run(toys.Line(), toys.Points(), tmp_path / "cut", config=config(sample_every=7), callback=crash)
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "left": 1}\n{"step": 7, "cut sho')
    result = run(toys.Line(), toys.Points(), tmp_path / "cut", config=config())
    assert result.step == 12 and not result.stopped
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
    assert [line["step"] for line in lines(tmp_path / "cut")] == [5, 10, 12]
    assert "absent" not in lines(tmp_path / "cut")[0]


def test_a_finished_run_is_left_alone(toys, tmp_path):
    run(toys.Line(), toys.Points(), tmp_path, config=config())
    before = lines(tmp_path)
    assert run(toys.Line(), toys.Points(), tmp_path, config=config()).step == 12
    assert lines(tmp_path) == before


def test_a_bad_loss_stops_and_names_the_good_checkpoint(toys, tmp_path):
    with pytest.raises(UserError, match=r"step 7: .*last good checkpoint is .*checkpoints/4"):
        run(toys.Line(), toys.Points(bad=6), tmp_path, config=config())
    with pytest.raises(UserError, match="there is no checkpoint yet"):
        run(toys.Line(), toys.Points(bad=1), tmp_path / "early", config=config())


def test_sigterm_saves_and_ends(toys, tmp_path):
    def ask(state, step):
        os.kill(os.getpid(), signal.SIGTERM)

    result = run(toys.Line(), toys.Points(), tmp_path, config=config(sample_every=6, save_every=100), callback=ask)
    assert result.stopped and result.step == 7
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    run(toys.Line(), toys.Points(), tmp_path, config=config())
    run(toys.Line(), toys.Points(), tmp_path / "whole", config=config())
    assert lines(tmp_path) == lines(tmp_path / "whole")


def test_another_networks_checkpoint_is_refused(toys, tmp_path):
    run(toys.Line(), toys.Points(), tmp_path, config=config())
    with pytest.raises(UserError, match="does not fit this config"):
        run(toys.Line(roles=("student", "fake")), toys.Points(), tmp_path, config=config())


@pytest.mark.parametrize("name", ["steps", "log_every", "save_every", "accumulate", "keep"])
def test_zero_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1"):
        loop.TrainConfig(**{name: 0})
