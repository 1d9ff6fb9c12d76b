"""Distillation as a run: resumed to the bit, spread over devices, watched, previewed; and the docs' own method."""

import dataclasses
import importlib.util
import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magic141_jax import sharding, weights
from magic141_jax.errors import UserError
from magic141_jax.experiment import RULES, Experiment, make_config
from magic141_jax.models import mmdit
from magic141_jax.pipelines.components import load_components
from magic141_jax.pytree import flatten
from magic141_jax.train import metrics

ROOT = Path(__file__).parents[1]
ONE = jax.devices()[:1]


def tiny(weights_folder, *, method, model=None, **rest):
    """The sizes of `weights_folder`, which is the teacher, on random videos."""
    image_encoder = weights.read_config(weights_folder / "image_encoder" / "config.json")
    return make_config(
        model={"model": "mmdit", **dataclasses.asdict(mmdit.debug()), **(model or {})},
        image_encoder=image_encoder,
        method={"known_frames": (0.0, 1.0), **method},
        data={"path": "random", "video_batch": 8, "height": 32, "width": 32, "num_frames": 5, "threads": 0},
        teacher=str(weights_folder),
        components_from=str(weights_folder),
        **rest,
    )


def dmd(weights_folder, **rest):
    """A full student, an adapter as the fake score, which is trained twice as often."""
    method = {"name": "dmd", "walk": {"steps": 2}, "guidance": 2.0, "ratio": 2, "roles": {"rank": 2}}
    train = {"steps": 4, "log_every": 1, "save_every": 2, **rest.pop("train", {})}
    optimizer = {"warmup_steps": 2, "ema_decay": 0.9}
    return tiny(weights_folder, method=method, train=train, optimizer=optimizer, **rest)


@pytest.fixture(scope="module")
def whole(weights_folder, tmp_path_factory):
    """A run without a break, which shows samples at its end: (its folder, its last state)."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    config = dmd(weights_folder, train={"sample_every": 4})
    return folder, Experiment.from_config(config, folder, devices=ONE).train(progress=False).state


class Interrupted:
    """Batches that ask for a stop while number `at` is drawn."""

    def __init__(self, batches, at):
        self._batches, self._left = batches, at

    def __next__(self):
        self._left -= 1
        if not self._left:
            os.kill(os.getpid(), signal.SIGTERM)
        return next(self._batches)

    def __getattr__(self, name):
        return getattr(self._batches, name)


@pytest.mark.heavy
def test_a_run_stopped_at_an_odd_step_ends_as_one_that_ran_through(whole, weights_folder, tmp_path, monkeypatch):
    experiment = Experiment.from_config(dmd(weights_folder), tmp_path, devices=ONE)
    with monkeypatch.context() as patch:
        batches = experiment.batches()
        patch.setattr(Experiment, "batches", lambda self: Interrupted(batches, 3))
        stopped = experiment.train(progress=False)
    assert stopped.stopped and stopped.step == 3
    state = Experiment.from_config(dmd(weights_folder), tmp_path, devices=ONE).train(progress=False).state
    assert set(state.params) == {"student", "fake"} == set(state.opt_state) == set(state.ema)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), jax.device_get(whole[1]))
    assert list(flatten(state.params["fake"])) != list(flatten(state.params["student"]))


@pytest.mark.heavy
def test_a_student_is_previewed_by_its_own_walk(whole):
    assert (whole[0] / "samples" / "samples-000004.gif").stat().st_size > 0


def test_an_export_may_borrow_what_it_has_not_changed(whole, weights_folder, tmp_path):
    base, student = tmp_path / "base", tmp_path / "student"
    shutil.copytree(weights_folder, base)
    config = dmd(weights_folder, borrow=True)
    config.components_from = config.teacher = str(base)
    experiment = Experiment.from_config(config, tmp_path / "run", devices=ONE)
    experiment.export(whole[1], student)
    assert sorted(path.name for path in student.iterdir()) == ["model_index.json", "transformer"]
    made = load_components(student)
    assert (made.sampling.num_inference_steps, made.sampling.guidance_scale) == (2, 1.0)
    jax.tree.map(np.testing.assert_array_equal, made.vae.params, load_components(base).vae.params)
    with pytest.raises(UserError, match=r"beside .*elsewhere"):
        experiment.export(whole[1], tmp_path / "elsewhere" / "student")


@pytest.mark.heavy
def test_a_teacher_lies_over_the_mesh_and_changes_no_number(whole, weights_folder, tmp_path):
    before = {id(x) for x in jax.live_arrays()}
    config = dmd(weights_folder, mesh={"data": 2, "fsdp": 4}, watch={"every": 2, "prompts": 4}, train={"steps": 2})
    experiment = Experiment.from_config(config, tmp_path)
    frozen = dict(experiment.method.frozen)
    wanted = sharding.shardings(frozen, experiment.mesh, RULES)
    assert all(jax.tree.leaves(jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), frozen, wanted)))
    split = jax.tree.map(lambda s: not s.is_fully_replicated, wanted)
    assert sum(jax.tree.leaves(split)) > 10
    sizes = {x.shape for x, is_split in zip(*map(jax.tree.leaves, (frozen, split))) if is_split}
    state = experiment.initial_state()
    mine = [x for x in jax.live_arrays() if id(x) not in before and x.shape in sizes]
    assert mine and not [x.shape for x in mine if x.is_fully_replicated], "no second copy on one device, or on all"
    del state
    experiment.train(progress=False)
    lines = metrics.read(tmp_path)
    looks = {name: value for line in lines for name, value in line.items() if name.startswith("watch/")}
    assert {"watch/motion", "watch/diversity", "watch/first_frame_error", "watch/colour_shift"} <= looks.keys()
    losses = [[line["loss/fake"] for line in read if "loss/fake" in line] for read in (lines, metrics.read(whole[0]))]
    np.testing.assert_allclose(losses[0], losses[1][:2], rtol=2e-4)


def test_memory_is_known_before_training(weights_folder, tmp_path):
    experiment = Experiment.from_config(dmd(weights_folder), tmp_path, devices=ONE)
    rows = {line.split()[0]: line[20:].split() for line in experiment.memory().splitlines()[1:-1]}
    held = {
        "student": experiment.abstract_state.params["student"],
        "fake": experiment.abstract_state.params["fake"],
        "teacher": experiment.method.frozen["teacher"],
    }
    for role, tree in held.items():
        size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)) / 2**30
        assert float(rows[role][0]) == pytest.approx(size, rel=1e-3)
    assert float(rows["student"][2]) == pytest.approx(2 * float(rows["student"][0]), rel=1e-2), "two moments"
    assert not tmp_path.joinpath("config.json").exists()


def test_static_output_is_caught(weights_folder, tmp_path):
    teacher = tmp_path / "teacher"
    shutil.copytree(weights_folder, teacher)
    path = teacher / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction": "sample"}))
    config = tiny(
        teacher,
        model={"prediction": "sample"},
        method={"name": "consistency", "known_frames": (1.0,), "walk": {"steps": 2}},
        train={"steps": 4, "log_every": 1, "save_every": 2},
        # Weights that decay to nothing leave a network that says the same of every frame.
        optimizer={"learning_rate": 1e-3, "weight_decay": 1e3, "warmup_steps": 0, "clip_norm": 1e-6},
        watch={"every": 2, "prompts": 2, "warmup": 2},
    )
    with pytest.raises(UserError, match=r"step 4: motion [\d.e-]+ of the teacher's is below 0\.5.*checkpoints/2\b"):
        Experiment.from_config(config, tmp_path / "run", devices=ONE).train(progress=False)
    look = [line for line in metrics.read(tmp_path / "run") if "watch/motion" in line][-1]
    assert look["watch/motion"] < 0.1 and look["step"] == 4


@pytest.mark.heavy
def test_the_method_of_the_docs_trains(weights_folder, tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "distillation.md").read_text(), re.DOTALL)
    for name, text in zip(("endpoint", "its_config"), blocks, strict=True):
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    spec = importlib.util.spec_from_file_location("its_config", tmp_path / "its_config.py")
    its_config = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(its_config)
    given = its_config.get_config()
    assert given.method.name == "endpoint:EndPoint" and given.method.teacher_steps == 8
    config = tiny(weights_folder, method=given.method.to_dict() | {"teacher_steps": 3}, train={"steps": 2})
    config.train.log_every, config.watch.every, config.watch.prompts, config.train.save_every = 1, 2, 2, 2
    experiment = Experiment.from_config(config, tmp_path / "run", devices=ONE)
    start = jax.device_get(experiment.initial_state().params["student"])
    result = experiment.train(progress=False)
    lines = [line for line in metrics.read(tmp_path / "run") if "loss/student" in line]
    assert [line["student/video_distance"] > 0 for line in lines] == [True, True]
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), start, result.state.params["student"])
    assert max(jax.tree.leaves(moved)) > 0
    sys.modules.pop("endpoint")
