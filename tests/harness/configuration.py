"""Change the shim's configuration file on a node for the length of a block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tests.harness.node import CONFIGURATION

if TYPE_CHECKING:
    from tests.harness.node import Node


@contextmanager
def changed_configuration(node: Node, change: Callable[[str], str]) -> Iterator[None]:
    """Run with `change(text)` as the configuration file; the old text is put back."""
    text = node.path(CONFIGURATION).read_text()
    node.write(CONFIGURATION, change(text))
    try:
        yield
    finally:
        node.write(CONFIGURATION, text)


def with_line(text: str, table: str, line: str) -> str:
    """Add a line to a table."""
    return text.replace(f"[{table}]\n", f"[{table}]\n{line}\n", 1)


def with_value(text: str, key: str, value: str) -> str:
    """Set a key that stands at the beginning of a line to a TOML value."""
    lines = [
        f"{key} = {value}" if line.startswith(f"{key} =") else line for line in text.splitlines()
    ]
    return "\n".join(lines) + "\n"


@contextmanager
def drop_in(node: Node, text: str) -> Iterator[None]:
    """Run with `text` read after the configuration file."""
    inside = f"{CONFIGURATION.rpartition('/')[0]}/config.d/90-test.toml"
    node.write(inside, text)
    try:
        yield
    finally:
        node.path(inside).unlink()
