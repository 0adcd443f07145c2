"""The sandbox's cgroup on the host: who is in it, its limits, its statistics, its end."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.harness.configuration import drop_in
from tests.harness.containerd_api import Tasks
from tests.harness.ctr import Ctr, fresh_id
from tests.harness.ctr_pod import Pod
from tests.harness.parts import VMM, find_parts, find_shims
from tests.harness.vmm import NAME

if TYPE_CHECKING:
    from tests.harness.node import Node, NodeProcess

pytestmark = pytest.mark.usefixtures("kata_only")

MIB = 1 << 20


def memory_cgroup(process: NodeProcess) -> str:
    """Return a process's path in the hierarchy that counts memory."""
    found = {}
    for line in (process.directory / "cgroup").read_text().splitlines():
        _, names, path = line.split(":", 2)
        found |= dict.fromkeys(names.split(","), path)
    return found.get("memory", found.get("", ""))


def directory(path: str) -> Path:
    """Return where the host shows a path of that hierarchy."""
    one, other = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
    return Path(f"{one if one.is_dir() else other}{path}")


def memory_limit(path: str) -> int:
    names = ("memory.limit_in_bytes", "memory.max")
    (file,) = (directory(path) / name for name in names if (directory(path) / name).exists())
    text = file.read_text().strip()
    return int(text) if text.isdigit() else 1 << 63


def set_memory_limit(path: str, limit: int) -> None:
    names = ("memory.limit_in_bytes", "memory.max")
    (file,) = (directory(path) / name for name in names if (directory(path) / name).exists())
    file.write_text(str(limit))


def test_vmm_daemons_and_shim_are_in_the_containers_cgroup_with_its_limits(
    node: Node, ctr: Ctr
) -> None:
    container = fresh_id("placed")
    limits = ["--memory-limit", str(64 * MIB), "--cpu-quota", "50000", "--cpu-period", "100000"]
    with drop_in(node, f"[hypervisor.{NAME}]\ndefault_memory = 512\n"):
        ctr.start(container, "sleep", "1000", options=limits)
    expected = f"/{node.name}/kata_{container}"
    (shim,) = find_shims(ctr)
    inside = [process for process in node.processes() if memory_cgroup(process) == expected]
    assert {process.pid for process in inside} >= {shim.pid, find_parts(node, VMM)[0].pid}
    assert any("virtiofsd" in process.command for process in inside)
    assert not [
        process
        for process in node.processes()
        if "virtiofsd" in process.command and process not in inside
    ]
    assert memory_limit(expected) > (512 + 64 + 256) * MIB
    with Tasks(node) as tasks:
        before = memory_limit(expected)
        tasks.update(container, {"memory": {"limit": 256 * MIB}})
        assert memory_limit(expected) >= before + 192 * MIB
    ctr.remove(container)
    assert not directory(expected).exists()


def test_a_vmm_over_the_hosts_limit_is_reported_as_that(node: Node, ctr: Ctr) -> None:
    container = fresh_id("hostoom")
    with drop_in(node, f"[hypervisor.{NAME}]\ndefault_memory = 1024\n"), Tasks(node) as tasks:
        ctr.start(container, "sleep", "1000")
        path = f"/{node.name}/kata_{container}"
        used = directory(path) / "memory.usage_in_bytes"
        used = used if used.exists() else directory(path) / "memory.current"
        set_memory_limit(path, int(used.read_text()) + 48 * MIB)
        ctr.exec(container, "dd", "if=/dev/zero", "of=/dev/null", "bs=400M", "count=1")
        assert tasks.wait(container) == 137
        done = ctr.exec(container, "true")
        assert "killed by the host for the memory limit of" in done.stderr, done
        assert path in done.stderr
    ctr.remove(container)


def test_without_sandbox_cgroup_only_everything_is_beside_the_pods_cgroup(
    node: Node, ctr: Ctr
) -> None:
    container = f"{node.name}-{fresh_id('overhead')}"
    with drop_in(node, "[runtime]\nsandbox_cgroup_only = false\n"):
        ctr.start(container, "sleep", "1000", options=["--memory-limit", str(64 * MIB)])
        (vmm,) = find_parts(node, VMM)
        assert memory_cgroup(vmm) == f"/kata_overhead/{container}"
        assert memory_limit(memory_cgroup(vmm)) > 1 << 60
        ctr.remove(container)


def test_pods_statistics_are_those_of_its_cgroup_on_the_host(node: Node, ctr: Ctr) -> None:
    pod = Pod(ctr, fresh_id("pod"))
    pod.start_sandbox()
    try:
        small = pod.start("small", "sleep", "1000")
        of_pod, of_container = usage(ctr, pod.sandbox), usage(ctr, small)
        assert of_pod > 100 * MIB, "a guest's kernel alone takes more"
        assert 0 < of_container < of_pod
    finally:
        pod.remove()


def usage(ctr: Ctr, container: str) -> int:
    memory = ctr.metrics(container)["memory"]
    assert isinstance(memory, dict)
    found = memory["usage"]
    return int(found["usage"] if isinstance(found, dict) else found)
