"""Print the pinned dependencies of pyproject.toml, with those of the extras named as arguments."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]


def pins(extras: list[str]) -> list[str]:
    """Return the requirement lines of the project and of `extras`, in the file's order."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    lines: list[str] = list(project["dependencies"])
    for extra in extras:
        lines += project["optional-dependencies"][extra]
    return lines


if __name__ == "__main__":
    print("\n".join(pins(sys.argv[1:])))
