"""Resume to the bit, the stop on a bad step, SIGTERM, the watch and its rollbacks: with toy methods in this process."""

import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magic141_jax.errors import UserError
from magic141_jax.train import loop, metrics
from magic141_jax.train.watch import Watch, WatchConfig


def lines(folder):
    return [{k: v for k, v in line.items() if k != "time"} for line in metrics.read(folder)]


def config(**changes):
    return loop.TrainConfig(**{"steps": 12, "log_every": 5, "save_every": 4, **changes})


def test_resuming_writes_the_same_numbers(toys, tmp_path):
    toys.train(toys.Line(), toys.Points(), tmp_path / "whole", config=config())

    def crash(state, step):
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        toys.train(toys.Line(), toys.Points(), tmp_path / "cut", config=config(sample_every=7), callback=crash)
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "left": 1}\n{"step": 7, "cut sho')
    result = toys.train(toys.Line(), toys.Points(), tmp_path / "cut", config=config())
    assert result.step == 12 and not result.stopped
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
    assert [line["step"] for line in lines(tmp_path / "cut")] == [5, 10, 12]
    assert "absent" not in lines(tmp_path / "cut")[0]


def test_a_finished_run_is_left_alone(toys, tmp_path):
    toys.train(toys.Line(), toys.Points(), tmp_path, config=config())
    before = lines(tmp_path)
    assert toys.train(toys.Line(), toys.Points(), tmp_path, config=config()).step == 12
    assert lines(tmp_path) == before


def test_a_bad_loss_stops_and_names_the_good_checkpoint(toys, tmp_path):
    with pytest.raises(UserError, match=r"step 7: .*last good checkpoint is .*checkpoints/4"):
        toys.train(toys.Line(), toys.Points(bad=6), tmp_path, config=config())
    with pytest.raises(UserError, match="there is no checkpoint yet"):
        toys.train(toys.Line(), toys.Points(bad=1), tmp_path / "early", config=config())


def test_sigterm_saves_and_ends(toys, tmp_path):
    def ask(state, step):
        os.kill(os.getpid(), signal.SIGTERM)

    result = toys.train(
        toys.Line(), toys.Points(), tmp_path, config=config(sample_every=6, save_every=100), callback=ask
    )
    assert result.stopped and result.step == 7
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    toys.train(toys.Line(), toys.Points(), tmp_path, config=config())
    toys.train(toys.Line(), toys.Points(), tmp_path / "whole", config=config())
    assert lines(tmp_path) == lines(tmp_path / "whole")


def test_another_networks_checkpoint_is_refused(toys, tmp_path):
    toys.train(toys.Line(), toys.Points(), tmp_path, config=config())
    with pytest.raises(UserError, match="does not fit this config"):
        toys.train(toys.Line(roles=("student", "fake")), toys.Points(), tmp_path, config=config())


@pytest.mark.parametrize("name", ["steps", "log_every", "save_every", "accumulate", "keep"])
def test_zero_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1"):
        loop.TrainConfig(**{name: 0})


@pytest.fixture
def swerve(toys):
    """Runs a toy whose clips move by `kernel`: 1 at first, which a poisoned batch and `pull` bring to 0."""

    class Swerve(toys.Line):
        pull = 0.0

        def init(self, key):
            return {"student": {"kernel": jnp.ones((1, 1)), "bias": jnp.zeros((1, 1))}}

        def losses(self, params, batch, key, step):
            kernel, noise = params["student"]["kernel"][0, 0], jax.random.normal(key)
            kick = jnp.mean(batch["y"] - 2 * batch["x"] + 1)
            return {"student": (kick + 0.1 * noise) * kernel + self.pull * kernel**2}, {"noise": noise}

    clips = jax.random.normal(jax.random.key(3), (1, 2, 3, 2, 2, 4))

    def train(folder, *, at=9, pull=0.0, keep=2, callback=None, sample_every=0, **changes):
        values = {"every": 4, "prompts": 1, "warmup": 0, "colour_shift": 0.0, "on_breach": "rollback", **changes}
        known = jnp.zeros((1, 0, 2, 2, 4))
        sample = jax.jit(lambda params: clips * params["student"]["kernel"].reshape(1, 1, 1, 1, 1, 1))
        method, points = Swerve(), toys.Poisoned(at)
        method.pull = pull
        result = toys.train(
            method,
            points,
            folder,
            config=config(steps=16, keep=keep, sample_every=sample_every),
            optimizers={"student": toys.sgd(0.02)},
            watch=Watch.create(WatchConfig(**values), sample, teacher=clips, known=known),
            callback=callback,
        )
        return result, points

    return train


class Kill:
    """A callback that fails when it is called the n-th time."""

    def __init__(self, call):
        self.call = call

    def __call__(self, state, step):
        self.call -= 1
        if not self.call:
            raise RuntimeError(f"killed at {step}")


def test_a_watch_logs_and_lets_a_good_run_pass(swerve, tmp_path):
    result, _ = swerve(tmp_path, at=None)
    looks = [line for line in lines(tmp_path) if "watch/motion" in line]
    assert result.step == 16 and [line["step"] for line in looks] == [4, 8, 12, 16]
    assert all(line["watch/rollbacks"] == 0 and abs(line["watch/motion"] - 1) < 0.1 for line in looks)


def test_a_breach_stops_before_it_is_saved(swerve, tmp_path):
    said = r"^step 12: motion 0\.\d+ .*; diversity .*; the watch stops the run and .* is .*checkpoints/8\. "
    with pytest.raises(UserError, match=said):
        swerve(tmp_path, on_breach="stop")
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()) == ["4", "8"]
    with pytest.raises(UserError, match=r"step 4: .*there is no checkpoint yet"):
        swerve(tmp_path / "early", at=1)


def test_a_rollback_goes_on_by_another_path(swerve, tmp_path, caplog):
    result, points = swerve(tmp_path / "back")
    swerve(tmp_path / "good", at=None)
    assert "step 12: motion" in caplog.text and "; rollback 1 of 2, the last good checkpoint is" in caplog.text
    assert result.step == int(result.state.step) == 16 and not result.stopped
    assert points.position == 20, "the data goes on where it is"
    key = jax.random.key_data(jax.random.fold_in(jax.random.key(0), 1))
    np.testing.assert_array_equal(result.state.key, key)
    back, good = lines(tmp_path / "back"), lines(tmp_path / "good")
    assert [(line["step"], "noise" in line) for line in back] == [(line["step"], "noise" in line) for line in good]
    assert [line for line in back if line["step"] <= 8] == [line for line in good if line["step"] <= 8]
    assert [line["watch/rollbacks"] for line in back if "watch/rollbacks" in line] == [0, 0, 1, 1]
    noises = [[line["noise"] for line in some if line["step"] > 8 and "noise" in line] for some in (back, good)]
    assert not set(noises[0]) & set(noises[1]), "another key"


def test_rollbacks_end(swerve, tmp_path, caplog):
    with pytest.raises(UserError, match=r"step 12: .*stops the run after 2 rollbacks and .*checkpoints/8"):
        swerve(tmp_path, at=None, pull=1.8)
    assert caplog.text.count("the last good checkpoint is") == 2


@pytest.mark.parametrize(("call", "step"), [(2, 10), (3, 10), (4, 15)])
def test_a_killed_run_with_a_watch_ends_the_same(swerve, tmp_path, call, step):
    """Killed on the bad path, after the rollback before a new checkpoint, and after it."""
    whole, _ = swerve(tmp_path / "whole")
    with pytest.raises(RuntimeError, match=f"killed at {step}"):
        swerve(tmp_path / "cut", sample_every=5, callback=Kill(call))
    cut, points = swerve(tmp_path / "cut")
    assert points.position == 20
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
    jax.tree.map(np.testing.assert_array_equal, cut.state, whole.state)


def test_starts_and_means_survive_a_kill(swerve, tmp_path):
    """Looks every 4 steps, of which the run is killed between two, a signal's checkpoint in between."""
    changes = {"at": None, "pull": 0.2, "warmup": 8}
    swerve(tmp_path / "whole", **changes)

    def ask(state, step):
        os.kill(os.getpid(), signal.SIGTERM)

    stopped, _ = swerve(tmp_path / "cut", sample_every=9, callback=ask, **changes)
    assert stopped.stopped and stopped.step == 10
    swerve(tmp_path / "cut", **changes)
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
    growth = [line["watch/grad_norm/student"] for line in lines(tmp_path / "cut") if "watch/motion" in line]
    assert growth[0] == 1 and growth[2] != 1


def test_a_checkpoint_that_the_watch_has_not_seen_is_not_gone_back_to(swerve, tmp_path, caplog):
    def ask(state, step):
        os.kill(os.getpid(), signal.SIGTERM)

    whole, _ = swerve(tmp_path / "whole")
    assert swerve(tmp_path / "cut", sample_every=10, callback=ask)[0].step == 11
    caplog.clear()
    cut, _ = swerve(tmp_path / "cut", keep=9)
    assert "rollback 1 of 2, the last good checkpoint is" in caplog.text and "checkpoints/8" in caplog.text
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
    jax.tree.map(np.testing.assert_array_equal, cut.state, whole.state)
    assert not (tmp_path / "cut" / "checkpoints" / "11").exists()


def test_checkpoints_without_a_look_are_refused(swerve, tmp_path):
    with pytest.raises(UserError, match=r"save_every 4 and train.steps 16 must be multiples of watch.every 8"):
        swerve(tmp_path, every=8)
    assert swerve(tmp_path, every=0)[0].step == 16, "0 never looks"


def test_only_hooks_are_called(toys, tmp_path):
    with pytest.raises(TypeError, match="calback"):
        toys.train(toys.Line(), toys.Points(), tmp_path, config=config(), calback=print)
