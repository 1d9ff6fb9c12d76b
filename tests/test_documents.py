"""Commands in documents are taken by the commands' own parsers, messages are in the code, the reference has all fields.

A block of shell in README.md, CONTRIBUTING.md, docs/ and the cards of weights is read command by command. What starts
Python is run as far as its command line is parsed, a config with its overrides included, and no further. A block that
can't be checked here stands under a comment such as <!-- needs: gcloud -->.
"""

import argparse
import ast
import dataclasses
import importlib.util
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
from absl import flags

from magic141_jax import command_line
from magic141_jax.evaluation import page
from magic141_jax.experiment import METHODS, ExperimentConfig, make_config
from magic141_jax.models import MODELS
from magic141_jax.pipelines.options import SamplingOptions

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("weights/*/README.md")]
BLOCK = re.compile(r"((?:^<!--.*?-->\n)?)^```(?:sh|bash)\n(.*?)^```", re.MULTILINE | re.DOTALL)
COMMENT = re.compile(r"""^((?:[^"'#]|"[^"]*"|'[^']*'|(?<=\S)#)*)(?<!\S)#.*$""")
SCRIPTS = {"magic141-sample": "sample.py", "magic141-train": "train.py"}
NOT_OURS = {"export", "ruff", "basedpyright", "mkdocs", "pytest"}
OURS = re.compile(r"(?:configs|weights|tests|benchmarks|datasets)/[\w./-]+|(?:requirements[\w-]*\.txt)")

# The command of magic141_jax.data is a module of the experiment too.
pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")


def commands(text):
    """The simple commands of shell text as lists of words; variables of loops have their first value."""
    plain = "\n".join(COMMENT.sub(r"\1", line) for line in text.replace("\\\n", " ").splitlines())
    lexer = shlex.shlex(plain.replace("\n", " ; "), posix=True, punctuation_chars=";&|")
    lexer.whitespace_split, lexer.commenters = True, ""
    found, values = [[]], {}
    for word in lexer:
        if set(word) <= set(";&|"):
            found.append([])
        else:
            found[-1].append(word)
    for words in found:
        words = words[1:] if words[:1] == ["do"] else words
        if words[:1] == ["for"]:
            values["$" + words[1]] = words[3]
        elif words and words != ["done"]:
            for name, value in values.items():
                words = [word.replace(name, value) for word in words]
            yield [word for word in words if word != "..."]  # what the text before has said


def blocks(text):
    """(what a block needs that isn't here, its shell text)."""
    return [(mark.strip(), shell) for mark, shell in BLOCK.findall(text)]


def documents():
    """{page or index of experiments: its commands}."""
    found = {}
    for file in PAGES:
        shells = [shell for mark, shell in blocks(file.read_text()) if not mark.startswith("<!-- needs:")]
        found[str(file.relative_to(ROOT))] = [words for shell in shells for words in commands(shell)]
    for index in ROOT.glob("docs/results/*/index.toml"):
        listed = "\n".join(c for e in page.read_index(index.parent).experiment for c in e.commands)
        found[str(index.relative_to(ROOT))] = list(commands(listed))
    return {name: listed for name, listed in found.items() if listed}


class Parsed(Exception):
    """The command line has been parsed."""


@pytest.fixture
def parse(monkeypatch, capsys):
    """Runs the words after `python` until they are parsed; raises AssertionError with what the command says of them."""
    argparse_parse, absl_parse, depth = argparse.ArgumentParser.parse_known_args, command_line.parse, []

    def parse_known_args(self, *args, **kwargs):
        depth.append(self)  # the parser of a subcommand is called by that of the command
        try:
            made, unknown = argparse_parse(self, *args, **kwargs)
        finally:
            depth.pop()
        if depth:
            return made, unknown
        raise Parsed(f"unrecognized: {unknown}" if unknown else "")

    def parse_config(arguments, *values):
        config = absl_parse(arguments, *values)
        if config is not None:
            make_config(**config.to_dict())
        raise Parsed("")

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_known_args)
    monkeypatch.setattr(command_line, "parse", parse_config)
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(ROOT)
    known = set(flags.FLAGS)

    def run(words):
        is_module = words[0] == "-m"
        monkeypatch.setattr(sys, "argv", words[is_module:])
        try:
            (runpy.run_module if is_module else runpy.run_path)(words[is_module], run_name="__main__")
        except Parsed as parsed:
            assert not str(parsed), str(parsed)
        except SystemExit as stopped:
            assert not stopped.code, capsys.readouterr().err
        else:
            raise AssertionError("nothing was parsed")
        finally:
            depth.clear()
            for name in set(flags.FLAGS) - known:  # train.py defines its flags again when it is run again
                delattr(flags.FLAGS, name)

    return run


def check(words, parse):
    """Raises AssertionError unless a command's program, files and flags are there."""
    words = [*SCRIPTS.get(words[0], words[0]).split(), *words[1:]]
    words = ["python", *words] if words[0].endswith(".py") else words
    for word in words:
        for name in OURS.findall(word) if not re.match(r"-+\w*(output|export|workdir|json|plot)", word) else ():
            assert (ROOT / name).exists(), f"no file {name}"
    if words[0] == "python" and words[1:3] != ["-m", "pytest"] and words[1] != "-c":
        parse(words[1:])
    else:
        assert words[0] in NOT_OURS | {"pip", "python"}, f"{words[0]} can't be checked; put <!-- needs: ... --> above"


@pytest.mark.parametrize("name", documents())
def test_commands_are_parsed(name, parse):
    for words in documents()[name]:
        try:
            check(words, parse)
        except AssertionError as error:
            raise AssertionError(f"{name}: {shlex.join(words)}\n{error}") from None


@pytest.mark.parametrize(
    ("shell", "message"),
    [
        ("python sample.py --promt x", "promt"),
        ("magic141-sample --promt x", "promt"),
        ("python sample.py --steps two --prompt x", "steps"),
        ("python train.py --config=configs/debug.py --workdir=w --config.train.stpes=3", "stpes"),
        ("python train.py --config=configs/debug.py --workdir=w --config.method.windows=2", "method.windows"),
        ("for a in x y; do python train.py --config=configs/debug.py --export_step=$a; done", "export_step"),
        ("python train.py --config=configs/none.py --workdir=w", "no file configs/none.py"),
        ("python -m magic141_jax.data prepare SRC DST --sizes 3", "sizes"),
        ("python -m magic141_jax.data prepare SRC", "DST"),
        ("python -m magic141_jax.aot --topolgy=v5p:2x2x2", "topolgy"),
        ("python -m magic141_jax.evaluation compare --rows a=b", "rows"),
        ("pip install -r requirements.txt && python sample.py --sed 3", "sed"),
        ("pip install -r requirements-none.txt", "no file requirements-none.txt"),
        ("gcloud compute tpus", "can't be checked"),
    ],
)
def test_wrong_commands_are_found(shell, message, parse):
    with pytest.raises((AssertionError, ModuleNotFoundError), match=message):
        for words in commands(shell):
            check(words, parse)


def test_shell_is_read_as_a_shell_reads_it():
    text = """a "b c" \\\n  --d='#e'  # not this; nor what's here\nfor i in 1 2; do f --g=$i/h; done && j | k\n"""
    assert list(commands(text)) == [["a", "b c", "--d=#e"], ["f", "--g=1/h"], ["j"], ["k"]]
    marked = "<!-- needs: TPU -->\n```bash\nx\n```\n\n```sh\ny\n```\n"
    assert blocks(marked) == [("<!-- needs: TPU -->", "x\n"), ("", "y\n")]


def messages():
    """Every text of the package and its scripts, with … for what is filled in."""
    found = set()
    for file in (ROOT / "sample.py", ROOT / "train.py", *ROOT.glob("magic141_jax/**/*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [str(x.value) if isinstance(x, ast.Constant) else "…" for x in node.values]
                found.add("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
    return {text for text in found if "\n" not in text}


def test_messages_that_are_explained_are_in_the_code():
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    told = re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)
    assert len(told) > 25
    known = messages()
    for message in told:
        pattern = re.compile(".*".join(map(re.escape, message.split("…"))))
        assert any(pattern.search(text) for text in known), f"no message says: {message}"
    assert not any("the disk is on fire" in text for text in known)


@pytest.fixture(scope="module")
def hooks():
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_has_every_field_of_every_config(hooks):
    text = hooks.configuration()
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))
    configs = [ExperimentConfig, SamplingOptions, *(method.Config for method in METHODS.values())]
    configs += [config for config, _ in MODELS.values()]
    configs += [f.default_factory for f in dataclasses.fields(ExperimentConfig) if isinstance(f.default_factory, type)]
    for config in configs:
        if config is dict:
            continue
        told = "".join(sections.get(base.__name__, "") for base in config.__mro__)
        missing = [f.name for f in dataclasses.fields(config) if f"| `{f.name}` |" not in told]
        assert not missing, f"{config.__name__} lacks {missing}"
    row = next(line for line in sections["TrajectoryConfig"].splitlines() if "`substeps`" in line)
    assert row == "| `substeps` | `int` | `4` | m. |"
    assert "[DistillationConfig](#distillationconfig)" in sections["TrajectoryConfig"]


def test_every_module_has_its_place_in_the_reference(hooks):
    pages = "\n".join(hooks.reference(part, modules) for part, modules in hooks.parts().items())
    listed = set(re.findall(r"^::: ([\w.]+)$", pages, re.MULTILINE))
    files = [f.relative_to(ROOT).with_suffix("") for f in ROOT.glob("magic141_jax/**/*.py") if f.stem != "__main__"]
    assert listed == {".".join(file.parts).removesuffix(".__init__") for file in files}
    told = hooks.commands()
    folders = {file.parent for file in files if (ROOT / file.parent / "__main__.py").exists()}
    assert all(f"\n## python -m {'.'.join(folder.parts)}\n" in told for folder in folders)


SHEET = "![a](repository/weights/emoji64/contact_sheet.png)"


@pytest.mark.parametrize(
    ("link", "source", "want"),
    [
        ("[a](long_video.md#measured)", "pods.md", "[a](long_video.md#measured)"),
        ("[a](../long_video.md)", "tutorials/distil.md", "[a](../long_video.md)"),
        ("[a](../CONTRIBUTING.md)", "index.md", "[a](contributing.md)"),
        ("[a](../sample.py)", "index.md", "[a](URL/blob/main/sample.py)"),
        ("[a](results/distillation)", "experiments.md", "[a](URL/tree/main/docs/results/distillation)"),
        ("[a](docs/pods.md#x)", "changelog.md", "[a](pods.md#x)"),
        (
            "![a](../weights/emoji64/contact_sheet.png)",
            "index.md",
            SHEET,
        ),
        ("[a](missing.md)", "index.md", "[a](missing.md)"),
        ("[a](https://example.com/b)", "index.md", "[a](https://example.com/b)"),
    ],
)
def test_links_lead_to_the_site_or_to_the_repository(hooks, link, source, want):
    moved = {page: name for name, page in hooks.MOVED.items()}
    base = hooks.PurePosixPath(moved.get(source, f"docs/{source}"))
    assert hooks.LINK.sub(lambda found: hooks.relink(found, base, source, "URL/"), link) == want
