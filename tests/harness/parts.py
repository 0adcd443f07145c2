"""Find the processes that one sandbox consists of, on a node."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.harness import vmm

if TYPE_CHECKING:
    from tests.harness.ctr import Ctr
    from tests.harness.node import Node, NodeProcess

#: Names of the parts as the kernel shows them in `comm`, cut at 15 characters.
VMM, VIRTIOFSD, VSOCK = vmm.process_name(), "virtiofsd", "vhost-device-vs"
#: Parameters for tests of the daemons beside a VMM; one that it has no use for is skipped.
DAEMONS = [
    pytest.param(VIRTIOFSD, marks=pytest.mark.needs("shared_directory")),
    pytest.param(
        VSOCK,
        marks=pytest.mark.skipif(
            not vmm.has_vsock_daemon(), reason="VMM or kernel have a vsock device: no daemon"
        ),
    ),
]


def find_parts(node: Node, comm: str) -> list[NodeProcess]:
    """List the processes of one name whose parent has another: the parts, not their helpers."""
    processes = node.processes()
    names = {process.pid: process.comm for process in processes}
    return [
        process
        for process in processes
        if process.comm == comm and names.get(process.parent) != comm
    ]


def find_shims(ctr: Ctr) -> list[NodeProcess]:
    """List the serving shims of the runtime under test."""
    # Source: containerd runtime/v2, BinaryName: the last two parts of the runtime's name.
    name = "-".join(["containerd-shim", *ctr.runtime.split(".")[-2:]])
    daemons = {process.pid for process in ctr.node.find("/containerd -c ")}
    return [
        process
        for process in ctr.node.find(name)
        if process.parent not in daemons and process.parent in {0, 1}
    ]


def find_one(node: Node, comm: str) -> NodeProcess:
    """Return the only part of this name."""
    found = find_parts(node, comm)
    assert len(found) == 1, found
    return found[0]
