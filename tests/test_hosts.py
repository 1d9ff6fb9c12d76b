"""train.py in two and in four real processes: the losses of one, killed, resumed elsewhere, stopped by a signal to one.

Losses are compared with those of one device in float32. Meshes add up in different orders; after 80 steps of AdamW a
loss is some 1e-6 off, and 1e-4 is allowed.
"""

import json
import os
import random
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from magic141_jax import weights
from magic141_jax.experiment import Experiment

ROOT = Path(__file__).parents[1]
STEPS = 80
# The smallest network with all that a run does: a start fitted to the data, previews, statistics for the export.
AUTOENCODER = f"""
from magic141_jax.experiment import make_config


def get_config():
    return make_config(
        model={{"model": "patch_vae", "latent_channels": 4, "widths": (8, 8), "encoder_blocks": (0, 0),
               "decoder_blocks": (0, 0)}},
        method={{"name": "autoencoding", "init_records": 8}},
        data={{"path": "emoji", "video_batch": 8, "height": 16, "width": 16, "num_frames": 5, "threads": 1}},
        optimizer={{"warmup_steps": 2}},
        train={{"steps": {STEPS}, "log_every": 1, "save_every": 8, "sample_every": 32}},
    )
"""

pytestmark = pytest.mark.heavy


class Processes:
    """train.py in `count` processes of `devices` CPU devices each, on one work folder."""

    def __init__(self, count, devices, config, workdir, *overrides):
        self.workdir = Path(workdir)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "train.py", f"--config={config}", f"--workdir={workdir}", "--noprogress", *overrides]
        self.all, self.begin = [], time.time()
        for index in range(count):
            environment = os.environ | {
                "MAGIC141_JAX_CACHE": str(Path(tempfile.gettempdir()) / "magic141-jax-hosts-test-cache"),
                "JAX_PLATFORMS": "cpu",
                "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
                "JAX_NUM_CPU_DEVICES": str(devices),
                "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                "JAX_NUM_PROCESSES": str(count),
                "JAX_PROCESS_ID": str(index),
                "MAGIC141_JAX_START_SECONDS": "150",
                "MAGIC141_JAX_HEARTBEAT_SECONDS": "10",
            }
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            self.all.append(subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes))

    def signal_at(self, step, number, index):
        """Sends a signal to one process once it has written the metrics of a step itself."""
        path = self.workdir / "metrics.jsonl"
        while not (path.exists() and path.stat().st_mtime > self.begin and path.read_text().count("\n") >= step):
            assert all(process.poll() is None for process in self.all), self.finish()
            time.sleep(0.02)
        self.all[index].send_signal(number)

    def finish(self):
        """(exit code, stdout, stderr) of each, all of which have to end; without what Gloo prints."""
        try:
            texts = [process.communicate(timeout=300) for process in self.all]
        finally:
            for process in self.all:
                process.kill()
        printed = [re.sub(r"\[Gloo\].*\n", "", output) for output, _ in texts]
        return [(p.returncode, said, text[1]) for p, said, text in zip(self.all, printed, texts, strict=True)]


def alone(config, workdir, devices, **mesh):
    """Trains to the end in this process."""
    config = config.copy_and_resolve_references()
    config.mesh.update(mesh)
    experiment = Experiment.from_config(config, workdir, devices=jax.devices()[:devices])
    return experiment, experiment.train(progress=False)


def losses(workdir):
    """The losses of steps 1, 2, 3..., none left out and none twice."""
    found = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in found] == list(range(1, len(found) + 1))
    (name,) = [name for name in found[0] if name.startswith("loss/")]
    return np.array([line[name] for line in found])


def same(workdir, whole, *, least=1):
    """Asserts that a run's losses are those of the whole run, as far as it went."""
    found = losses(workdir)
    assert least <= len(found) <= len(whole)
    np.testing.assert_allclose(found, whole[: len(found)], rtol=1e-4)


def saved(workdir):
    names = [path.name for path in (workdir / "checkpoints").iterdir()]
    return sorted(int(name) for name in names if name.isdecimal())  # not what a kill has left half written


def copied(workdir, name):
    return Path(shutil.copytree(workdir, workdir.with_name(name)))


def stopped(done, workdir):
    """Asserts that all have ended well and saved once, told by the first; returns the step."""
    assert [code for code, _, _ in done] == [0] * len(done), done
    ((_, output, _), *rest) = done
    (step,) = [int(line.split()[5].rstrip(";")) for line in output.splitlines() if line.startswith("stopped and saved")]
    assert all(output == "" for _, output, _ in rest), "one process prints"
    assert saved(workdir)[-1] == step < STEPS and not (workdir / "weights").exists()
    assert [s for s in saved(workdir) if s % 8] == [step] * (step % 8 > 0)
    assert len(losses(workdir)) == step
    return step


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """The file of a config, and the config."""
    path = tmp_path_factory.mktemp("config") / "tiny.py"
    path.write_text(AUTOENCODER)
    return path, runpy.run_path(str(path))["get_config"]()


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """The losses of one process with one device that was never killed."""
    workdir = tmp_path_factory.mktemp("whole")
    alone(config[1], workdir, 1)
    return losses(workdir)


@pytest.fixture(scope="module")
def killed(config, tmp_path_factory):
    """The work folder of two processes with two devices each, one of which was killed at a random step."""
    workdir, chance = tmp_path_factory.mktemp("two") / "killed", random.Random(141)
    run = Processes(2, 2, config[0], workdir)
    run.signal_at(chance.randint(18, 40), signal.SIGKILL, chance.randrange(2))
    begin = time.monotonic()
    codes = sorted(code for code, _, _ in run.finish())
    assert codes[0] < 0 and codes[1] != 0, "the other one ends too"
    assert time.monotonic() - begin < 60
    assert not (workdir / "weights").exists() and saved(workdir)
    return workdir


@pytest.mark.parametrize("devices", [1, 8])
def test_a_killed_run_goes_on_in_one_process(config, whole, killed, devices):
    workdir = copied(killed, f"on-{devices}")
    _, result = alone(config[1], workdir, devices, fsdp=min(devices, 2))
    assert result.step == STEPS
    same(workdir, whole, least=STEPS)


def test_a_killed_run_goes_on_in_two_processes_and_a_signal_to_one_stops_both(config, whole, killed):
    workdir = copied(killed, "stopped")
    before = saved(workdir)[-1]
    run = Processes(2, 1, config[0], workdir, "--config.mesh.fsdp=2")
    run.signal_at(before + 2, signal.SIGTERM, 1)
    assert stopped(run.finish(), workdir) > before
    same(workdir, whole)
    run = Processes(2, 1, config[0], workdir, "--config.mesh.fsdp=2")
    (code, output, errors), (other, nothing, _) = run.finish()
    assert code == other == 0 and f"{STEPS} steps done" in output and nothing == "", errors
    same(workdir, whole, least=STEPS)
    assert (workdir / "samples" / f"samples-{STEPS:06d}.gif").exists()
    # What both have written is what one process reads from their last checkpoint.
    experiment = Experiment.from_config(config[1], workdir, devices=jax.devices()[:1])
    experiment.export(experiment.restore(), workdir / "mine")
    (theirs, params), (mine, expected) = (weights.load(workdir / name / "vae") for name in ("weights", "mine"))
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    for name in ("latent_mean", "latent_std"):
        np.testing.assert_allclose(theirs.pop(name), mine.pop(name), atol=1e-5)
    assert theirs == mine


def test_four_processes_and_ctrl_c(config, whole, tmp_path):
    run = Processes(4, 1, config[0], tmp_path / "four", "--config.mesh.data=2", "--config.mesh.fsdp=2")
    run.signal_at(9, signal.SIGINT, 2)
    stopped(run.finish(), tmp_path / "four")
    same(tmp_path / "four", whole, least=9)
    alone(config[1], tmp_path / "four", 1)
    same(tmp_path / "four", whole, least=STEPS)


def test_two_processes_share_a_sequence(tmp_path):
    debug = runpy.run_path(str(ROOT / "configs/debug.py"))["get_config"]()
    debug.data.update({"image_batch": 0, "height": 16, "width": 16, "threads": 0})
    debug.train.steps = 3
    sizes = [f"--config.data.{name}={debug.data[name]}" for name in ("image_batch", "height", "width", "threads")]
    mesh = ["--config.mesh.data=1", "--config.mesh.context=2"]
    run = Processes(2, 1, "configs/debug.py", tmp_path / "two", "--config.train.steps=3", *sizes, *mesh)
    experiment, result = alone(debug, tmp_path / "one", 1)
    assert [code for code, _, _ in run.finish()] == [0, 0]
    same(tmp_path / "two", losses(tmp_path / "one"), least=3)
    experiment.export(result.state, tmp_path / "one" / "weights")
    for part in ("transformer", "image_encoder"):
        params = [weights.load(tmp_path / run / "weights" / part)[1] for run in ("one", "two")]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), *params)
