"""Prompts by time: files, mistakes by their line, and what is shown when."""

import pytest

from magic141_jax.errors import UserError
from magic141_jax.pipelines.schedule import Cue, Script, as_schedule, opening, read_schedule, warn_beyond


def written(tmp_path, *lines):
    path = tmp_path / "story.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_file(tmp_path):
    path = written(tmp_path, '{"time": 0, "prompt": "a cat"}', '{"prompt": "a dog", "time": 4.5}', "")
    assert read_schedule(path) == (Cue(0.0, "a cat"), Cue(4.5, "a dog"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{time: 1}", "line 2 .* is not JSON"),
        ("", "line 2 .* is not JSON"),
        ("3", "line 2 .* is no JSON object"),
        ('{"time": 1}', "line 2 .* has no 'prompt'"),
        ('{"prompt": "a dog"}', "line 2 .* has no 'time'"),
        ('{"time": 1, "promt": "a dog"}', "line 2 .* unknown key 'promt'.*'prompt'"),
        ('{"time": "1", "prompt": "a dog"}', "line 2 .* the time '1'"),
        ('{"time": true, "prompt": "a dog"}', "line 2 .* the time True"),
        ('{"time": -1, "prompt": "a dog"}', "line 2 .* the time -1"),
        ('{"time": NaN, "prompt": "a dog"}', "line 2 .* the time nan"),
        ('{"time": 1, "prompt": " "}', "line 2 .* the prompt ' '"),
        ('{"time": 1, "prompt": 3}', "line 2 .* the prompt 3"),
        ('{"time": 0, "prompt": "a dog"}', "line 2 .* put them in order"),
    ],
)
def test_mistakes_are_named_by_their_line(tmp_path, line, message):
    with pytest.raises(UserError, match=message) as raised:
        read_schedule(written(tmp_path, '{"time": 0, "prompt": "a cat"}', line, '{"time": 9, "prompt": "a cow"}'))
    assert "\n" not in str(raised.value)


def test_files_that_are_none(tmp_path):
    with pytest.raises(UserError, match="no schedule"):
        read_schedule(tmp_path / "nowhere.jsonl")
    with pytest.raises(UserError, match="is empty"):
        read_schedule(written(tmp_path, ""))
    (tmp_path / "story.jsonl").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UserError, match="UTF-8"):
        read_schedule(tmp_path / "story.jsonl")


def test_the_opening():
    cues = as_schedule([(0, "a cat"), (2, "a dog")])
    assert opening(None, cues) == ("a cat", cues)
    assert opening("a cow", cues[1:]) == ("a cow", (Cue(0, "a cow"), cues[1]))
    with pytest.raises(UserError, match="line 1 of the schedule is for 2 s"):
        opening(None, cues[1:])
    for none in (None, "", ["a cat", "a dog"]):
        with pytest.raises(UserError, match="prompt is empty"):
            opening(none, ())


def test_late_lines_are_told():
    with pytest.warns(UserWarning, match="line 2 .* 4 s.* ends at 4 s") as told:
        warn_beyond(as_schedule([(0, "a cat"), (4, "a dog")]), 4.0)
    assert len(told) == 1


def test_a_window_shows_the_last_prompt_that_is_not_after_its_start():
    encoded = []
    cues = as_schedule([(0, "a"), (1, "b"), (1.5, "c"), (2.25, "d"), (3, "a"), (9, "late")])
    script = Script(cues, [0.0, 1.0, 2.0, 2.9999999, 4.0], lambda p: encoded.append(p) or p.upper(), encoded={"a": "A"})
    assert encoded == ["b", "c"], "the first is there, the others that are shown are encoded once"
    assert [script.take() for _ in range(5)] == ["A", "B", "C", "A", "A"]
    assert not script


def test_what_is_said_holds_from_the_next_window_until_the_next_line():
    encoded = []
    script = Script([Cue(0, "a"), Cue(3, "b")], [0.0, 1.0, 2.0, 3.0], lambda p: encoded.append(p) or p)
    assert script.take() == "a"
    assert script.say("c") == 1.0 and script.say("d") == 1.0
    assert [script.take(), script.take()] == ["d", "d"]
    assert script.say("d") == 3.0
    assert script.take() == "d" and encoded == ["a", "b", "c", "d"]
    assert script.say("e") is None
    with pytest.raises(UserError, match="empty"):
        script.say(" ")
