"""Dependencies of the package, from the requirements files: those of requirements.txt, and an extra of each other one.

requirements-NAME.txt becomes the extra NAME, with what it takes from other files (-r) but for requirements.txt.
"""

from pathlib import Path

from hatchling.metadata.plugin.interface import MetadataHookInterface

BASE = "requirements.txt"


def requirements(file: Path) -> list[str]:
    """The requirements of a file and of those that it names, requirements.txt apart."""
    found = []
    for line in file.read_text().splitlines():
        line = line.partition(" #")[0].strip()
        if line.startswith("-r "):
            other = line.removeprefix("-r ")
            found += [] if other == BASE else requirements(file.with_name(other))
        elif line and not line.startswith("#"):
            found.append(line)
    return found


class Requirements(MetadataHookInterface):
    """Fills in the dynamic fields of pyproject.toml."""

    def update(self, metadata: dict) -> None:
        """Sets dependencies and extras."""
        root = Path(self.root)
        metadata["dependencies"] = requirements(root / BASE)
        metadata["optional-dependencies"] = {
            file.stem.removeprefix("requirements-"): requirements(file) for file in root.glob("requirements-*.txt")
        }
