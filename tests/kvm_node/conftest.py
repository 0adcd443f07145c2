"""Fixtures of the KVM node's own tests."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from guest.image.kernel import KernelError
from tests.harness.own_process import open_descriptors
from tests.kvm_node.kernel import unpacked_kernel


@pytest.fixture(scope="session", autouse=True)
def kernel() -> None:
    if os.geteuid() != 0:
        pytest.skip("a node serves the machine's files as root")
    try:
        unpacked_kernel()
    except (KernelError, FileNotFoundError) as error:
        pytest.skip(f"no kernel for a node: {error}; run `make guest`")


@pytest.fixture
def leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No process, descriptor, mount or socket of a node may be there after the test."""
    mark = f"tests-{os.getpid()}"
    monkeypatch.setenv("KATA_TEST_KVM_NODE", mark)
    before = _sockets_and_memory()
    yield
    assert _processes_with(mark) == []
    assert _sockets_and_memory() <= before
    assert [line for line in _mounts() if "virtiofs" in line or "kvm-node" in line] == []


@pytest.fixture
def show(capfd: pytest.CaptureFixture[str]) -> Iterator[Callable[[bytes], None]]:
    """Print what it is called with at once, under the name of the node."""
    rest = b""

    def write(data: bytes) -> None:
        nonlocal rest
        *lines, rest = (rest + data).split(b"\n")
        with capfd.disabled():
            for line in lines:
                sys.stdout.write(f"kvm-node | {line.decode(errors='replace')}\n")
            sys.stdout.flush()

    yield write
    if rest:
        write(b"\n")


def _mounts() -> list[str]:
    return Path("/proc/self/mountinfo").read_text().splitlines()


def _sockets_and_memory() -> set[tuple[str, str]]:
    """Our descriptors of those kinds: the files among them are pytest's."""
    kinds = ("socket:", "/memfd:")
    return {found for found in open_descriptors() if found[1].startswith(kinds)}


def _processes_with(mark: str) -> list[str]:
    """Other processes with the mark in their environment: children, and children's children."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            environment = (directory / "environ").read_bytes()
            command = (directory / "cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        if mark.encode() in environment and int(directory.name) != os.getpid():
            found.append(command.replace(b"\0", b" ").decode(errors="replace"))
    return found
