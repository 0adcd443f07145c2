"""The shim's configuration file on a node: made for the VMM under test, changed for a block."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from hypervisors.registry import BUILT_IN, canonical_name
from tests.harness import vmm
from tests.harness.patience import FACTOR, patient

if TYPE_CHECKING:
    from tests.harness.node import Node

CONFIGURATION = "/etc/kata-containers/configuration.toml"


def configurations(built: Path) -> dict[str, str]:
    """Return what a node's files are, by name, from those that `make shim` has built.

    Each has the program that the tests use and this machine's patience; configuration.toml, which
    the plain runtime reads, is the one of the VMM under test.
    """
    texts = {path.name: path.read_text() for path in built.glob("configuration*.toml")}
    usual = CONFIGURATION.rpartition("/")[2]
    if vmm.NAME not in BUILT_IN and usual in texts:
        texts[usual] = for_hypervisor(texts[usual], vmm.NAME)
    files = {name: _adapted(text) for name, text in texts.items()}
    for text in [*files.values()]:
        if setup_of(text) == vmm.SETUP:
            files[usual] = text
    found = setup_of(files.get(usual, ""))
    assert not files or found == vmm.SETUP, f"no configuration for {vmm.SETUP} in {built}"
    return files


def for_hypervisor(text: str, name: str) -> str:
    """Return a configuration file that chooses another VMM, whose program is to be set as well."""
    changed, count = re.subn(r"(?m)^\[hypervisor\.[\w-]+\]$", f"[hypervisor.{name}]", text)
    assert count == 1, f"the configuration file has {count} tables [hypervisor.NAME]"
    return changed


def runtimes(built: Path) -> dict[str, str]:
    """Return the runtime that is called after a VMM for each setup that `make shim` knows."""
    found = {}
    for path in sorted(built.glob("configuration-*.toml")):
        variant = path.stem.partition("-")[2]
        found[setup_of(path.read_text())] = f"io.containerd.kata-{variant}.v2"
    return found


def setup_of(text: str) -> str:
    """Return the setup (`vmm.SETUPS`) that a configuration file is for."""
    machine_type = re.search(r'(?m)^machine_type = "(.*)"$', text)
    return _hypervisor(text) + (f":{machine_type[1]}" if machine_type else "")


def _hypervisor(text: str) -> str:
    table = re.search(r"(?m)^\[hypervisor\.([\w-]+)\]$", text)
    return canonical_name(table[1]) if table else ""


def _adapted(text: str) -> str:
    if program := vmm.find_program(_hypervisor(text)):
        text = with_value(text, "path", f'"{program}"')
    if memory := os.environ.get("KATA_TEST_MEMORY"):
        text = with_value(text, "default_memory", memory)

    def longer(found: re.Match[str]) -> str:
        return f"{found[1]} = {patient(int(found[2])):g}"

    return re.sub(r"(?m)^# (\w+_timeout) = (\d+)$", longer, text) if FACTOR != 1 else text


@contextmanager
def changed_configuration(node: Node, change: Callable[[str], str]) -> Iterator[None]:
    """Run with `change(text)` as the configuration file; the old text is put back."""
    text = node.path(CONFIGURATION).read_text()
    node.write(CONFIGURATION, change(text))
    try:
        yield
    finally:
        node.write(CONFIGURATION, text)


def with_value(text: str, key: str, value: str) -> str:
    """Set a key whose line, or whose comment with the default, the file has to a TOML value."""
    changed, count = re.subn(rf"(?m)^(# )?{key} = .*$", lambda _: f"{key} = {value}", text)
    assert count == 1, f"the configuration file has {count} lines for {key}"
    return changed


@contextmanager
def drop_in(node: Node, text: str) -> Iterator[None]:
    """Run with `text` read after the configuration file."""
    inside = f"{CONFIGURATION.rpartition('/')[0]}/config.d/90-test.toml"
    node.write(inside, text)
    try:
        yield
    finally:
        node.path(inside).unlink()
