"""When a machine is resized, and what happens when it can't be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hypervisors.errors import Unsupported
from shimv2.cgroup_path import Hierarchy
from shimv2.config import AgentConfig, HypervisorConfig, RuntimeConfig, RuntimeSection
from shimv2.pb import containerd_task_pb2 as pb
from tests.fakes.fake_process import SLEEP
from tests.harness.limitations import documented
from tests.shimv2.shim_bench import ShimBench, pod_annotations, refusal, spec
from ttrpc import Code

MIB = 1 << 20


def config(*, static: bool) -> RuntimeConfig:
    return RuntimeConfig(
        hypervisor=HypervisorConfig(
            default_memory_mib=512, default_maxvcpus=8, default_maxmemory_mib=4096
        ),
        agent=AgentConfig(readiness="push"),
        runtime=RuntimeSection(static_sandbox_resource_mgmt=static),
    )


def limited(cpus: float = 0, mib: int = 0, cpuset: str = "", **more: Any) -> dict[str, Any]:
    resources = {
        "cpu": {"quota": int(cpus * 100000), "period": 100000, "cpus": cpuset},
        "memory": {"limit": mib * MIB},
    }
    return spec(
        linux={"namespaces": [{"type": "network"}, {"type": "pid"}], "resources": resources}, **more
    )


def pod(kind: str, **more: Any) -> dict[str, Any]:
    return limited(annotations=pod_annotations(kind, "p1") | more.pop("pod", {}), **more)


async def update(shim: ShimBench, container: str, resources: dict[str, Any]) -> None:
    request = pb.UpdateTaskRequest(id=container)
    request.resources.type_url = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources"
    request.resources.value = json.dumps(resources).encode()
    await shim.call("Update", request)


def warnings(shim: ShimBench) -> list[object]:
    return [line["text"] for line in shim.log.named("resize")]


@pytest.mark.parametrize("static", [True, False])
async def test_a_single_containers_vm_has_its_limits_from_the_boot_on(
    tmp_path: Path, static: bool
) -> None:
    async with ShimBench(tmp_path, config(static=static)).running() as shim:
        await shim.create(config=limited(cpus=1.5, mib=256))
        assert (shim.machine.spec.vcpus, shim.machine.spec.memory_mib) == (3, 768)
        assert shim.machine.resized == []


async def test_a_static_pod_is_sized_once_by_its_annotations(tmp_path: Path) -> None:
    announced = {
        "io.kubernetes.cri.sandbox-cpu-quota": "300000",
        "io.kubernetes.cri.sandbox-cpu-period": "100000",
        "io.kubernetes.cri.sandbox-memory": str(256 * MIB),
    }
    async with ShimBench(tmp_path, config(static=True)).running() as shim:
        await shim.create("p1", pod("sandbox", pod=announced))
        await shim.create("c2", pod("container", cpus=3, mib=256))
        assert (shim.machine.spec.vcpus, shim.machine.spec.memory_mib) == (4, 768)
        assert shim.machine.resized == []
        assert warnings(shim) == []


async def test_an_update_beyond_the_size_makes_even_a_static_vm_grow(tmp_path: Path) -> None:
    async with ShimBench(tmp_path, config(static=True)).running() as shim:
        shim.agent.program(SLEEP)
        await shim.run(config=limited(cpus=1, mib=256))
        await update(shim, "c1", {"cpu": {"quota": 50000}})
        assert shim.machine.resized == []
        await update(shim, "c1", {"cpu": {"quota": 300000}, "memory": {"limit": 1024 * MIB}})
        assert shim.machine.resized == [("vcpus", 4), ("memory", 1536)]
        (online,) = shim.agent.called("OnlineCPUMem")
        assert (online.wait, online.nb_cpus, online.cpu_only) == (True, 2, False)
        order = [name for name, _ in shim.agent.requests]
        assert order.index("OnlineCPUMem") < len(order) - 1
        assert order[-1] == "UpdateContainer"


async def test_a_hot_plugged_vm_follows_the_containers_that_come_and_go(tmp_path: Path) -> None:
    async with ShimBench(tmp_path, config(static=False)).running() as shim:
        await shim.create("p1", pod("sandbox"))
        assert (shim.machine.spec.vcpus, shim.machine.spec.memory_mib) == (1, 512)
        await shim.create("c2", pod("container", cpus=2, mib=512))
        assert shim.machine.resized == [("vcpus", 3), ("memory", 1024)]
        shim.machine.resized.clear()
        await shim.create("c3", pod("container", mib=16))
        # A step that pays: slots for memory are few.
        assert shim.machine.resized == [("memory", 1280)]
        shim.machine.resized.clear()
        await shim.delete("c2")
        await shim.until(lambda: len(shim.machine.resized) == 2)
        assert shim.machine.resized == [("vcpus", 1), ("memory", 528)]


async def test_a_container_whose_create_fails_leaves_no_claim(tmp_path: Path) -> None:
    async with ShimBench(tmp_path, config(static=False)).running() as shim:
        await shim.create("p1", pod("sandbox"))
        await refusal(shim.create("c2", pod("container", cpus=2) | {"process": {}}))
        await refusal(shim.create("c3", pod("container", cpuset="1-x")))
        await shim.create("c4", pod("container", cpus=1))
        assert shim.machine.resized == [("vcpus", 2)]


async def test_what_cant_be_had_is_told_and_fails_no_container(tmp_path: Path) -> None:
    async with ShimBench(tmp_path, config(static=False)).running() as shim:
        await shim.create("p1", pod("sandbox"))
        await shim.create("c2", pod("container", cpus=100, mib=100_000))
        assert shim.machine.resized == [("vcpus", 8), ("memory", 4096)]
        assert warnings(shim) == [
            "the VM has 8 of 101 vCPUs (`default_maxvcpus`: 8) and 4096 of 100512 MiB "
            "(`default_maxmemory`: 4096): its containers' limits can't be reached together"
        ]
        text = documented(
            "the VM has … of … MiB (…): its containers' limits can't be reached together"
        )
        assert text.search(str(warnings(shim)[0]))
        shim.machine.resize_error = Unsupported("fake", "grow", "it is fixed", "boot larger")
        await shim.create("c3", pod("container", cpus=1))
        sent = shim.agent.called("CreateContainer")
        assert sent[-1].OCI.Linux.Resources.CPU.Quota == 100000


async def test_a_backend_that_cant_grow_is_named_in_the_log(tmp_path: Path) -> None:
    async with ShimBench(tmp_path, config(static=False)).running() as shim:
        await shim.create("p1", pod("sandbox"))
        # As tests/hypervisors/test_qemu_full.py has it of QEMU.
        shim.machine.resize_error = Unsupported(
            "qemu", "add memory once more", "all 4 memory slots are taken", "grow in larger steps"
        )
        await shim.create("c2", pod("container", cpus=1))
        text = documented("the VM did not grow: … all 4 memory slots are taken")
        assert text.search(str(warnings(shim)[0]))


async def test_a_cpuset_becomes_as_many_vcpus(tmp_path: Path) -> None:
    async with ShimBench(tmp_path, config(static=False)).running() as shim:
        shim.agent.program(SLEEP)
        await shim.create("p1", pod("sandbox"))
        await shim.run("c2", config=pod("container", cpuset="12-13"))
        await shim.create("c3", pod("container", cpuset="14"))
        cpus = [one.OCI.Linux.Resources.CPU.Cpus for one in shim.agent.called("CreateContainer")]
        assert cpus == ["", "0,1", "2"]
        await update(shim, "c2", {"cpu": {"cpus": "13"}})
        (updated,) = shim.agent.called("UpdateContainer")
        assert updated.resources.CPU.Cpus == "1"


async def test_an_update_that_cant_be_read_changes_nothing(tmp_path: Path) -> None:
    async with ShimBench(tmp_path, config(static=True)).running() as shim:
        shim.agent.program(SLEEP)
        await shim.run(config=limited(cpus=1))
        error = await refusal(update(shim, "c1", {"cpu": {"cpus": "no"}}))
        assert "not a list like 0-2,7" in str(error)
        assert shim.agent.called("UpdateContainer") == []


async def test_an_update_that_the_guest_refuses_leaves_the_old_claim(tmp_path: Path) -> None:
    async with ShimBench(tmp_path, config(static=False)).running() as shim:
        shim.agent.program(SLEEP)
        await shim.create("p1", pod("sandbox"))
        await shim.run("c2", config=pod("container", cpus=1))
        shim.agent.fail("UpdateContainer", Code.INTERNAL, "no such limit")
        assert "no such limit" in str(await refusal(update(shim, "c2", {"cpu": {"quota": 500000}})))
        shim.machine.resized.clear()
        await shim.create("c3", pod("container", cpus=5))
        assert shim.machine.resized == [("vcpus", 7)]


async def test_no_vmm_runs_where_its_memory_would_not_be_counted(tmp_path: Path) -> None:
    (tmp_path / "memory").mkdir()
    async with ShimBench(tmp_path, config(static=True)).running() as shim:
        shim.hierarchies = (Hierarchy(str(tmp_path / "memory"), frozenset({"memory"}), ""),)
        linux = spec()["linux"] | {"cgroupsPath": "/pod/c1"}
        error = await refusal(shim.create(config=spec(linux=linux)))
        # A plain directory is no cgroup.
        assert documented("… takes no process (…)").search(str(error))
        assert "/pod/kata_c1 takes no process (No such file or directory)" in str(error)
        assert shim.hypervisor.machines == []
        assert list((tmp_path / "memory" / "pod").iterdir()) == []
