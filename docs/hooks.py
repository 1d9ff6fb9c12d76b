"""What mkdocs makes of this repository besides the pages in docs/: the reference, links out of docs/, names that link.

    reference/configuration.md   every field of every config dataclass: type, default, and its line of `Attributes:`
    reference/commands.md        the module docstrings of sample.py, train.py and every __main__.py
    reference/<part>.md          mkdocstrings of the modules of a part of the package
    contributing.md, changelog.md   CONTRIBUTING.md and CHANGELOG.md

All of it is read from the syntax trees, by griffe; nothing of the package is imported. Links to files outside docs/,
which work where the repository is browsed, lead to `repo_url` (mkdocs.yml) on the site. A name in backticks such as
`magic141_jax.diffusion.flow` links to the reference; one that does not exist fails a strict build.
"""

from __future__ import annotations

import ast
import functools
import logging
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import griffe
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
NAME = "magic141_jax"
CONFIGS = re.compile(r"(Config|Settings|Options|TimeDensity|LowMemory)$")
MOVED = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
LINK = re.compile(r"(!?)(\[[^\]]*\])\(([^)#:\s]+)(#[^)\s]*)?\)")
LENT = "repository"  # folder of the site with pictures from outside docs/
CODE_NAME = re.compile(rf"(?<![\[`])`({NAME}(?:\.\w+)+)`(?![\]`])")
FENCE = re.compile(r"(^```.*?^```[ ]*$)", re.MULTILINE | re.DOTALL)
LOG = logging.getLogger("mkdocs.hooks.reference")


def on_config(config: Any) -> Any:
    """Adds the pages of the package to the navigation."""
    section = next(entry["Reference"] for entry in config.nav if "Reference" in entry)
    section += [{part: f"reference/{part}.md"} for part in parts()]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages that are made."""
    made = {f"reference/{part}.md": reference(part, modules) for part, modules in parts().items()}
    made |= {"reference/commands.md": commands(), "reference/configuration.md": configuration()}
    made |= {page: (ROOT / name).read_text() for name, page in MOVED.items()}
    for path, text in made.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links out of docs/ lead to the repository, and the package's names in backticks to the reference."""
    source = page.file.src_uri
    moved = {page: name for name, page in MOVED.items()}
    base = PurePosixPath(moved.get(source, f"docs/{source}"))
    pieces = FENCE.split(markdown)
    for i in range(0, len(pieces), 2):  # code blocks stand between the others
        pieces[i] = CODE_NAME.sub(functools.partial(_named, source), pieces[i])
        pieces[i] = LINK.sub(lambda found: relink(found, base, source, config.repo_url), pieces[i])
    for image in re.findall(rf"!\[[^\]]*\]\((?:\.\./)*{LENT}/([^)]+)\)", "".join(pieces[::2])):
        if files.get_file_from_path(f"{LENT}/{image}") is None:
            files.append(File.generated(config, f"{LENT}/{image}", abs_src_path=str(ROOT / image)))
    return "".join(pieces)


def relink(found: re.Match[str], base: PurePosixPath, source: str, repository: str) -> str:
    """A link of a page, written for the repository, as the site needs it.

    Args:
      found: of `LINK`.
      base: the file that holds the link, relative to the repository.
      source: the page, relative to docs/.
      repository: its URL.
    """
    image, text, target, anchor = found[1], found[2], found[3], found[4] or ""
    path = (ROOT / base).parent.joinpath(target).resolve()
    if not path.exists() or not path.is_relative_to(ROOT):
        return found[0]  # to a page that is made, or broken, which mkdocs tells
    inside, up = path.relative_to(ROOT).as_posix(), "../" * source.count("/")
    if inside in MOVED or (inside.startswith("docs/") and path.is_file() and path.suffix != ".py"):
        return f"{image}{text}({up}{MOVED.get(inside) or inside.removeprefix('docs/')}{anchor})"
    if image:
        return f"{image}{text}({up}{LENT}/{inside})"
    kind = "tree" if path.is_dir() else "blob"
    return f"{image}{text}({repository.rstrip('/')}/{kind}/main/{inside}{anchor})"


def _named(source: str, found: re.Match[str]) -> str:
    """A name of the package as a link; as it is if the reference leaves it out, having no docstring of its own."""
    name, short = found[1], found[1].removeprefix(f"{NAME}.")
    try:
        known = package()[short].has_docstring
    except KeyError:
        LOG.warning("%s names `%s`, which the package does not have", source, name)
        known = False
    return f"[`{short}`][{name}]" if known else f"`{name}`"


@functools.cache
def package() -> griffe.Module:
    """The package as griffe sees it."""
    found = griffe.load(NAME, search_paths=[ROOT], docstring_parser="google")
    assert isinstance(found, griffe.Module)
    return found


@functools.cache
def parts() -> dict[str, list[str]]:
    """{page: dotted names of its modules}: a page for each folder of the package, "foundations" for the other files."""
    found: dict[str, list[str]] = {}
    for file in sorted((ROOT / NAME).rglob("*.py"), key=lambda file: (file.stem != "__init__", file)):
        if file.stem != "__main__":
            words = file.relative_to(ROOT).with_suffix("").parts
            page = words[1] if len(words) > 2 else "foundations"
            found.setdefault(page, []).append(".".join(word for word in words if word != "__init__"))
    return dict(sorted(found.items()))


def reference(part: str, modules: list[str]) -> str:
    """The page of a part; of packages the docstring alone, for what they name stands with its module."""
    lines = [f"# {part}", ""]
    for name in modules:
        is_package = name == NAME or (ROOT / name.replace(".", "/")).is_dir()
        lines += [f"::: {name}", *["    options:", "      members: false"] * is_package, ""]
    return "\n".join(lines)


def commands() -> str:
    """What every command says of itself; its `--help` has all flags."""
    files = [ROOT / "sample.py", ROOT / "train.py", *sorted((ROOT / NAME).rglob("__main__.py"))]
    lines = ["# Commands", "", "Every command tells all its flags with `--help`; an installed package runs the first"]
    lines += ["two as `magic141-sample` and `magic141-train`.", ""]
    for file in files:
        words = file.relative_to(ROOT).parent.parts
        title = f"python -m {'.'.join(words)}" if words else f"python {file.name}"
        lines += [f"## {title}", "", ast.get_docstring(ast.parse(file.read_text())) or "", ""]
    return "\n".join(lines)


def configuration() -> str:
    """Tables of all fields of all config dataclasses, `ExperimentConfig` and what it is made of first."""
    found = {cls.name: cls for cls in _classes(package()) if CONFIGS.search(cls.name) and "dataclass" in cls.labels}
    order = sorted(found, key=lambda name: (name != "ExperimentConfig", found[name].canonical_path))
    lines = [
        "# Configuration",
        "",
        "A config file of `configs/` fills in `ExperimentConfig`; any key is set on the command line by its path,",
        "`--config.optimizer.learning_rate=3e-4`. Unknown keys and wrong types are refused by name. `model`,",
        "`image_encoder` and `method` take the fields of the class that their name stands for:",
        "`magic141_jax.models.MODELS`, `magic141_jax.experiment.METHODS`.",
        "",
    ]
    for name in order:
        lines += [f"## {name}", "", *_described(found[name], found), ""]
    return "\n".join(lines)


def _classes(module: griffe.Module) -> Iterator[griffe.Class]:
    for member in module.members.values():
        if member.is_alias:
            continue
        if isinstance(member, griffe.Module):
            yield from _classes(member)
        elif isinstance(member, griffe.Class):
            yield member


def _described(cls: griffe.Class, known: dict[str, griffe.Class]) -> list[str]:
    """A class's docstring and the table of its own fields, with links to the config classes that these are of."""
    text, told = _told(cls)
    bases = [str(base).rpartition(".")[2] for base in cls.bases]
    rows = []
    for name, member in cls.members.items():
        if not isinstance(member, griffe.Attribute) or member.annotation is None or "property" in member.labels:
            continue
        if name.startswith("_") or "ClassVar" in str(member.annotation):
            continue
        kind = str(member.annotation)
        links = [other for other in re.findall(r"\w+", kind) if other in known]
        shown = " ".join([f"`{kind}`", *(f"([fields](#{other.lower()}))" for other in links)])
        own = member.docstring.value if member.docstring else ""
        cells = (f"`{name}`", shown, f"`{_default(member)}`", " ".join((told.get(name) or own).split()))
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    inherited = [f"[{base}](#{base.lower()})" for base in bases if base in known]
    lines = [f"`{cls.canonical_path}`. {text}"]
    lines += ["", f"And the fields of {', '.join(inherited)}."] if inherited else []
    return lines + (["", "| field | type | default | |", "| --- | --- | --- | --- |", *rows] if rows else [])


def _told(cls: griffe.Class) -> tuple[str, dict[str, str]]:
    """A docstring's text, and {field: its line of `Attributes:`}, where a line may tell of several fields."""
    text, _, listed = (cls.docstring.value if cls.docstring else "").partition("\nAttributes:\n")
    told: dict[str, str] = {}
    for names, line in re.findall(r"^  (\w[\w, ]*): (.*(?:\n    .*)*)", listed, re.MULTILINE):
        told |= {str(name): str(line) for name in re.split(r",\s*", names)}
    return text.strip(), told


def _default(member: griffe.Attribute) -> str:
    """The default as the class states it, without the wrapping of a factory."""
    if member.value is None:
        return "required"
    text = " ".join(str(member.value).split())
    factory = re.fullmatch(r"(?:dataclasses\.)?field\(default_factory=(lambda: )?(.*)\)", text)
    if not factory:
        return text
    return factory[2] if factory[1] else {"dict": "{}", "list": "[]"}.get(factory[2], f"{factory[2]}()")
