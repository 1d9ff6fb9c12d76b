"""The pieces of a tiny pipeline do what their names say; a start is one of sample.py."""

import pytest

from magic141_jax import flops
from magic141_jax.errors import UserError
from magic141_jax.evaluation.speed import __main__ as command
from magic141_jax.evaluation.speed import clock, stages

NAMES = ["text", "image tokens", "evaluation, picture", "picture", "evaluation, clip", "denoise", "decode"]
NAMES += ["re-encode", "clip"]


@pytest.fixture(scope="module")
def pieces(pipeline):
    return stages.pieces(pipeline, "a red shark", {"num_inference_steps": 3, "num_frames": 5})


def test_every_piece_runs(pieces):
    assert list(pieces) == NAMES
    times = clock.in_turns({name: piece.run for name, piece in pieces.items()}, 1)
    assert all(timing.least > 0 for timing in times.values())
    assert [pieces[name].steps for name in ("denoise", "evaluation, clip", "decode")] == [3, 1, 0]
    assert [pieces[name].frames for name in ("picture", "clip", "re-encode")] == [1, 5, 1]


def test_shapes(pieces):
    assert pieces["decode"].run().shape == (1, 5, 32, 32, 3)
    assert pieces["evaluation, clip"].run().shape == pieces["denoise"].run().shape == (1, 2, 4, 4, 4)
    assert pieces["evaluation, picture"].run().shape == (1, 1, 4, 4, 4)
    assert pieces["image tokens"].run().shape == (1, 4, 12)


def test_operations_are_those_of_the_transformer(pieces, pipeline):
    """A clip has twice the latent frames, and the picture's tokens besides."""
    clip, picture = (pieces[f"evaluation, {name}"].operations for name in ("clip", "picture"))
    assert picture < clip < 3 * picture
    assert pieces["decode"].operations is None and flops.__doc__


def test_a_video_of_any_length(pipeline):
    piece = stages.video(pipeline, "a cat", {"num_inference_steps": 1}, 13)
    piece.run()
    assert (piece.frames, piece.steps) == (13, 1)


def test_a_start_is_timed_until_its_first_frame_and_its_end(tmp_path, monkeypatch):
    script = tmp_path / "sample.py"
    script.write_text(
        "import os, pathlib, sys, time\n"
        "out = pathlib.Path(sys.argv[-1]); cache = pathlib.Path(os.environ['MAGIC141_JAX_CACHE'], 'x')\n"
        "time.sleep(0 if cache.exists() else 0.5); cache.write_text('')\n"
        "out.with_name('.out-1.png').write_text('a'); time.sleep(0.2); out.write_text('b')\n"
        "sys.exit('error: no luck' if '--bad' in sys.argv else 0)\n"
    )
    monkeypatch.setattr(stages, "SAMPLE", script)
    found = stages.starts(["--prompt=a"])
    assert found["cold"]["first frame"] > found["warm"]["first frame"] + 0.2
    for each in found.values():
        assert each["finished"] >= each["first frame"] + 0.15 and each["cpu"] >= 0
    with pytest.raises(UserError, match=r"sample.py failed: error: no luck"):
        stages.starts(["--bad"])
    monkeypatch.setattr(stages, "SAMPLE", tmp_path / "none.py")
    with pytest.raises(UserError, match=r"no none.py beside the package"):
        stages.starts([])


def test_the_command(command_line, weights_folder, tmp_path):
    flags = ["--weights", weights_folder, "--duration", "2", "--repeats", "1", "--no-starts", "--num_frames", "5"]
    code, out, _ = command_line("magic141_jax.evaluation.speed.__main__", *flags, "--json", tmp_path / "speed.json")
    assert code == 0 and (tmp_path / "speed.json").exists()
    lines = [line.split(" | ") for line in out.splitlines() if line.startswith("| ")]
    assert [line[0].removeprefix("| ") for line in lines[2:]] == [*NAMES, "video"]
    assert all(line[1] == "32x32" and line[7] == "warm" for line in lines[2:])
    assert lines[-1][2] == "16"


def test_flags_of_a_start():
    args = command.parse(["--weights", "w", "--steps", "2", "--prompt", "a cat", "--size", "64x32"])
    assert command.start_arguments(args, 2.5) == [
        *("--weights=w", "--steps=2", "--size=64x32", "--prompt=a cat", "--duration=2.5")
    ]
    assert command.options(args) == {"num_inference_steps": 2, "width": 64, "height": 32}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--repeats", "0"], "from 1 to"),
        (["--duration", "-1"], "from 0 to"),
        (["--size", "64xa"], "WIDTHxHEIGHT"),
        (["--json", "none/there.json"], "no folder none"),
    ],
)
def test_bad_flags(flags, message):
    with pytest.raises(UserError, match=message):
        command.parse(flags)
