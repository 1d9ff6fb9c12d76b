"""What a run takes, told before: against what it holds then, and with too little memory or disk."""

import dataclasses
import shutil
from collections import namedtuple
from pathlib import Path

import jax
import numpy as np
import pytest

import sample
from magic141_jax.aot import here, preflight
from magic141_jax.data import cache
from magic141_jax.experiment import Experiment, make_config
from magic141_jax.pipelines.text_to_video import TextToVideoPipeline
from tests.aot.test_training import DATA, MODEL

PROMPT = "a red shark"
WIDE = {"height": 64, "width": 64, "num_frames": 17, "video_batch": 8}
Disk = namedtuple("Disk", "total used free")


@pytest.fixture(autouse=True)
def quick_rate(monkeypatch):
    monkeypatch.setattr(here, "SECONDS", 0.01)
    monkeypatch.setattr(here, "process_memory", lambda devices: 0)
    monkeypatch.setitem(here.SIDES, "cpu", 64)


@pytest.fixture
def memory(monkeypatch):
    """Sets how much is free on each device."""
    return lambda size: monkeypatch.setattr(here, "free_memory", lambda devices: size)


@pytest.fixture
def asked(weights_folder, tmp_path, monkeypatch, capsys):
    """Flags -> exit code and text of sample.py --preflight; it must write nothing and read no parameters."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(TextToVideoPipeline, "from_pretrained", lambda *_, **__: pytest.fail("weights are read"))

    def run(*flags):
        code = sample.main(["--preflight", "--prompt", PROMPT, "--weights", str(weights_folder), *flags])
        assert list(tmp_path.iterdir()) == []
        return code, capsys.readouterr().out

    return run


def config(**rest):
    method = {"name": "flow_matching"}
    data = {**DATA, "path": "random", "image_batch": 0}
    values = make_config(model=MODEL, method=method, data=data | rest.pop("data", {}), mesh={"data": 1}, **rest)
    return values.to_dict() | {"mesh": {"data": 1, "fsdp": 1, "tensor": 1, "context": 1}}


@pytest.fixture
def train_report(tmp_path, monkeypatch):
    """The report of a tiny run on one device, that is not started."""
    devices = jax.devices()[:1]
    whole = Experiment.from_config.__func__
    monkeypatch.setattr(
        Experiment, "from_config", classmethod(lambda cls, *a, **k: whole(cls, *a, **k, devices=devices))
    )

    def make(**rest):
        report = preflight.training(config(**rest), tmp_path / "run")
        assert not (tmp_path / "run").exists()
        return report

    return make


def test_a_clip_fits(asked):
    code, text = asked("--duration", "2")
    assert code == 0
    assert text.splitlines()[0] == "memory on each of 1 cpu" and text.splitlines()[-1] == "it fits"
    for word in ("mmdit", "patch_vae", "bert", "temporaries", "programs to compile", "time, once", "disk"):
        assert word in text


def test_too_little_memory_says_what_would_do(asked, memory, weights_folder):
    _, held, temporaries = preflight._walk({"weights": weights_folder}, PROMPT, {"total_frames": 9, "seed": 0}, None)
    memory(sum(held.values()) + temporaries - 1)
    code, text = asked()
    assert code == 1
    assert text.splitlines()[-1].startswith("it does not fit; it would with --")
    flags = text.splitlines()[-1].partition("it would with ")[2].split()
    assert asked(*flags)[0] == 0
    memory(max(held.values()) // 4)
    code, text = asked()
    assert code == 1 and "what programs need besides was not looked at" in text
    assert text.splitlines()[-1] == "it does not fit; a larger machine is needed"


@pytest.fixture(scope="module")
def wide():
    """The report of a tiny run whose activations outweigh its gradients, and its experiment, on one device."""
    one = jax.devices()[:1]
    values = config(data=WIDE)
    with pytest.MonkeyPatch.context() as patch:
        whole = Experiment.from_config.__func__
        patch.setattr(here, "process_memory", lambda devices: 0)
        patch.setattr(Experiment, "from_config", classmethod(lambda cls, *a, **k: whole(cls, *a, **k, devices=one)))
        return preflight.training(values, Path("nowhere")), Experiment.from_config(values, Path("nowhere"))


@pytest.mark.heavy
def test_training_holds_what_it_says(wide, train_report, memory):
    report, experiment = wide
    state = experiment.initial_state()
    params, moments = (sum(x.nbytes for x in jax.tree.leaves(tree)) for tree in (state.params, state.opt_state))
    ema = sum(x.nbytes for x in jax.tree.leaves(state.ema))
    assert report.held["student, parameters"] == params + ema
    assert report.held["student, moments"] == moments
    batch = sum(x.nbytes for x in jax.tree.leaves(next(experiment.batches())) if isinstance(x, np.ndarray))
    assert report.held["batch"] == 2 * batch
    assert report.fits and report.temporaries > params and report.programs == 2
    assert report.disk == (experiment.config.train.keep + 1) * (params + ema + moments + 4 + 8) + params
    memory(1)  # so that nothing is compiled
    longer = train_report(data=WIDE, train={"steps": 2 * experiment.config.train.steps})
    assert longer.operations == pytest.approx(2 * report.operations)


@pytest.mark.heavy
def test_training_says_what_would_fit(wide, train_report, memory):
    report, experiment = wide
    held, gradients = sum(report.held.values()), preflight._bytes(experiment.abstract_state.params)
    short = dataclasses.replace(report, free=held + 2 * gradients + (report.temporaries - gradients + 1) // 2)
    accumulate, smaller, remat = preflight._training_remedies(short, experiment, short.free)
    assert accumulate == "--config.train.accumulate=2" and smaller == "--config.data.video_batch=4"
    assert remat.startswith("--config.model.remat=full")
    assert not short.fits
    memory(short.free)
    mended = train_report(data=WIDE, train={"accumulate": 2})
    assert mended.fits and mended.temporaries < report.temporaries
    memory(held - 1)
    none = train_report(data=WIDE)
    assert none.temporaries is None and not none.fits and "is too much" in none.notes[0]
    assert none.text().splitlines()[-1] == "it does not fit; a larger machine is needed"


def test_every_size_of_prepared_data_is_a_program(train_report, tmp_path, memory):
    memory(1)  # so that nothing is compiled

    def record(frames, side):
        text = {"text": np.ones((3, 12), np.float16), "text_mask": np.ones(3, bool), "pooled": np.ones(12, np.float16)}
        shape = {"latents": np.zeros((frames, side, side, 4), np.float16)}
        return shape | text | {"anchor": np.zeros((8 * side, 8 * side, 3), np.uint8), "caption": "a clip"}

    with cache.writing(tmp_path / "data") as writer:
        writer.metadata = {"kind": "latent"}
        for side in (2, 4):
            for _ in range(4):
                writer.add("videos", f"{8 * side}x{8 * side}x5", record(2, side))
        null = {
            "text": np.zeros((3, 12), np.float16),
            "text_mask": np.ones(3, bool),
            "pooled": np.zeros(12, np.float16),
        }
        (writer.folder / cache.NULL_TEXT).write_bytes(cache.save(null))
    report = train_report(data={"path": str(tmp_path / "data"), "image_batch": 4})
    assert report.programs == 2 * 2 + 1  # images are first frames, of both sizes too
    one = train_report(data={"path": str(tmp_path / "data")})
    assert one.programs == 2 + 1
    assert one.held["batch"] > 2 * 4 * 2 * (2 * 4 * 4 * 4)  # of the larger size


def test_clips_are_not_prepared(train_report, tmp_path, memory):
    memory(1)
    (tmp_path / "clips").mkdir()
    before = sorted(tmp_path.iterdir())
    report = train_report(data={"path": str(tmp_path / "clips"), "encoders": "default"})
    assert "is prepared when the run starts" in report.notes[0]
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.heavy
def test_train_py(command_line, tmp_path, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    flags = ["--config=configs/debug.py", "--config.mesh.data=-1", "--config.data.image_batch=8"]
    flags += ["--config.data.video_batch=8", f"--workdir={tmp_path / 'run'}", "--preflight"]
    code, text, _ = command_line("train", *flags)
    assert code == 0 and text.splitlines()[0].startswith("memory on each of 8 cpu")
    assert list(tmp_path.iterdir()) == []


def test_a_reports_words(monkeypatch):
    report = preflight.Report(jax.devices()[:1], {"x": 5}, None, 4, 1, 7.2e15, 1e12, 1, Path())
    assert not report.fits and report.needed == 5
    assert "2.0 hours to 12.0 hours" in report.text() and "unknown" in report.text()
    assert preflight._duration(200) == "3.3 minutes" and preflight._duration(5.04) == "5 s"
    enough, silent = (dataclasses.replace(report, free=free) for free in (5, None))
    assert enough.fits and enough.text().endswith("it fits")
    assert silent.fits and "whether it fits is not known" in silent.text()
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Disk(10, 10, 0))
    assert not enough.fits and "the disk of . has too little room" in enough.text()
