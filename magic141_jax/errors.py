"""The one exception that reaches a user as a single line.

Anything that a user can cause and mend (a bad flag, a missing file, a wrong shape) raises `UserError`; the
entry points print it on stderr and exit with code 2. Every other exception is a defect of ours and keeps its
traceback.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import errno
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import NoReturn


class UserError(ValueError):
    """A mistake that the user can mend. The message says what is wrong and how to mend it, in one line."""


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser whose complaints are one line."""

    def error(self, message: str) -> NoReturn:
        """Raises `UserError` instead of printing the usage."""
        raise UserError(f"{message} (see {self.prog} --help)")


def nearest(word: str, known: Iterable[str]) -> str:
    """Returns ` Did you mean 'x'?` for the known word closest to `word`, or the list when none is close."""
    known = [str(k) for k in known]
    match = difflib.get_close_matches(word, known, n=1)
    return f" Did you mean {match[0]!r}?" if match else f" Known: {', '.join(known)}."


@contextlib.contextmanager
def requirements(file: str) -> Iterator[None]:
    """Around the imports of an entry point that `file` installs packages for; exits with one line if one is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("magic141_jax"):
            raise
        sys.exit(_fail(f"the package {error.name!r} is missing: pip install -r {file}"))


def run_entry_point(main: Callable[[], int | None]) -> None:
    """Runs `main` and turns a `UserError`, a full disk or Ctrl-C into one line on stderr and an exit code.

    Exits with main's return value (None counts as 0), 2 after a user's mistake, 130 after an interrupt.
    """
    try:
        code = main() or 0
    except UserError as error:
        code = _fail(str(error))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        code = _fail(f"no space left on the disk while writing {error.filename or 'a file'}; free some and retry")
    except KeyboardInterrupt:
        code = _fail("interrupted") and 130
    sys.exit(code)


def _fail(message: str) -> int:
    sys.stderr.write("error: " + " ".join(message.split()) + "\n")
    return 2
