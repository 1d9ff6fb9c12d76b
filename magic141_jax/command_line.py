"""--config=FILE with --config.key=value overrides on a command line, every complaint of the flag libraries one line."""

from __future__ import annotations

import sys

from absl import flags
from ml_collections import ConfigDict

from magic141_jax.errors import UserError, nearest


def parse(arguments: list[str], values: flags.FlagValues = flags.FLAGS) -> ConfigDict | None:
    """Parses a command line, the program's name first, into `values`.

    Args:
      arguments: such as sys.argv, where the config flag looks for its overrides.
      values: with a flag "config" of `config_flags.DEFINE_config_file`.

    Returns:
      the config; None where none was named.

    Raises:
      UserError: an unknown flag or key, a wrong type, a config file that can't be run.
    """
    try:
        rest = values(arguments)
    except (AttributeError, KeyError, TypeError):
        raise UserError(_unknown_key(arguments, values)) from None
    except flags.Error as error:
        raise UserError(str(error)) from None
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}; flags look like --config.train.steps=100")
    config = values["config"].value
    return None if config is None else _readable(config)


def _readable(config: ConfigDict) -> ConfigDict:
    """The config, if its file could be run: the flag library hands on a stand-in that raises when it is looked at."""
    try:
        config.to_dict()
    except UserError:
        raise
    except Exception as error:  # whatever a config file may raise
        raise UserError(f"can't read the --config file: {' '.join(str(error).split())[:300]}") from None
    return config


def _unknown_key(arguments: list[str], values: flags.FlagValues) -> str:
    """Names the first --config.a.b that the config file does not have."""
    start = next(i for i, argument in enumerate(arguments) if argument.lstrip("-").partition("=")[0] == "config")
    # The config flag looks for its overrides in sys.argv, so the file alone can be read only without them there.
    sys.argv = arguments[:1] + arguments[start : start + 1 + ("=" not in arguments[start])]
    values(sys.argv)
    config = _readable(values["config"].value)
    for argument in arguments[1:]:
        path = argument.lstrip("-").partition("=")[0].removeprefix("no").split(".")
        node = config
        for depth, key in enumerate(path[1:] if path[0] == "config" else []):
            if not isinstance(node, ConfigDict) or key not in node:
                known = list(node) if isinstance(node, ConfigDict) else []
                return f"unknown key {'.'.join(path[: depth + 2])}.{nearest(key, known)}"
            node = node[key]
    return "a --config.key=value flag could not be read"
