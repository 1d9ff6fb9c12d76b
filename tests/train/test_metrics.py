"""Averages leave out what is absent; lines after a checkpoint are dropped; samples are kept as animations."""

import math

import numpy as np
from PIL import Image

from magic141_jax.train.metrics import MetricWriter, SilentWriter, Window, read


def test_a_window_leaves_out_nan_and_goes_through_json():
    window = Window()
    window.add({"a": 1.0, "b": math.nan, "c": math.nan})
    window = Window(window.to_json())
    window.add({"a": 2.0, "b": 5.0, "c": math.nan})
    assert window.means() == {"a": 1.5, "b": 5.0}
    assert window.means() == {}


def test_lines_after_the_checkpoint_are_dropped_and_floats_are_exact(tmp_path):
    values = np.random.default_rng(0).standard_normal(5).astype(np.float32)
    for start in (0, 2):
        writer = MetricWriter(tmp_path, steps=5, progress=False)
        writer.start(start)
        for step in range(start + 1, 6):
            writer.scalars(step, {"loss": float(values[step - 1])})
        writer.close()
    assert [line["step"] for line in read(tmp_path)] == [1, 2, 3, 4, 5]
    np.testing.assert_array_equal(np.array([line["loss"] for line in read(tmp_path)], np.float32), values)


def test_a_writer_goes_back(tmp_path):
    writer = MetricWriter(tmp_path, steps=5, progress=False)
    writer.start(0)
    for step in (1, 2, 3):
        writer.scalars(step, {"loss": 0.0})
    writer.start(1)
    writer.scalars(2, {"loss": 1.0})
    writer.close()
    assert [(line["step"], line["loss"]) for line in read(tmp_path)] == [(1, 0.0), (2, 1.0)]


def test_samples_are_an_animation(tmp_path):
    writer = MetricWriter(tmp_path, steps=5, progress=False)
    writer.start(0)
    frames = np.zeros((2, 3, 8, 12, 3), np.float32)
    frames[:, 1] = 0.5
    frames[:, 2] = 1.5
    writer.video(4, "samples", frames, fps=8)
    writer.close()
    with Image.open(tmp_path / "samples" / "samples-000004.gif") as picture:
        assert picture.size == (12, 16) and picture.n_frames == 3
        picture.seek(2)
        assert picture.convert("RGB").getpixel((5, 5)) == (255, 255, 255)


def test_only_the_first_process_writes(tmp_path):
    """The other writer has every method of the real one, and does nothing."""
    silent, public = SilentWriter(), {name for name in vars(MetricWriter) if not name.startswith("_")}
    assert public <= set(vars(SilentWriter))
    silent.start(0)
    silent.advance({})
    silent.scalars(1, {"loss": 1.0})
    silent.video(1, "samples", np.zeros((1, 1, 2, 2, 3)), 8)
    silent.close()
    assert not list(tmp_path.iterdir())
