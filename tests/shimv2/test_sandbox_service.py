"""The Sandbox API over real ttrpc, with a fake guest: a pod, with containers and without."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from shimv2.pb import containerd_sandbox_pb2 as pb
from shimv2.pb import containerd_task_pb2 as task_pb
from shimv2.pb import cri_pod_sandbox_pb2 as cri
from shimv2.pb.runtime_options_pb2 import Options
from shimv2.task_service import SANDBOX_METHODS, SANDBOX_SERVICE, SERVICE_3
from tests.fakes.fake_hypervisor import FAKE_PID
from tests.fakes.fake_process import SLEEP, Program
from tests.harness.limitations import documented
from tests.shimv2.shim_bench import ShimBench, pod_annotations, refusal, spec
from ttrpc import Code
from ttrpc.pb.well_known_pb2 import Any as AnyMessage

POD = "c1"  # the bench's sandbox


async def ask(shim: ShimBench, method: str, pod: str = POD, **fields: Any) -> Any:
    """Call a method of the Sandbox API, and decode its answer by the method's name."""
    stem = "Ping" if method == "PingSandbox" else method
    request = getattr(pb, f"{stem}Request")
    if method == "CreateSandbox":
        (shim.root / "pod").mkdir(exist_ok=True)
        fields.setdefault("bundle_path", str(shim.root / "pod"))
    message = request(sandbox_id=pod, **fields)
    return await shim.call(method, message, getattr(pb, f"{stem}Response"), service=SANDBOX_SERVICE)


def of_cri(config: cri.PodSandboxConfig) -> AnyMessage:
    return AnyMessage(type_url="runtime.v1.PodSandboxConfig", value=config.SerializeToString())


async def run_pod(shim: ShimBench, **fields: Any) -> Any:
    await ask(shim, "CreateSandbox", **fields)
    return await ask(shim, "StartSandbox")


def member(**more: Any) -> dict[str, Any]:
    return spec(annotations=pod_annotations("container", POD), **more)


async def test_pod_lives_before_and_after_its_containers(tmp_path: Path) -> None:
    async with ShimBench(tmp_path).running() as shim:
        started = await run_pod(shim)
        assert started.pid == FAKE_PID
        shim.agent.program(Program(exit_status=3), container="m1")
        shim.agent.program(SLEEP, container="m2")
        await shim.create("m1", member())
        await shim.create("m2", member())
        await shim.start("m1")
        await shim.start("m2")
        assert (await shim.wait("m1")).exit_status == 3
        await shim.delete("m1")
        await shim.kill("m2")
        await shim.wait("m2")
        await shim.delete("m2")
        await shim.call("Shutdown", task_pb.ShutdownRequest(id="m2"))
        assert not shim.service.exit_requested.is_set()
        status = await ask(shim, "SandboxStatus", verbose=True)
        assert (status.state, status.pid) == ("SANDBOX_READY", FAKE_PID)
        assert status.created_at == started.created_at
        assert not status.HasField("exited_at")
        assert json.loads(status.info["info"])["pid"] == FAKE_PID
        await ask(shim, "PingSandbox")
        await ask(shim, "StopSandbox")
        assert (await ask(shim, "WaitSandbox")).exit_status == 0
        await ask(shim, "ShutdownSandbox")
        assert shim.service.exit_requested.is_set()
        assert not shim.state_dir.exists()


async def test_killed_vm_ends_the_wait_with_137_and_the_reason(tmp_path: Path) -> None:
    async with ShimBench(tmp_path).running() as shim:
        await run_pod(shim)
        shim.agent.program(SLEEP)
        await shim.run("m1", config=member())
        async with trio.open_nursery() as nursery:
            exits: list[int] = []

            async def wait() -> None:
                exits.append((await ask(shim, "WaitSandbox")).exit_status)

            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            shim.machine.die()
        assert exits == [137]
        assert (await shim.wait("m1")).exit_status == 137
        status = await ask(shim, "SandboxStatus", verbose=True)
        assert (status.state, status.pid) == ("SANDBOX_NOTREADY", 0)
        assert "was killed by SIGKILL" in status.info["info"]
        assert "was killed by SIGKILL" in str(await refusal(ask(shim, "PingSandbox")))
        # CRI stops no sandbox that has ended by itself: it is shut down at once.
        await ask(shim, "ShutdownSandbox")
        assert not shim.state_dir.exists()


async def test_methods_out_of_order_are_refused_by_what_they_need(tmp_path: Path) -> None:
    async with ShimBench(tmp_path).running() as shim:
        known = set(SANDBOX_METHODS) - {"CreateSandbox", "Platform", "ShutdownSandbox"}
        for method in sorted(known):
            error = await refusal(ask(shim, method))
            assert (error.code, "has not been created" in str(error)) == (Code.NOT_FOUND, True)
        foreign = await refusal(ask(shim, "CreateSandbox", pod="other"))
        assert foreign.code == Code.NOT_FOUND
        await ask(shim, "CreateSandbox")
        assert (await refusal(ask(shim, "CreateSandbox"))).code == Code.ALREADY_EXISTS
        assert (await ask(shim, "SandboxStatus")).state == "SANDBOX_NOTREADY"
        assert (await refusal(ask(shim, "PingSandbox"))).code == Code.UNAVAILABLE
        early = await refusal(shim.create("m1", member()))
        assert (early.code, "has no VM" in str(early)) == (Code.FAILED_PRECONDITION, True)
        await ask(shim, "StartSandbox")
        assert (await refusal(ask(shim, "StartSandbox"))).code == Code.FAILED_PRECONDITION
        pause = spec(annotations=pod_annotations("sandbox", POD))
        assert "has its VM already" in str(await refusal(shim.create("pause", pause)))
        for _ in range(2):
            await ask(shim, "StopSandbox")
        again = await refusal(ask(shim, "StartSandbox"))
        only_once = documented("sandbox … is stopped: only one that is created can be started")
        assert only_once.search(str(again))
        for _ in range(2):
            await ask(shim, "ShutdownSandbox")


async def test_wait_may_come_before_start_and_stop_without_it(tmp_path: Path) -> None:
    async with ShimBench(tmp_path).running() as shim:
        await ask(shim, "CreateSandbox")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(ask, shim, "WaitSandbox"))
            await trio.testing.wait_all_tasks_blocked()
            await ask(shim, "StopSandbox")
        assert not shim.hypervisor.machines


async def test_stop_during_the_boot_aborts_it(tmp_path: Path) -> None:
    async with ShimBench(tmp_path).running() as shim:
        shim.agent_reports = False
        await ask(shim, "CreateSandbox")
        errors = []

        async def start() -> None:
            errors.append(await refusal(ask(shim, "StartSandbox")))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(start)
            await trio.testing.wait_all_tasks_blocked(0.05)
            await ask(shim, "StopSandbox")
        assert "was stopped while" in str(errors[0])
        assert shim.machine.exit is not None
        assert not shim.state_dir.exists()


async def test_failed_start_can_be_tried_again_and_leaves_nothing(tmp_path: Path) -> None:
    async with ShimBench(tmp_path).running() as shim:
        shim.agent.fail("CreateSandbox", Code.INTERNAL, "no shm")
        await ask(shim, "CreateSandbox")
        assert "no shm" in str(await refusal(ask(shim, "StartSandbox")))
        assert not shim.state_dir.exists()
        shim.agent.behave("CreateSandbox")
        await ask(shim, "StartSandbox")
        await ask(shim, "ShutdownSandbox")


async def test_shutdown_after_a_create_that_failed_ends_the_shim(tmp_path: Path) -> None:
    async with ShimBench(tmp_path).running() as shim:
        broken = AnyMessage(type_url="runtime.v1.PodSandboxConfig", value=b"\xff")
        error = await refusal(ask(shim, "CreateSandbox", options=broken))
        assert error.code == Code.INVALID_ARGUMENT
        await ask(shim, "ShutdownSandbox")
        assert shim.service.exit_requested.is_set()


async def test_shutdown_leaves_containers_of_the_ordinary_mode_alone(tmp_path: Path) -> None:
    async with ShimBench(tmp_path).running() as shim:
        shim.agent.program(SLEEP)
        await shim.run()
        assert (await refusal(ask(shim, "ShutdownSandbox"))).code == Code.FAILED_PRECONDITION
        assert (await shim.state()).id == "c1"


async def test_guest_gets_what_cri_says_of_the_pod(tmp_path: Path) -> None:
    config = cri.PodSandboxConfig(
        hostname="a-pod", dns_config=cri.DNSConfig(servers=["192.0.2.1"], searches=["a", "b"])
    )
    config.linux.sysctls["kernel.msgmax"] = "9000"
    async with ShimBench(tmp_path).running() as shim:
        await run_pod(shim, options=of_cri(config))
        made = shim.agent.called("CreateSandbox")[0]
        assert (made.hostname, made.sandbox_id) == ("a-pod", POD)
        assert list(made.dns) == ["search a b", "nameserver 192.0.2.1"]
        shim.agent.program(SLEEP)
        await shim.run("m1", config=member())
        oci = shim.agent.called("CreateContainer")[0].OCI
        assert {"/etc/hostname", "/etc/hosts", "/etc/resolv.conf", "/dev/shm"} <= {
            mount.destination for mount in oci.Mounts
        }
        assert dict(oci.Linux.Sysctl) == {"kernel.msgmax": "9000"}
        await ask(shim, "ShutdownSandbox")


async def test_runtime_options_are_those_that_start_was_given(tmp_path: Path) -> None:
    options = Options(config_path="/etc/kata-containers/other.toml")
    given = AnyMessage(type_url="runtimeoptions.v1.Options", value=options.SerializeToString())
    shim = ShimBench(tmp_path)
    shim.invocation.options = given.SerializeToString()
    async with shim.running():
        await run_pod(shim)
        assert shim.config_paths == ["/etc/kata-containers/other.toml"]
        await ask(shim, "ShutdownSandbox")


async def test_host_network_is_refused(tmp_path: Path) -> None:
    config = cri.PodSandboxConfig()
    config.linux.security_context.namespace_options.network = cri.NODE
    async with ShimBench(tmp_path).running() as shim:
        await ask(shim, "CreateSandbox", options=of_cri(config))
        error = await refusal(ask(shim, "StartSandbox"))
        assert "run the pod without hostNetwork" in str(error)


async def test_shared_process_namespace_is_refused(tmp_path: Path) -> None:
    async with ShimBench(tmp_path).running() as shim:
        await run_pod(shim)
        linux = {"namespaces": [{"type": "pid", "path": "/proc/1/ns/pid"}, {"type": "mount"}]}
        error = await refusal(shim.create("m1", member(linux=linux)))
        assert error.code == Code.UNIMPLEMENTED
        assert documented(
            "… a process namespace that all containers share is that of the pod's pause container, "
            'and sandboxer = "shim" makes none; let the container have its own (Kubernetes: '
            'shareProcessNamespace: false), or use sandboxer = "podsandbox"'
        ).search(str(error))
        await ask(shim, "ShutdownSandbox")


async def test_platform_is_told_in_gos_words(tmp_path: Path) -> None:
    async with ShimBench(tmp_path).running() as shim:
        platform = (await ask(shim, "Platform")).platform
        assert platform.os == "linux"
        assert platform.architecture in {"amd64", "arm64"}


async def test_metrics_without_cgroups_are_refused_by_that(tmp_path: Path) -> None:
    async with ShimBench(tmp_path).running() as shim:
        await run_pod(shim)
        refused = str(await refusal(ask(shim, "SandboxMetrics")))
        assert documented("… the host has no cgroups: nothing counts what it uses").search(refused)
        await ask(shim, "ShutdownSandbox")


@pytest.mark.parametrize(("service", "version"), [("containerd.task.v2.Task", "v2"),
                                                  (SERVICE_3, "v3")])  # fmt: skip
async def test_task_api_is_served_in_both_versions(
    tmp_path: Path, service: str, version: str
) -> None:
    async with ShimBench(tmp_path).running() as shim:
        request = task_pb.ConnectRequest(id="c1")
        answer = await shim.call("Connect", request, task_pb.ConnectResponse, service=service)
        assert answer.version == version
