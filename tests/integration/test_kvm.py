"""A container on a host with real KVM, and with the kernel's own vsock, network and cgroup v2."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from hypervisors.accel import kernel_vsock_usable, kvm_problem
from tests.harness import vmm
from tests.harness.ctr import Ctr, fresh_id
from tests.harness.parts import VMM, VSOCK, find_one, find_parts
from tests.integration.test_network import pod as pod  # a fixture

if TYPE_CHECKING:
    from tests.harness.node import Node, NodeProcess

pytestmark = [pytest.mark.kvm, pytest.mark.usefixtures("kata_only", "kvm_host")]


@pytest.fixture
def kvm_host() -> None:
    if problem := kvm_problem():
        pytest.skip(f"no KVM: {problem}")


def held(process: NodeProcess) -> set[str]:
    """What the descriptors of a process lead to."""
    return {os.readlink(entry) for entry in (process.directory / "fd").iterdir()}


def switches_of_vhost_threads() -> dict[str, int]:
    """How often each thread in which the kernel serves a VMM's queues has waited for work."""
    found = {}
    for directory in Path("/proc").glob("[0-9]*"):
        if (directory / "comm").read_text().startswith("vhost-"):
            status = (directory / "status").read_text()
            counts = re.findall(r"voluntary_ctxt_switches:\s+(\d+)", status)
            found[directory.name] = int(counts[0])
    return found


@pytest.mark.usefixtures("pod")
def test_vm_runs_on_kvm_as_a_user_of_its_own_with_the_kernel_s_vsock_and_network(
    node: Node, ctr: Ctr
) -> None:
    container = fresh_id("kvm")
    ctr.start(container, "sleep", "1000", options=["--with-ns", "network:/run/netns/ktpod"])
    process = find_one(node, VMM)
    descriptors = held(process)
    assert "anon_inode:kvm-vcpu:0" in descriptors
    uid = (process.directory / "status").read_text().partition("Uid:")[2].split()[0]
    assert int(uid) > 65535, "the VMM is root, or somebody's user"
    if vmm.capabilities().kernel_vsock and not vmm.capabilities().hybrid_vsock:
        assert kernel_vsock_usable()
        assert "/dev/vhost-vsock" in descriptors
        assert find_parts(node, VSOCK) == []
    if vmm.NAME == "qemu":
        assert "/dev/vhost-net" in descriptors
        before = switches_of_vhost_threads()
        node.run(["busybox", "ping", "-c", "5", "-W", "5", "10.77.0.2"])
        after = switches_of_vhost_threads()
        assert max(after[thread] - before[thread] for thread in before) >= 5, (before, after)
    assert ctr.exec(container, "echo", "here").stdout == "here\n"
    ctr.remove(container)
    assert '"accelerator":"kvm"' in node.containerd.log_path.read_text()


def test_metrics_have_the_form_of_a_host_with_cgroup_v2(ctr: Ctr) -> None:
    if not Path("/sys/fs/cgroup/cgroup.controllers").exists():
        pytest.skip("this host has cgroup v1")
    container = fresh_id("metrics")
    ctr.start(container, "sleep", "1000", options=["--memory-limit", str(96 << 20)])
    metrics = ctr.metrics(container)
    ctr.remove(container)
    memory, pids = metrics["memory"], metrics["pids"]
    assert isinstance(memory, dict)
    assert isinstance(pids, dict)
    assert int(memory["usage_limit"]) == 96 << 20
    assert 0 < int(memory["usage"]) < 96 << 20
    assert int(pids["current"]) == 1
