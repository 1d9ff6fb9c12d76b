"""What reaches a user: one line, an exit code, and never a traceback for their own mistake."""

import errno

import pytest

from magic141_jax.errors import OneLineParser, UserError, nearest, run_entry_point


def failing(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (UserError("no file x.png;\n  check the path"), 2, "no file x.png; check the path"),
        (OSError(errno.ENOSPC, "No space left on device", "out.mp4"), 2, "out.mp4"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "no space left"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_a_mistake_is_one_line_on_stderr(error, code, words, capsys):
    with pytest.raises(SystemExit) as stop:
        run_entry_point(failing(error))
    out, err = capsys.readouterr()
    assert stop.value.code == code and out == ""
    assert err.count("\n") == 1 and err.startswith("error: ") and words in err


@pytest.mark.parametrize("error", [ValueError("ours"), OSError(errno.EIO, "broken disk"), KeyError("x")])
def test_defects_keep_their_traceback(error):
    with pytest.raises(type(error)):
        run_entry_point(failing(error))


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (3, 3)])
def test_the_return_value_is_the_exit_code(returned, code):
    with pytest.raises(SystemExit) as stop:
        run_entry_point(lambda: returned)
    assert stop.value.code == code


def test_nearest_suggests_one_word_or_lists_all():
    assert nearest("stepps", ["steps", "seed"]) == " Did you mean 'steps'?"
    assert nearest("zzz", ["steps", "seed"]) == " Known: steps, seed."


def test_a_wrong_flag_is_one_line():
    parser = OneLineParser(prog="tool")
    parser.add_argument("--size", type=int)
    with pytest.raises(UserError, match=r"invalid int value: 'x' \(see tool --help\)$"):
        parser.parse_args(["--size", "x"])
