"""A few windows of a long video through tiny random weights, and measures of videos whose drift is known."""

import dataclasses
import json

import numpy as np
import pytest

from magic141_jax.data.emoji import MOTIONS, Scene
from magic141_jax.errors import UserError
from magic141_jax.evaluation import __main__ as command
from magic141_jax.evaluation import drift, plots, protocol
from magic141_jax.evaluation.templates import Search


@pytest.fixture(scope="module")
def search(pack):
    return Search(pack, 64)


def scene(pack, motion="left"):
    return Scene(pack.trained[0], "blue", motion, (32.0, 32.0), 36.0)


def true_video(pack, motion="left", frames=65):
    return pack.render(scene(pack, motion), num_frames=frames).astype(np.float32) / 255


def test_every_window_is_measured(pipeline, pack):
    scenes = protocol.draw_scenes(pack, "train", 1)
    search = Search(pack, protocol.frame_side(pipeline))
    found = drift.measure_drift(pipeline, pack, search, scenes, seconds=26 / 8)
    values = found["windows"]
    assert set(values) == set(drift.MEASURES)
    assert all(len(v) == 3 for v in values.values())  # windows end at frames 8, 16 and 24 of 26
    assert values["identity"] == [0, 0, 0]
    assert np.isfinite(values["subject_psnr"]).all()
    assert max(values["colour_error"]) > 5
    assert set(found["summary"]) == set(drift.SUMMARY)


def test_a_true_video_does_not_drift(pack, search):
    ends = drift.window_ends(65, 17, 1)
    assert ends == [16, 32, 48, 64]
    found = drift.follow(true_video(pack), scene(pack), search, ends)
    assert found.windows["identity"].tolist() == found.windows["nearest"].tolist() == [1] * 4
    np.testing.assert_allclose(found.windows["motion"], 1, atol=0.1)
    np.testing.assert_allclose(found.windows["similarity"], 1, atol=0.15)
    kept = drift.summary([found])
    assert kept["luminance_contrast"] < 0.3 and kept["saturation_contrast"] < 0.3
    assert kept["seam_ratio"] == pytest.approx(1, abs=0.25)
    assert kept["motion_kept"] == pytest.approx(1, abs=0.15) and kept["nearest"] == 1
    assert kept["beat"] == pytest.approx(1, abs=0.1) and kept["still_right"] == 1
    other = dataclasses.replace(scene(pack), subject=pack.trained[1])
    wrong = drift.follow(true_video(pack), other, search, ends)
    assert np.isnan(drift.summary([wrong])["still_right"])
    changed = np.concatenate([true_video(pack, frames=33), pack.render(other, num_frames=32) / np.float32(255)])
    lost = drift.summary([wrong, found, drift.follow(changed, scene(pack), search, ends)])
    assert (lost["nearest"], lost["still_right"]) == (pytest.approx(1 / 3), 0.5)


def test_what_drifts_is_told(pack, search):
    """Darker, greyer, slower and blurred, with a jump at each seam."""
    ends, video = drift.window_ends(65, 17, 1), true_video(pack)
    fade = np.linspace(1, 0.8, 65, dtype=np.float32)[:, None, None, None]
    dark = drift.follow(video * fade, scene(pack), search, ends)
    true = drift.follow(video, scene(pack), search, ends)
    lost = drift.luminance(video).mean() * 0.2 * (1 - drift.ENDS) * 100
    assert dark.contrasts["luminance"] == pytest.approx(lost, rel=0.1)
    assert dark.contrasts["saturation"] > 3 > true.contrasts["saturation"]
    grey = video * fade + (1 - fade) * video.mean(-1, keepdims=True)
    assert drift.follow(grey, scene(pack), search, ends).contrasts["saturation"] > 1
    jumping = np.concatenate([np.roll(video[i : i + 16], 6 * (i // 16), axis=1) for i in range(1, 65, 16)])
    jumping = np.concatenate([video[:1], jumping])
    seams = drift.summary([drift.follow(jumping, scene(pack), search, ends)])["seam_ratio"]
    assert seams > 2 * drift.summary([true])["seam_ratio"]
    spread = drift.summary([drift.follow(jumping, scene(pack), search, ends, faded=3)])["seam_ratio"]
    assert spread == pytest.approx((seams + 3) / 4, rel=0.2), "a fade counts as a whole"
    # More of the motion where a latent frame begins.
    beating = [np.roll(video[0], 4 * -(-i // 4) + i // 2, axis=1) for i in range(65)]
    told = drift.summary([drift.follow(np.stack(beating), scene(pack), search, ends)])
    assert told["beat"] == pytest.approx(told["seam_ratio"], rel=0.3) and told["beat"] > 2
    slow = video[np.minimum(np.arange(65), 16 + np.arange(65) // 2)]
    assert drift.summary([drift.follow(slow, scene(pack), search, ends)])["motion_kept"] < 0.8
    blurred = video.copy()
    blurred[40:] = video[40:].mean((1, 2), keepdims=True)
    assert drift.summary([drift.follow(blurred, scene(pack), search, ends)])["detail_kept"] < 0.1


def test_what_a_caption_does_not_name_is_left_out(pack, search):
    ends = drift.window_ends(33, 17, 1)
    still = drift.follow(true_video(pack, "still", 33), scene(pack, "still"), search, ends)
    assert np.isnan(still.windows["motion"]).all() and np.isfinite(still.contrasts["luminance"])
    grows = drift.follow(true_video(pack, "grows", 33), scene(pack, "grows"), search, ends)
    assert np.isnan(grows.contrasts["luminance"])
    moving = drift.follow(true_video(pack, "left", 33), scene(pack), search, ends)
    both = drift.summary([still, moving, grows])
    assert both["motion_kept"] == pytest.approx(drift.summary([moving])["motion_kept"])
    one = drift.follow(true_video(pack, frames=1), scene(pack), search, drift.window_ends(1, 17, 1))
    assert np.isnan(drift.summary([one])["seam_ratio"])


def test_numbers_of_single_frames():
    red = np.zeros((1, 4, 4, 3), np.float32)
    red[..., 0] = 1
    assert drift.luminance(red) == pytest.approx(0.2126) and drift.saturation(red) == 1
    assert drift.saturation(np.full((1, 4, 4, 3), 0.7)) == 0
    counts = drift.histogram(np.concatenate([red[0], 1 - red[0]]))
    assert counts.sum() == 1 and sorted(counts[counts > 0]) == [0.5, 0.5]
    assert drift.start_end(np.arange(100.0)) == pytest.approx(85)
    for motion, (y, x) in ((name, m.velocity) for name, m in MOTIONS.items() if any(m.velocity)):
        frames = np.zeros((9, 64, 64, 3), np.float32)
        for i in range(9):
            frames[i, 28 + int(i * y) : 36 + int(i * y), 28 + int(i * x) : 36 + int(i * x)] = 1
        assert drift.advance(frames, motion) == pytest.approx(1, abs=0.02)


def test_the_autoencoder_alone(pipeline):
    images = np.random.default_rng(0).random((2, 16, 16, 3)).astype(np.float32)
    found = drift.vae_drift(pipeline, images, 3)
    assert len(found) == 3 and found[0] >= found[-1] > 0


@pytest.mark.heavy
def test_the_command_goes_on_with_the_rows_that_are_missing(weights_folder, tmp_path, capsys, monkeypatch):
    output, plot = tmp_path / "d.json", tmp_path / "d.svg"
    shared = ["drift", "--samples", "1", "--seconds", "2.5", "--output", str(output)]
    row = f"--row=a={weights_folder}"
    assert command.main([*shared, row]) == 0
    first = json.loads(output.read_text())
    assert list(first["rows"]) == ["a"] and len(first["vae"]) == 2
    measured = []
    follow = drift.measure_drift
    monkeypatch.setattr(
        drift, "measure_drift", lambda *args, **kw: measured.append(kw["options"]) or follow(*args, **kw)
    )
    assert (
        command.main([*shared, row, f"--row=b={weights_folder}:anchor=false,match_colors=0.5", f"--plot={plot}"]) == 0
    )
    assert measured == [{"anchor": False, "match_colors": 0.5}]
    assert json.loads(output.read_text())["rows"]["a"] == first["rows"]["a"]
    printed = capsys.readouterr().out
    assert "| b |" in printed and "through the autoencoder alone" in printed
    assert plot.read_text().startswith("<?xml") and "luminance" in plot.read_text()
    with pytest.raises(UserError, match=r"holds videos of .*name another --output"):
        command.main([*shared[:3], "--seconds", "1", *shared[5:], row])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "at least 1 --row"),
        (["--row=a=default:anchor=maybe"], "must be true or false"),
        (["--row=a=default:carry=wrong"], "carry"),
        (["--row=a=default", "--seconds", "0"], "--seconds is 0"),
    ],
)
def test_a_wrong_command_is_told_in_a_line(arguments, message):
    with pytest.raises(UserError, match=message):
        command.main(["drift", *arguments])


def test_curves_over_time():
    rows = {"a": {"x": [1.0, 2.0], "y": [0.0, float("nan")]}, "b": {"x": [2.0, 1.0], "y": [1.0, 1.0]}}
    made = plots.over_time(rows, 2.0, labels={"x": "the x", "y": "the y"}, columns=2)
    assert made == plots.over_time(rows, 2.0, labels={"x": "the x", "y": "the y"}, columns=2)
    assert "the x" in made and "seconds" in made
