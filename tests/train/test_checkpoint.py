"""Everything comes back as it was, on another mesh too; old checkpoints go; a half-written one does not count."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from magic141_jax import sharding
from magic141_jax.errors import UserError
from magic141_jax.sharding import MeshConfig
from magic141_jax.train import optim
from magic141_jax.train.checkpoint import Checkpoints, read_step
from magic141_jax.train.state import TrainState


def make_state(rows=8):
    optimizers = {"student": optim.make(optim.OptimizerConfig(), 10)}
    kernel = jax.random.normal(jax.random.key(1), (rows, 4))
    return TrainState.create({"student": {"kernel": kernel}}, optimizers, seed=5)


class BytesPosition:
    """A data iterator whose position is bytes, as Grain's loader has it."""

    def __init__(self):
        self.state = b"\x00start"

    def get_state(self):
        return self.state

    def set_state(self, state):
        self.state = state


def test_a_state_comes_back_onto_another_mesh(tmp_path):
    state, position = make_state(), BytesPosition()
    position.state = b"\xffhere"
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest is None and checkpoints.restore(state, position) is None
    checkpoints.save(3, state, position, {"seconds": 0.1})
    assert checkpoints.latest == tmp_path / "3"
    layout = sharding.shardings(state, sharding.make_mesh(MeshConfig(fsdp=8)), small=1)
    wanted = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, layout)
    position.state = b"elsewhere"
    restored, progress = checkpoints.restore(wanted, position)
    checkpoints.close()
    assert progress == {"seconds": 0.1} and position.state == b"\xffhere"
    assert restored.params["student"]["kernel"].addressable_shards[0].data.shape == (1, 4)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), jax.device_get(restored))


@pytest.mark.parametrize("position", [b"\x00\xff", {"next": 3}])
def test_positions_as_they_were_saved_before(tmp_path, position):
    """Once for each process, by Grain's handler, and never read differently by another number of processes."""
    checkpoints, saved, read = Checkpoints(tmp_path), BytesPosition(), BytesPosition()
    saved.state = position
    checkpoints.save(1, make_state(), saved, {})
    checkpoints.wait()
    (tmp_path / "1" / "data").mkdir()
    for index in range(2):
        file = tmp_path / "1" / "data" / f"process_{index}-of-2.json"
        shutil.copy(tmp_path / "1" / "position" / "metadata", file)
    shutil.rmtree(tmp_path / "1" / "position")
    checkpoints.restore(make_state(), read)
    assert read.state == position
    checkpoints.close()


def test_only_the_last_ones_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3):
        checkpoints.save(step, make_state(), BytesPosition(), {})
    assert checkpoints.latest == tmp_path / "3"
    checkpoints.close()
    (tmp_path / "4.orbax-checkpoint-tmp").mkdir()  # what a kill in the middle of writing leaves
    again = Checkpoints(tmp_path, keep=2)
    assert again.latest == tmp_path / "3" and not (tmp_path / "1").exists()
    again.close()


def test_what_is_saved_is_as_it_was_when_asked_for(tmp_path, monkeypatch):
    written, save = [], ocp.args.JsonSave
    monkeypatch.setattr(ocp.args, "JsonSave", lambda item: written.append(item) or save(item))
    checkpoints, progress = Checkpoints(tmp_path), {"window": {"loss": [0.0, 0]}}
    checkpoints.save(1, make_state(), BytesPosition(), progress)
    progress["window"]["loss"][0] = 1.0  # the run goes on while Orbax writes
    assert written[-1] == {"window": {"loss": [0.0, 0]}}
    checkpoints.close()


def test_one_step_of_many_is_read(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=9)
    states = {step: dataclasses.replace(make_state(), step=jnp.int32(step)) for step in (1, 2, 3, 4)}
    for step, state in states.items():
        checkpoints.save(step, state, BytesPosition(), {})
    checkpoints.close()
    assert read_step(tmp_path, make_state(), 2).step == 2
    with pytest.raises(UserError, match=r"no checkpoint of step 7 in .*: there are 1, 2, 3, 4; train.keep"):
        read_step(tmp_path, make_state(), 7)
    with pytest.raises(UserError, match="there is none"):
        read_step(tmp_path / "nowhere", make_state(), 7)
    assert not (tmp_path / "nowhere").exists()


def test_going_back_to_an_earlier_one(tmp_path):
    checkpoints, position = Checkpoints(tmp_path, keep=9), BytesPosition()
    for step in (1, 2, 3):
        state = make_state()
        checkpoints.save(step, dataclasses.replace(state, step=jnp.int32(step)), position, {"step": step})
    position.state = b"ahead"
    state, progress = checkpoints.restore(make_state(), None, step=2)
    assert int(state.step) == 2 and progress == {"step": 2} and position.state == b"ahead"
    checkpoints.delete_after(2)
    assert checkpoints.steps == [1, 2] and checkpoints.latest == tmp_path / "2"
    checkpoints.save(3, state, position, {"step": 30})
    assert checkpoints.steps == [1, 2, 3], "the way on can be saved"
    assert checkpoints.restore(make_state(), None)[1] == {"step": 30}
    checkpoints.close()


def test_other_shapes_are_refused(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, make_state(), BytesPosition(), {})
    checkpoints.wait()
    with pytest.raises(UserError, match="does not fit this config"):
        checkpoints.restore(jax.tree.map(jnp.asarray, make_state(rows=6)), BytesPosition())
    checkpoints.close()
