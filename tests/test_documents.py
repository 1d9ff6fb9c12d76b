"""Commands in documents do what they say, messages are in the code, the reference has all fields.

A block of shell in README.md, CONTRIBUTING.md, docs/ and the cards of weights is read command by command, and each is
run twice: as far as its command line is parsed, a config with its overrides included; and to its end, with flags behind
it that make it short (`SHORTER`), in a copy of the repository. What needs more than a test has, other hardware or
hours, stands under a comment such as <!-- needs: a TPU -->, and is only parsed.
"""

import argparse
import ast
import dataclasses
import functools
import importlib.util
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import jax
import pytest
from absl import flags

from magic141_jax import command_line
from magic141_jax.data.emoji import EmojiPack, caption, poster
from magic141_jax.evaluation import page
from magic141_jax.experiment import METHODS, ExperimentConfig, make_config
from magic141_jax.models import MODELS
from magic141_jax.pipelines import media
from magic141_jax.pipelines.options import SamplingOptions
from tests.conftest import is_ready
from tests.serve.conftest import wait

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("weights/*/README.md")]
BLOCK = re.compile(r"((?:^<!--.*?-->\n)?)^```(?:sh|bash)\n(.*?)^```", re.MULTILINE | re.DOTALL)
COMMENT = re.compile(r"""^((?:[^"'#]|"[^"]*"|'[^']*'|(?<=\S)#)*)(?<!\S)#.*$""")
SCRIPTS = {"magic141-sample": "sample.py", "magic141-train": "train.py"}
NOT_OURS = {"export", "ruff", "basedpyright", "mkdocs", "pytest", "curl", "gcloud", "xpk"}
NOT_RUN = {"pip", "ruff", "basedpyright", "mkdocs", "python -m pytest", "export"}  # all but the last by .ci/run
SHORTER = {  # of two equal flags the last one counts
    "train.py": "--config.train.steps=1 --config.train.log_every=1 --config.train.sample_every=0 --noprogress",
    "-m magic141_jax.data prepare": "--limit 6 --overwrite",
    "-m magic141_jax.evaluation compare": "--samples 2 --draws 2 --seeds 0 --splits triples",
    "-m magic141_jax.evaluation report": "--samples 2 --draws 2 --seeds 0 --splits triples --videos 1",
    "-m magic141_jax.evaluation drift": "--samples 1 --seconds 4",
    "-m magic141_jax.evaluation.speed": "--repeats 1 --long_repeats 1 --duration 4 --no-starts",
    "-m magic141_jax.evaluation": "--samples 1",
    "-m magic141_jax.sparsity": "--prompts few.txt",
    "-m magic141_jax.quantize": "--no_calibration",
    "benchmarks/against_torch.py": "--cases dit-image --modes eager --repeats 1",
}
LIMIT = 600  # seconds of one command
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


def documents(*, marked=True):
    """{page or index of experiments: its commands}, with or without those that need more than a test has."""
    found = {}
    for file in PAGES:
        shells = [shell for mark, shell in blocks(file.read_text()) if marked or not mark.startswith("<!-- needs:")]
        found[str(file.relative_to(ROOT))] = [words for shell in shells for words in commands(shell)]
    if not marked:
        return {name: listed for name, listed in found.items() if listed}
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
        assert words[0] in NOT_OURS | {"pip", "python"}, f"{words[0]} can't be checked; is it one of NOT_OURS?"


@pytest.mark.parametrize("name", documents())
def test_commands_are_parsed(name, parse):
    for words in documents()[name]:
        try:
            check(words, parse)
        except AssertionError as error:
            raise AssertionError(f"{name}: {shlex.join(words)}\n{error}") from None


@pytest.fixture(scope="module")
def run_once(tmp_path_factory):
    """Runs a command, a tuple of words, in a copy of the repository where what the pages suppose is there.

    What several pages have is run for the first of them: what it has made stays.
    """
    folder = tmp_path_factory.mktemp("repository")
    for entry in ROOT.iterdir():
        if not entry.name.startswith(".") and entry.name not in ("runs", "docs"):
            (folder / entry.name).symlink_to(entry)
    shutil.copytree(ROOT / "docs", folder / "docs", ignore=shutil.ignore_patterns("*.json"))
    story = [{"time": 0, "prompt": "a bus moves left"}, {"time": 9, "prompt": "a bus grows"}]
    (folder / "story.jsonl").write_text("\n".join(map(json.dumps, story)))
    pack, (clips, pictures) = EmojiPack(), (folder / "path/to/clips", folder / "path/to/pictures")
    clips.mkdir(parents=True)
    pictures.mkdir()
    rows = ["file,caption"]
    for number, motion in enumerate(("left", "right", "up")):
        scene = poster(number, "blue", motion)
        frames = pack.render(scene, size=96, num_frames=24) / 255
        media.write_video(clips / f"{number}.mp4", frames, 8)
        media.write_image(pictures / f"{caption(pack, scene)}.png", frames[0], {})
        rows.append(f"{number}.mp4,{caption(pack, scene)}")
    (clips / "captions.csv").write_text("\n".join(rows))
    (folder / "few.txt").write_text("\n".join(row.partition(",")[2] for row in rows[1:]))
    shutil.copy(next(pictures.iterdir()), folder / "photo.png")
    return functools.cache(functools.partial(run_command, folder=folder))


def run_command(words, folder):
    """Runs a command, made short, in `folder`; raises AssertionError with the end of what it said if it fails."""
    words = [*SCRIPTS.get(words[0], words[0]).split(), *words[1:]]
    words = ["python", *words] if words[0].endswith(".py") else words
    if NOT_RUN & {words[0], " ".join(words[:3])}:
        return
    program = " ".join(words[1:])
    short = SHORTER.get(max((key for key in SHORTER if program.startswith(key)), key=len, default=""), "").split()
    environment = os.environ | {
        "XLA_FLAGS": "",
        "MAGIC141_JAX_CACHE": jax.config.jax_compilation_cache_dir,
        "JAX_DISABLE_MOST_OPTIMIZATIONS": str(words[1] == "train.py"),  # one step is compiled for longer than it runs
    }
    command, said = [sys.executable, *words[1:], *short], []
    to_said = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, cwd=folder, env=environment, **to_said) as process:
        timer = threading.Timer(LIMIT, process.kill)
        timer.start()
        for line in process.stdout:
            said.append(line)
            if found := re.search(r"listening on (http://[\d.:]+)", line):
                wait(functools.partial(is_ready, found[1]), LIMIT)
                process.send_signal(signal.SIGTERM)
        process.wait()
        timer.cancel()
    assert process.returncode == 0, f"{shlex.join(command)}\nended with {process.returncode}:\n{''.join(said[-20:])}"


@pytest.mark.heavy
@pytest.mark.parametrize("name", documents(marked=False))
def test_commands_run(name, run_once):
    for words in documents(marked=False)[name]:
        run_once(tuple(words))


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
        ("kubectl get pods", "can't be checked"),
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
