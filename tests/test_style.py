"""The house rules that a reader relies on, checked on the syntax tree of every file; each rule is shown to bite."""

import ast
import io
import itertools
import re
import tokenize
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
NAME = "magic141_jax"
RANKS = {
    **dict.fromkeys(["errors", "embedded", "settings", "shapes", "pytree", "command_line", "flops"], 0),
    **dict.fromkeys(["weights", "sharding", "processes", "diffusion", "data"], 1),
    "models": 2,
    **dict.fromkeys(["train", "convert", "sparsity", "quantize"], 3),
    **dict.fromkeys(["distill", "pipelines"], 4),
    **dict.fromkeys(["evaluation", "serve"], 5),
    **dict.fromkeys(["experiment", "demo"], 6),
    **dict.fromkeys(["aot", "recipe", "reproduce", "__main__", "__init__"], 7),
}
NEVER_IMPORTED = {"torch", "torchvision", "diffusers", "configs", "tests"}
UNTESTED = {"__init__", "__main__", "shapes"}
# Folders that exist on one machine only, when they stand at the root.
MACHINE_PATH = re.compile(r"(?<![\w.~}/])/(?:home|root|work|mnt|tmp|Users|workspace|content|scratch|data)/\w")


class Source(NamedTuple):
    """A file under the rules, its path relative to the repository."""

    path: Path
    text: str

    @property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def in_package(self) -> bool:
        return self.path.parts[0] == NAME

    @property
    def part(self) -> str:
        """The folder or module right below the package: what has a rank."""
        return self.path.parts[1].removesuffix(".py")


def sources(*patterns: str) -> list[Source]:
    files = sorted(file for pattern in patterns for file in ROOT.glob(pattern))
    return [Source(file.relative_to(ROOT), file.read_text()) for file in files]


PYTHON = sources("*.py", "docs/*.py", f"{NAME}/**/*.py", "benchmarks/*.py", "configs/**/*.py", "tests/**/*.py")
DOCUMENTS = sources("*.md", "*.txt", "*.toml", ".ci/*", "docs/**/*.md", "weights/**/*.md", "notebooks/*.ipynb")


def imports(tree: ast.AST) -> list[tuple[int, str]]:
    """(line, dotted name) of everything imported below a node; `from a import b` gives a.b."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            found += [(node.lineno, f"{module}.{alias.name}") for alias in node.names]
    return found


def functions(tree: ast.AST) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def ranks(source: Source) -> list[str]:
    """A module imports lower ranks, its own folder, and no torch."""
    if not source.in_package:
        return []
    wrong = []
    own = RANKS[source.path.stem if source.path.stem == "__main__" else source.part]
    for line, name in imports(source.tree):
        first, *rest = name.split(".")
        if first in NEVER_IMPORTED or not first:
            wrong.append(f"{line}: imports {name}")
        elif first == NAME and rest[0] != "__version__":
            other = RANKS[rest[0]]
            same = rest[0] == source.part or own == other == 0 or (rest[0] == "weights" and own == 1)
            if other >= own and not same:
                wrong.append(f"{line}: rank {own} imports {name} of rank {other}")
    return wrong


def late_imports(source: Source) -> list[str]:
    """No first-party import inside a function."""
    found = [pair for function in functions(source.tree) for pair in imports(function)]
    return [f"{line}: {name} in a function" for line, name in found if name.startswith(NAME)]


def sizes(source: Source) -> list[str]:
    """Files up to 600 lines, functions up to 100."""
    lines = source.text.count("\n")
    long = [f for f in functions(source.tree) if f.end_lineno - f.lineno >= 100]
    return [f"{lines} lines"] * (lines > 600) + [f"{f.lineno}: {f.name} is too long" for f in long]


def signatures(source: Source) -> list[str]:
    """Up to 8 parameters; past the third, options are keyword-only, and past the fifth everything is."""
    if not source.in_package:
        return []
    wrong = []
    for f in functions(source.tree):
        positional = [a.arg for a in f.args.posonlyargs + f.args.args if a.arg not in ("self", "cls")]
        required = len(positional) - len(f.args.defaults)
        if len(positional) + len(f.args.kwonlyargs) > 8:
            wrong.append(f"{f.lineno}: {f.name} has more than 8 parameters")
        if len(positional) > 5 or len(positional) > max(3, required):
            wrong.append(f"{f.lineno}: {f.name} has too many positional parameters")
    return wrong


def docstrings(source: Source) -> list[str]:
    """Every module, config and entry point says what it is."""
    told = source.path.parts[0] == "tests" or ast.get_docstring(source.tree)
    return [] if told else ["no module docstring"]


def prints(source: Source) -> list[str]:
    """Only entry points print."""
    if not source.in_package or source.path.stem == "__main__":
        return []
    calls = [node for node in ast.walk(source.tree) if isinstance(node, ast.Call)]
    return [f"{c.lineno}: print" for c in calls if isinstance(c.func, ast.Name) and c.func.id == "print"]


def dead_code(source: Source) -> list[str]:
    """No commented-out code: comments that parse as a statement, or as a call. Formulas may stay."""
    kept = (ast.Expr, ast.AnnAssign, ast.Assign, ast.AugAssign, ast.Pass)
    wrong = []
    for token in tokenize.generate_tokens(io.StringIO(source.text).readline):
        if token.type == tokenize.COMMENT:
            try:
                body = ast.parse(token.string.lstrip("# ")).body
            except SyntaxError:
                continue
            if any(not isinstance(n, kept) or isinstance(getattr(n, "value", None), ast.Call) for n in body):
                wrong.append(f"{token.start[0]}: {token.string}")
    return wrong


def machine_paths(source: Source) -> list[str]:
    """No path that exists on one machine only."""
    lines = enumerate(source.text.splitlines(), 1)
    return [f"{i}: {line.strip()[:100]}" for i, line in lines if MACHINE_PATH.search(line)]


def mirrored(source: Source) -> list[str]:
    """Every module has a test of its name."""
    if not source.in_package or source.path.stem in UNTESTED:
        return []
    test = Path("tests", *source.path.parts[1:-1], f"test_{source.path.name}")
    return [] if (ROOT / test).exists() else [f"no {test}"]


CHECKS = [ranks, late_imports, sizes, signatures, docstrings, prints, dead_code, machine_paths, mirrored]
BITES = [
    (ranks, "diffusion/x.py", "from magic141_jax.models import mmdit"),
    (ranks, "pytree.py", "from magic141_jax import weights"),
    (ranks, "data/x.py", "import magic141_jax.sharding"),
    (ranks, "models/x.py", "import torch.nn"),
    (ranks, "models/x.py", "from . import vae"),
    (late_imports, "train/x.py", "def f():\n    from magic141_jax import pytree"),
    (sizes, "x.py", "\n" * 601),
    (sizes, "x.py", "def f():\n" + "    x = 1\n" * 100),
    (signatures, "x.py", "def f(a, b, c, *, d, e, g, h, i, j): ..."),
    (signatures, "x.py", "def f(a, b, c, d=1): ..."),
    (signatures, "x.py", "def f(a, b, c, d, e, g): ..."),
    (docstrings, "x.py", "import os"),
    (prints, "train/loop.py", "print(1)"),
    (dead_code, "x.py", "# x = f(y)"),
    (dead_code, "x.py", "# import os"),
    (machine_paths, "x.py", "PATH = '/" + "home/me/data'"),
    (mirrored, "diffusion/nothing.py", ""),
]
ALLOWED = [
    (ranks, "pytree.py", "from magic141_jax.errors import UserError"),
    (ranks, "data/x.py", "from magic141_jax import weights\nfrom magic141_jax.data import manifest"),
    (ranks, "data/__main__.py", "from magic141_jax.pipelines import engine"),
    (signatures, "x.py", "def f(self, a, b, c, d, *, e=1): ..."),
    (dead_code, "x.py", "# v = eps - x0\n# (b, f, h, w, c)\n# noqa: E501\n# Why it is so."),
    (machine_paths, "x.py", "# https://example.com/data/set and build/tmp/x and ~/data/y"),
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_rule(check):
    files = PYTHON + DOCUMENTS if check is machine_paths else PYTHON
    wrong = [f"{source.path}:{message}" for source in files for message in check(source)]
    assert not wrong, "\n".join([check.__doc__, *wrong])


@pytest.mark.parametrize(("check", "path", "text"), BITES)
def test_rule_bites(check, path, text):
    assert check(Source(Path(NAME, path), text))


@pytest.mark.parametrize(("check", "path", "text"), ALLOWED)
def test_rule_allows(check, path, text):
    assert not check(Source(Path(NAME, path), text))


def shared_lines(a: Source, b: Source) -> float:
    """The share of the smaller file's distinct telling lines that the other has too."""
    one, two = ({line.strip() for line in s.text.splitlines() if len(line.strip()) > 12} for s in (a, b))
    return len(one & two) / max(min(len(one), len(two)), 15)


def test_no_two_files_share_half_of_their_lines():
    pairs = itertools.combinations(PYTHON, 2)
    wrong = [f"{a.path} and {b.path}: {shared_lines(a, b):.0%}" for a, b in pairs if shared_lines(a, b) > 0.5]
    assert not wrong, "\n".join(wrong)


def test_shared_lines_bite():
    text = "".join(f"telling_name_{i} = {i}\n" for i in range(20))
    half = text.replace("name_1", "other_1")
    assert shared_lines(Source(Path("a.py"), text), Source(Path("b.py"), text)) == 1
    assert shared_lines(Source(Path("a.py"), text), Source(Path("b.py"), half)) < 0.5
