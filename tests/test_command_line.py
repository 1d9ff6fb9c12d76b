"""A config with its overrides from a command line; what is wrong with it is one line."""

from pathlib import Path

import pytest
from absl import flags
from ml_collections import config_flags

from magic141_jax import command_line
from magic141_jax.errors import UserError

CONFIG = f"--config={Path(__file__).parents[1] / 'configs' / 'debug.py'}"


@pytest.fixture
def parse(monkeypatch):
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "", flag_values=values)
    flags.DEFINE_string("workdir", None, "", flag_values=values)

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["program", *arguments])
        return command_line.parse(["program", *arguments], values), values

    return run


def test_overrides_reach_the_config(parse):
    config, values = parse(CONFIG, "--config.train.steps=7", "--workdir=w")
    assert config.train.steps == 7 and config.train.log_every == 1 and values.workdir == "w"


def test_no_config_is_none(parse):
    assert parse("--workdir=w")[0] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([CONFIG, "--config.train.stpes=3"], "unknown key config.train.stpes. Did you mean 'steps'"),
        ([CONFIG, "--config.train.steps=many"], "config.train.steps"),
        ([CONFIG, "--workdri=w"], "workdri"),
        ([CONFIG, "extra"], "unexpected argument 'extra'"),
        (["--config=configs/none.py"], "can't read the --config file"),
    ],
)
def test_mistakes_are_one_line(parse, arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        parse(*arguments)
    assert "\n" not in str(caught.value)
