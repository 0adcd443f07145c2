"""The project's Python files, as the style tests see them."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT: Final = Path(__file__).resolve().parent.parent.parent
PACKAGES: Final = ("ttrpc", "agent_proto", "hypervisors", "netns", "shimv2")


def product_files() -> list[Path]:
    return [path for package in PACKAGES for path in _python_files(ROOT / package)]


def all_files() -> list[Path]:
    return [*product_files(), *_python_files(ROOT / "packaging"), *_python_files(ROOT / "tests")]


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


def imports(path: Path) -> Iterator[str]:
    """Yield every module a file names in an import, wherever the statement stands."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _python_files(directory: Path) -> list[Path]:
    return sorted(
        path
        for path in directory.rglob("*.py")
        if "__pycache__" not in path.parts and not path.name.endswith("_pb2.py")
    )
