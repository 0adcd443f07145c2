"""The VM's size: from limits at its boot, from updates and from containers that join later."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.harness.configuration import drop_in
from tests.harness.containerd_api import Tasks
from tests.harness.ctr import Ctr, fresh_id
from tests.harness.ctr_pod import Pod
from tests.harness.vmm import NAME

if TYPE_CHECKING:
    from tests.harness.node import Node

pytestmark = pytest.mark.usefixtures("kata_only")

MIB = 1 << 20
HUGE_PAGES = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")
_CPUS = "grep -c ^processor /proc/cpuinfo"
_MEMORY = "sed -n 's/MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo"
# What the guest's kernel keeps for itself of a machine of a few hundred MiB.
_KERNEL_MIB = 90


def guest(ctr: Ctr, container: str) -> tuple[int, int]:
    """Return the guest's CPUs and its memory in MiB, as its kernel shows them."""
    done = ctr.exec(container, "sh", "-c", f"{_CPUS}; {_MEMORY}", check=True)
    cpus, kib = map(int, done.stdout.split())
    return cpus, kib // 1024


def limits(cpus: float, mib: int) -> list[str]:
    quota = ["--cpu-quota", str(int(cpus * 100000)), "--cpu-period", "100000"]
    return [*quota, "--memory-limit", str(mib * MIB)]


@pytest.mark.needs("vcpu_hotplug", "memory_hotplug")
def test_limits_size_the_vm_and_an_update_makes_it_grow(node: Node, ctr: Ctr) -> None:
    settings = f"[hypervisor.{NAME}]\ndefault_memory = 256\ndefault_maxvcpus = 4\n"
    with drop_in(node, settings), Tasks(node) as tasks:
        container = fresh_id("sized")
        ctr.start(container, "sleep", "1000", options=limits(1, 192))
        cpus, mib = guest(ctr, container)
        assert cpus == 2
        assert 448 - _KERNEL_MIB < mib < 448
        tasks.update(container, {"cpu": {"cpus": "0"}})
        seen = ctr.exec(container, "nproc", check=True).stdout.split()
        assert seen == ["1"], "pinned to one CPU, it counts one"
        tasks.update(container, {
            "cpu": {"quota": 300000, "period": 100000, "cpus": "0-1"},
            "memory": {"limit": 640 * MIB},
        })  # fmt: skip
        cpus, mib = guest(ctr, container)
        assert cpus == 4
        assert mib >= 640 + 256 - _KERNEL_MIB
        assert ctr.exec(container, "nproc", check=True).stdout.split() == ["2"]
        # The memory is there, not only announced.
        fill = ["dd", "if=/dev/zero", "of=/dev/null", "bs=480M", "count=1"]
        assert ctr.exec(container, *fill).returncode == 0
        ctr.remove(container)


def test_the_smallest_vm_runs_a_container_and_an_overhead_replaces_the_default(
    node: Node, ctr: Ctr
) -> None:
    settings = f"[hypervisor.{NAME}]\noverhead_memory = 32\noverhead_vcpus = 0.2\n"
    with drop_in(node, settings):
        container = fresh_id("small")
        ctr.start(container, "sleep", "1000", options=limits(0.5, 8))
        cpus, mib = guest(ctr, container)
        assert cpus == 1
        assert mib < 128
        ctr.remove(container)


@pytest.mark.needs("vcpu_hotplug", "memory_hotplug")
def test_a_pods_vm_grows_with_the_containers_that_join_it(node: Node, ctr: Ctr) -> None:
    settings = (
        f"[hypervisor.{NAME}]\ndefault_memory = 256\ndefault_maxvcpus = 3\n"
        "[runtime]\nstatic_sandbox_resource_mgmt = false\n"
    )
    with drop_in(node, settings):
        pod = Pod(ctr, fresh_id("pod"))
        pod.start_sandbox()
        try:
            one = pod.start("one", "sleep", "1000")
            assert guest(ctr, one)[0] == 1
            two = pod.start("two", "sleep", "1000", options=limits(2, 256))
            cpus, mib = guest(ctr, two)
            assert cpus == 3
            assert mib >= 512 - _KERNEL_MIB
            three = pod.start("three", "sleep", "1000", options=limits(8, 64))
            assert guest(ctr, three)[0] == 3, "more than default_maxvcpus there is not"
        finally:
            pod.remove()


def test_memory_of_huge_pages_is_taken_from_the_hosts_reserve(node: Node, ctr: Ctr) -> None:
    free = HUGE_PAGES / "free_hugepages"
    settings = f"[hypervisor.{NAME}]\ndefault_memory = 256\nenable_hugepages = true\n"
    container = fresh_id("huge")
    if not free.exists() or int(free.read_text()) < 128:
        with drop_in(node, settings):
            done = ctr.run(container, "true")
        assert "MiB of memory need 128; reserve more (vm.nr_hugepages)" in done.stderr
        ctr.node.run(["ctr", "container", "rm", container], check=False)
        return
    before = int(free.read_text())
    with drop_in(node, settings + "enable_mem_prealloc = true\n"):
        ctr.start(container, "sleep", "1000")
        assert int(free.read_text()) <= before - 128
        ctr.remove(container)
    assert int(free.read_text()) == before
