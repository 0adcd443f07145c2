"""A part of Kubernetes' critest; `make test-cri` runs all of it, and with runc beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.cri import critest, expected
from tests.cri.images import write_images
from tests.harness.containerd_daemon import (
    ContainerdMissing,
    CriToolsMissing,
    find_containerd,
    find_cri_tool,
)
from tests.harness.node import BUILD, Node

if TYPE_CHECKING:
    from collections.abc import Iterator

#: One or two specs of each kind, chosen so that all of them take two minutes in emulation.
_SPECS = (
    "runtime should support attach",
    "runtime should support exec with tty=true and stdin=true",
    r"runtime should support portforward \[Conformance\]",
    "runtime should support DNS config",
    "port mapping with host port and container port",
    "execSync with timeout",
    "three created containers when filter is nil",
    "reopening container log",
    "exitCode 137 and reason OOMKilled",
    "should support network$",
    "should support non-recursive readonly mounts",
    "mount with 'rslave'",
    "should support PodPID",
    "should support RunAsGroup$",
    "should support adding capability",
    "should support MaskedPaths",
    "seccomp localhost profile",
    "should not allow privilege escalation when true",
    "unsafe sysctls",
    "Image Manager",
    "Idempotence",
)


@pytest.fixture
def node() -> Iterator[Node]:
    """A node of the test's own, because critest has it for itself, with critest's images."""
    try:
        version = find_containerd(2)
        find_cri_tool("critest")
    except (ContainerdMissing, CriToolsMissing) as missing:
        pytest.skip(str(missing))
    if not (BUILD / "bin" / "containerd-shim-kata-v2").exists():
        pytest.skip("build/bin/containerd-shim-kata-v2 is missing: run `make build`")
    images = write_images(BUILD / "tests" / "images")
    with Node(version) as node:
        node.serve_images(images)
        yield node


@pytest.mark.timeout(900)
def test_specs_of_critest_do_as_listed(node: Node) -> None:
    focus = [f"--ginkgo.focus={expression}" for expression in _SPECS]
    outcomes = critest.run(node, "kata", focus, timeout_s=850)
    assert critest.unmatched(_SPECS, outcomes) == []
    wanted = expected.of_run(expected.read_list(), "kata", 2, expected.of_machine())
    told = expected.differences(outcomes, wanted, is_whole=False)
    assert not told, "\n".join(told)
