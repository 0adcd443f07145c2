"""Fixtures of the end-to-end tests: a node for each containerd, and the leak check after each test.

A test that fails or leaks poisons only itself: its node is thrown away, the next test gets a new
one.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from tests.harness.containerd_daemon import (
    ContainerdMissing,
    ContainerdVersion,
    CriToolsMissing,
    find_containerd,
    find_cri_tool,
)
from tests.harness.crictl import Crictl
from tests.harness.ctr import KATA, RUNTIME, Ctr
from tests.harness.leaks import take_snapshot, wait_for_no_leaks
from tests.harness.node import BUILD, Node

_LOG_BYTES = 24_000
_failed = pytest.StashKey[bool]()
_log_start = pytest.StashKey[tuple[Path, int]]()


class NodeSlot:
    """The node that tests of one containerd version share while it is clean."""

    def __init__(self, version: ContainerdVersion) -> None:
        self._version = version
        self._node: Node | None = None

    def node(self) -> Node:
        if self._node is None:
            node = Node(self._version)
            node.start()
            self._node = node
        return self._node

    def discard(self) -> None:
        if self._node is not None:
            self._node.stop()
            self._node = None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.root)
            item.add_marker(pytest.mark.e2e)


@pytest.fixture(scope="session", params=[1, 2], ids=["containerd1", "containerd2"])
def node_slot(request: pytest.FixtureRequest) -> Iterator[NodeSlot]:
    try:
        slot = NodeSlot(find_containerd(request.param))
    except ContainerdMissing as missing:
        pytest.skip(str(missing))
    yield slot
    slot.discard()


@pytest.fixture
def node(node_slot: NodeSlot, request: pytest.FixtureRequest) -> Iterator[Node]:
    """A node with containerd running; nothing may be left on it after the test."""
    node = node_slot.node()
    log = node.containerd.log_path
    request.node.stash[_log_start] = (log, log.stat().st_size)
    before = take_snapshot(node)
    yield node
    if request.node.stash.get(_failed, False):
        node_slot.discard()
        return
    leaks = wait_for_no_leaks(node, before)
    if leaks:
        node_slot.discard()
        pytest.fail("left behind:\n  " + "\n  ".join(map(str, leaks)), pytrace=False)


@pytest.fixture
def ctr(node: Node) -> Ctr:
    """`ctr` with the runtime under test."""
    if RUNTIME == KATA and not (BUILD / "bin" / "containerd-shim-kata-v2").exists():
        pytest.skip("build/bin/containerd-shim-kata-v2 is missing: run `make build`")
    return Ctr(node)


@pytest.fixture
def crictl(ctr: Ctr) -> Iterator[Crictl]:
    """`crictl` with the handler of the runtime under test; its pods are removed at the end."""
    try:
        find_cri_tool("crictl")
    except CriToolsMissing as missing:
        pytest.skip(str(missing))
    crictl = Crictl(ctr.node, "kata" if ctr.runtime == KATA else "runc")
    yield crictl
    crictl.remove_all()


@pytest.fixture
def kata_only() -> None:
    """For tests of what runc's shim doesn't have."""
    if RUNTIME != KATA:
        pytest.skip("about virtual machines")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        item.stash[_failed] = True
        if _log_start in item.stash:
            path, start = item.stash[_log_start]
            with path.open("rb") as log:
                log.seek(start)
                text = log.read()[-_LOG_BYTES:].decode(errors="replace")
            report.sections.append((f"containerd and shim log ({path})", text))
    return report
