"""Pruned weights and their averages are exactly zero after every step of real runs, on disk, and on another mesh."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from magic141_jax import sharding, weights
from magic141_jax.errors import UserError
from magic141_jax.experiment import Experiment, make_config
from magic141_jax.models import mmdit
from magic141_jax.pytree import flatten
from magic141_jax.sparsity.pruning import renews, sparsity_at
from magic141_jax.train import streams
from magic141_jax.train.checkpoint import Checkpoints
from magic141_jax.train.step import jit_step, make_step

STEPS = 6
ONE = {"data": 1}
MIXED = {"data": 1, "fsdp": 2, "tensor": 2, "context": 2}
OTHER = {"data": 2, "fsdp": 4}
PRUNING = {"sparsity": 0.5, "end": 3, "every": 2}
FLOW = {"name": "flow_matching", "known_frames": (0.3, 0.7)}


def build(workdir, mesh, *, method=FLOW, accumulate=1, optimizer=None, **rest):
    """A run of the debug transformer on random records; but for distillation without token refiner, to compile soon."""
    config = make_config(
        model={"model": "mmdit", **dataclasses.asdict(mmdit.debug()), "refiner_blocks": int(method is not FLOW)},
        method=method,
        data={"path": "random", "video_batch": 8, "height": 16, "width": 16, "num_frames": 5, "threads": 0},
        optimizer={"warmup_steps": 0, "learning_rate": 3e-3, "weight_decay": 0.1, **(optimizer or {})},
        train={"steps": STEPS, "accumulate": accumulate},
        mesh=mesh,
        **rest,
    )
    return Experiment.from_config(config, workdir, devices=jax.devices()[: np.prod([*mesh.values()])])


@functools.cache
def program(experiment):
    accumulate = experiment.config.train.accumulate
    return make_step(experiment.method, experiment.optimizers, accumulate=accumulate, layout=experiment.layout)


def steps(experiment, state, *, first=0, last=STEPS):
    """Yields (state, loss, logged sparsity) after every step from `first` to `last`, as the loop makes them."""
    batches = experiment.batches()
    for number in range(last):
        batch = sharding.shard_batch(streams.arrays(next(batches)), experiment.mesh)
        if number >= first:
            state, seen = program(experiment)(state, batch, number)
            yield state, float(seen["loss/student"]), float(seen["sparsity/student"])


def require_sparse(state):
    """Weights are zero just where they are pruned, and so are their averages; returns the masks."""
    masks = flatten(jax.device_get(state.opt_state["student"].masks))
    assert len(masks) in (12, 16), "four kernels of each kind of block, with or without refiner"
    for held in (state.params["student"], state.ema["student"]):
        flat = flatten(jax.device_get(held))
        for path, mask in masks.items():
            np.testing.assert_array_equal(flat[path] == 0, ~mask, err_msg=path)
    return masks


class Run(NamedTuple):
    experiment: Experiment
    state: Any
    losses: list[float]
    masks: dict[str, np.ndarray]
    checkpoints: Checkpoints


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Makes, once for each mesh, a run that is looked at after every step and saved after the fourth."""
    made = {}

    def one(mesh, **options):
        if str(mesh) not in made:
            made[str(mesh)] = walk(tmp_path_factory.mktemp("run"), mesh, **options)
        return made[str(mesh)]

    yield one
    for run in made.values():
        run.checkpoints.close()


def walk(folder, mesh, **options):
    experiment, checkpoints = build(folder, mesh, **options), Checkpoints(folder / "checkpoints")
    losses, masks = [], {}
    start = experiment.initial_state()
    moving = "transformer.double_blocks.video.qkv.kernel"
    first = np.asarray(flatten(start.params["student"])[moving])
    for number, (state, loss, logged) in enumerate(steps(experiment, start)):
        before, masks = masks, require_sparse(state)
        losses.append(loss)
        share = sum((~mask).sum() for mask in masks.values()) / sum(mask.size for mask in masks.values())
        assert logged == pytest.approx(share, abs=1e-6)
        assert not any((masks[path] & ~mask).any() for path, mask in before.items()), "nothing regrows"
        if renews(experiment.config.pruning, number):
            wanted = float(sparsity_at(experiment.config.pruning, number))
            assert share == pytest.approx(wanted, abs=0.02 if wanted == 0.5 else 0.13), "few weights a group: rounded"
        if number == 3:
            checkpoints.save(4, state, experiment.batches(), {})
            checkpoints.wait()
    assert np.abs(np.asarray(flatten(state.params["student"])[moving]) - first)[masks[moving]].max() > 1e-3
    return Run(experiment, state, losses, masks, checkpoints)


@pytest.mark.heavy
def test_zeros_are_exact_after_every_step_and_on_disk(run, tmp_path):
    """Every fourth column or row keeps half: AdamW, with accumulation. Then out to files and in again."""
    experiment, state, _, masks, _ = run(ONE, accumulate=2, pruning=PRUNING)
    assert all(((~mask).sum(-2) == mask.shape[-2] // 2).all() for mask in masks.values())
    assert not renews(experiment.config.pruning, 4)
    for storage in ("float32", "bfloat16", "int8"):
        config = dataclasses.replace(experiment.config, storage=storage)
        dataclasses.replace(experiment, config=config).export(state, tmp_path / storage)
        stored = flatten(weights.load(tmp_path / storage / "transformer")[1])
        for path, mask in masks.items():
            kernel = np.asarray(stored[path.removeprefix("transformer.")])
            assert (kernel[~mask] == 0).all() and ((kernel[mask] != 0).all() or storage == "int8")
    heir = build(tmp_path / "heir", ONE, init_from=str(tmp_path / "float32"), pruning={"inherit": True})
    inherited = require_sparse(heir.initial_state())
    assert all((inherited[path] == mask).all() for path, mask in masks.items())


@pytest.mark.heavy
def test_masks_lie_as_their_kernels_and_zeros_are_exact_over_a_mesh(run):
    """2:4 under Muon, whose updates of single weights depend on all."""
    _, state, _, masks, _ = run(MIXED, optimizer={"name": "muon"}, pruning=PRUNING | {"pattern": "2:4"})
    kernels = flatten(state.params["student"])
    for path, mask in flatten(state.opt_state["student"].masks).items():
        assert mask.sharding.is_equivalent_to(kernels[path].sharding, mask.ndim), path
        assert not mask.sharding.is_fully_replicated, path
        groups = masks[path].reshape(*mask.shape[:-2], -1, 4, mask.shape[-1])
        assert (groups.sum(-2) == 2).all()


@pytest.mark.heavy
def test_a_run_goes_on_with_its_masks_on_another_mesh(run, tmp_path):
    options = {"optimizer": {"name": "muon"}, "pruning": PRUNING | {"pattern": "2:4"}}
    experiment, _, losses, masks, checkpoints = run(MIXED, **options)
    for resumed, tolerance in ((experiment, 0.0), (build(tmp_path, OTHER, **options), 1e-4)):
        restored, _ = checkpoints.restore(resumed.abstract_state, None, step=4)
        again = []
        for state, loss, _ in steps(resumed, restored, first=4):
            again.append(loss)
            assert all((masks[path] == mask).all() for path, mask in require_sparse(state).items())
        np.testing.assert_allclose(again, losses[4:], rtol=tolerance)


def test_without_a_sparsity_the_program_is_the_same(tmp_path):
    texts, optimizers = [], []
    for number, pruning in enumerate(({}, {"sparsity": 0.0, "pattern": "2:4", "end": 4})):
        experiment = build(tmp_path / str(number), ONE, pruning=pruning)
        batch = jax.eval_shape(lambda e=experiment: streams.arrays(next(e.batches())))
        step = jit_step(experiment.method, experiment.optimizers, layout=experiment.layout)
        texts.append(step.lower(experiment.abstract_state, batch, {}, active=experiment.method.roles).as_text())
        optimizers.append(experiment.abstract_state.opt_state["student"])
    assert texts[0] == texts[1]
    assert not any(hasattr(state, "masks") for state in optimizers)


@pytest.mark.heavy
def test_a_student_is_distilled_sparse(weights_folder, tmp_path):
    method = {"name": "regression", "walk": {"steps": 2, "sampler": "euler"}, "known_frames": (0.0, 1.0)}
    experiment = build(tmp_path, ONE, method=method, pruning={"sparsity": 0.5}, teacher=str(weights_folder))
    teacher = flatten(jax.device_get(experiment.method.frozen["teacher"]["transformer"]))
    for state, _, logged in steps(experiment, experiment.initial_state(), last=3):
        masks = require_sparse(state)
        assert logged == 0.5
    exported = flatten(jax.device_get(experiment.method.components(state.averaged())["transformer"][2]))
    for path, mask in masks.items():
        path = path.removeprefix("transformer.")
        assert (exported[path][~mask] == 0).all() and (teacher[path] != 0).all(), "the teacher stays dense"


def test_an_adapter_is_not_pruned(weights_folder, tmp_path):
    method = {"name": "regression", "roles": {"student": "adapter", "rank": 2}, "known_frames": (0.0, 1.0)}
    with pytest.raises(UserError, match=r"config.pruning: .* set config.method.roles.student to 'full'"):
        build(tmp_path, ONE, method=method, pruning=PRUNING, teacher=str(weights_folder))


def test_an_autoencoder_has_nothing_that_is_pruned_by_default(tmp_path):
    config = make_config(
        model={"model": "patch_vae", "latent_channels": 4, "widths": (8, 8)},
        method={"name": "autoencoding"},
        data={"path": "emoji", "video_batch": 8},
        pruning={"sparsity": 0.5},
    )
    with pytest.raises(UserError, match=r"matches none of the kernels, such as"):
        Experiment.from_config(config, tmp_path, devices=jax.devices()[:1])
