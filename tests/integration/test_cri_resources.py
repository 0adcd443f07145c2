"""Limits, statistics and OOM kills as CRI shows them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.harness.configuration import drop_in
from tests.harness.vmm import NAME

if TYPE_CHECKING:
    from tests.harness.crictl import Crictl
    from tests.harness.node import Node

pytestmark = pytest.mark.usefixtures("kata_only")

MIB = 1 << 20


def resources(cpus: float, mib: int) -> dict[str, int]:
    return {
        "cpu_quota": int(cpus * 100000),
        "cpu_period": 100000,
        "memory_limit_in_bytes": mib * MIB,
    }


def stats_of(crictl: Crictl, container: str) -> dict[str, Any]:
    (found,) = crictl.json("stats", "--id", container)["stats"]
    assert found["attributes"]["id"] == container
    return dict(found)


def test_limits_statistics_and_an_update_of_a_pod_over_cri(node: Node, crictl: Crictl) -> None:
    with drop_in(node, f"[hypervisor.{NAME}]\ndefault_memory = 256\ndefault_maxvcpus = 4\n"):
        pod = crictl.run_pod(linux={"resources": resources(1.5, 256)})
        limits = {"resources": resources(1, 128)}
        script = "dd if=/dev/zero of=/tmp/f bs=1M count=8 2>/dev/null; while :; do :; done"
        busy = crictl.run(pod, "sh", "-c", script, linux=limits)
        assert crictl.output(busy, "nproc").strip() == "3", "default_vcpus + 1.5, rounded up"
        kib = int(crictl.output(busy, "awk", "/MemTotal/ {print $2}", "/proc/meminfo"))
        assert 400 < kib // 1024 < 512

        memory = stats_of(crictl, busy)["memory"]
        assert 0 < int(memory["workingSetBytes"]["value"]) < 128 * MIB
        first = int(stats_of(crictl, busy)["cpu"]["usageCoreNanoSeconds"]["value"])
        crictl.output(busy, "sleep", "1")
        assert int(stats_of(crictl, busy)["cpu"]["usageCoreNanoSeconds"]["value"]) > first

        (of_pod,) = crictl.json("statsp", "--id", pod)["stats"]
        linux = of_pod["linux"]
        of_vmm = int(linux["memory"]["workingSetBytes"]["value"])
        assert of_vmm > int(memory["workingSetBytes"]["value"])
        assert of_vmm > 60 * MIB, "the VMM is counted"
        assert int(linux["cpu"]["usageCoreNanoSeconds"]["value"]) > 0
        assert linux["network"]["defaultInterface"]["name"] == "eth0"
        assert [one["attributes"]["id"] for one in linux["containers"]] == [busy]

        crictl.call("update", "--cpu-quota", "50000", "--memory", str(192 * MIB), busy)
        here = "here=/sys/fs/cgroup$(sed -n s/^0:://p /proc/self/cgroup); "
        shown = crictl.output(busy, "sh", "-c", here + "cat $here/memory.max $here/cpu.max")
        assert shown.split() == [str(192 * MIB), "50000", "100000"]
        status = crictl.container_status(busy)
        assert int(status["resources"]["linux"]["memoryLimitInBytes"]) == 192 * MIB


def test_only_the_container_over_its_limit_is_shown_as_oom_killed(crictl: Crictl) -> None:
    pod = crictl.run_pod()
    limits = {"resources": {"memory_limit_in_bytes": 32 * MIB}}
    hungry = "sleep 1; dd if=/dev/zero of=/dev/null bs=200M count=1; exit $?"
    killed = crictl.run(pod, "sh", "-c", hungry, linux=limits)
    other = crictl.run(pod, "sleep", "1000", linux=limits)
    assert crictl.wait_exited(killed) == 137
    status = crictl.container_status(killed)
    assert status["reason"] == "OOMKilled"
    status = crictl.container_status(other)
    assert (status["state"], status["reason"]) == ("CONTAINER_RUNNING", "")
