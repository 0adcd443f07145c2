"""What can go wrong around a virtual machine, and what containerd hears of it. Fakes below."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import pytest
import trio
import trio.testing

from agent_proto.pb import agent_pb2
from hypervisors.errors import LaunchFailed, PreconditionFailed
from hypervisors.machine import HybridVsock
from shimv2 import host_process
from shimv2.config import AgentConfig, HypervisorConfig, RuntimeConfig
from shimv2.host_resources import HostResources
from shimv2.pb import containerd_process_pb2 as process_pb
from shimv2.pb import containerd_task_pb2 as pb
from shimv2.process import ContainerProcess
from tests.fakes.fake_process import SLEEP, Program
from tests.harness.limitations import documented
from tests.shimv2.shim_bench import ShimBench, pod_annotations, refusal, spec
from ttrpc import Code

_HOST_NETWORK = documented(
    "the host's network was asked for (no network namespace in the spec): a virtual machine cannot "
    "share it; run the pod without hostNetwork"
)


async def test_state_answers_while_the_vm_boots(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with ShimBench(tmp_path).running() as shim:
        shim.agent_reports = False
        async with trio.open_nursery() as nursery:
            nursery.start_soon(refusal, shim.create())
            await trio.testing.wait_all_tasks_blocked(0.05)
            with trio.fail_after(0.05):
                assert (await shim.state()).status == process_pb.CREATED
            await shim.call("Pids", pb.PidsRequest(id="c1"))
            await shim.call("Connect", pb.ConnectRequest(id="c1"))
            await shim.kill()


async def test_kill_during_the_boot_aborts_it(tmp_path: Path) -> None:
    async with ShimBench(tmp_path).running() as shim:
        shim.agent_reports = False
        errors = []

        async def create() -> None:
            errors.append(await refusal(shim.create()))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(create)
            await trio.testing.wait_all_tasks_blocked(0.05)
            await shim.kill()
        assert "killed by signal 9" in str(errors[0])
        assert (await refusal(shim.state())).code == Code.NOT_FOUND
        assert shim.machine.exit is not None
        assert not shim.state_dir.exists()


async def test_a_guest_that_never_boots_ends_in_its_deadline_with_a_report(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with ShimBench(tmp_path).running() as shim:
        shim.agent_reports = False

        async def power_on(machine: object) -> None:
            shim.machine.console.feed(b"[    0.1] Kernel panic - not syncing: no init\n")

        shim.hypervisor.on_launch = power_on
        error = await refusal(shim.create(timeout_s=20))
        assert error.code == Code.DEADLINE_EXCEEDED
        assert "waiting for the agent in the guest" in str(error)
        assert "Kernel panic" in str(error)
        assert list((tmp_path / "reports").iterdir())
        assert not shim.state_dir.exists()


async def test_the_configured_boot_deadline_holds_without_one_of_the_client(tmp_path: Path) -> None:
    config = RuntimeConfig(agent=AgentConfig(readiness="push", dial_timeout_s=0.1))
    async with ShimBench(tmp_path, config).running() as shim:
        shim.agent_reports = False
        error = await refusal(shim.create())
        assert error.code == Code.DEADLINE_EXCEEDED
        assert "of 0.1 s: the agent in the guest did not answer within 0.1 s (`dial_timeout`)" in (
            str(error)
        )
        assert "the guest printed nothing" in str(error)


async def test_a_short_boot_deadline_leaves_time_to_dial_an_agent_that_does_not_report(
    tmp_path: Path,
) -> None:
    config = RuntimeConfig(agent=AgentConfig(readiness="auto", dial_timeout_s=1.5))
    async with ShimBench(tmp_path, config).running() as shim:
        shim.agent_reports = False
        await shim.run()
        assert (await shim.wait()).exit_status == 0


async def test_no_boot_lasts_longer_than_its_deadline(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    config = RuntimeConfig(agent=AgentConfig(readiness="auto", dial_timeout_s=0.6))
    async with ShimBench(tmp_path, config).running() as shim:

        async def power_on(machine: object) -> None:
            """No agent."""

        shim.hypervisor.on_launch = power_on
        started = trio.current_time()
        error = await refusal(shim.create())
        assert trio.current_time() - started < 1.5
        assert "within 0.6 s" in str(error)


async def test_kernel_modules_of_the_configuration_reach_the_agent(tmp_path: Path) -> None:
    agent = AgentConfig(readiness="push", kernel_modules=("e1000e EEE=1 A=b", "dummy"))
    async with ShimBench(tmp_path, RuntimeConfig(agent=agent)).running() as shim:
        await shim.create()
        sent = shim.agent.called("CreateSandbox")[0].kernel_modules
        assert [(one.name, list(one.parameters)) for one in sent] == [
            ("e1000e", ["EEE=1", "A=b"]),
            ("dummy", []),
        ]


async def test_the_backends_limit_of_vcpus_is_kept_rather_than_refused(tmp_path: Path) -> None:
    config = RuntimeConfig(
        hypervisor=HypervisorConfig(default_vcpus=4.0), agent=AgentConfig(readiness="push")
    )
    async with ShimBench(tmp_path, config).running() as shim:
        shim.hypervisor.max_vcpus = 2
        await shim.create()
        assert (shim.machine.spec.vcpus, shim.machine.spec.max_vcpus) == (2, 2)


async def test_a_client_that_leaves_during_create_leaves_nothing(tmp_path: Path) -> None:
    async with ShimBench(tmp_path).running() as shim:
        shim.agent_reports = False
        client = await shim.connect()
        request = pb.CreateTaskRequest(id="c1", bundle=str(shim.bundle("c1")))
        async with trio.open_nursery() as nursery:

            async def create() -> None:
                with pytest.raises(Exception, match=r".*"):
                    await client.call(
                        "containerd.task.v2.Task", "Create", request.SerializeToString()
                    )

            nursery.start_soon(create)
            await trio.testing.wait_all_tasks_blocked(0.05)
            client.close()
        with trio.fail_after(30):
            await shim.until(lambda: not shim.state_dir.exists())
        assert (await refusal(shim.state())).code == Code.NOT_FOUND


async def test_a_create_after_a_failed_one_works(tmp_path: Path) -> None:
    async with ShimBench(tmp_path).running() as shim:
        shim.hypervisor.launch_error = LaunchFailed("qemu", "exited with 1", ["no memory"])
        assert "no memory" in str(await refusal(shim.create()))
        shim.hypervisor.launch_error = None
        await shim.run()
        assert (await shim.wait()).exit_status == 0


async def test_a_delete_that_failed_can_be_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with ShimBench(tmp_path).running() as shim:
        await shim.run()
        await shim.wait()

        async def broken(*_: object) -> None:
            raise OSError(errno.EIO, "broken")

        with monkeypatch.context() as patched:
            patched.setattr(HostResources, "run_poststop", broken)
            assert "broken" in str(await refusal(shim.delete()))
        with trio.fail_after(10):
            assert (await shim.delete()).exit_status == 0


async def test_a_delete_of_an_exec_that_failed_can_be_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with ShimBench(tmp_path).running() as shim:
        shim.agent.program(SLEEP)
        await shim.run()
        await shim.exec("e1")

        async def broken(*_: object) -> None:
            raise OSError(errno.EIO, "broken")

        with monkeypatch.context() as patched:
            patched.setattr(ContainerProcess, "drain", broken)
            assert "broken" in str(await refusal(shim.delete(exec_id="e1")))
        with trio.fail_after(10):
            assert (await shim.delete(exec_id="e1")).exit_status == 0
        await shim.exec("e1")


async def test_what_is_missing_on_the_host_is_named_before_anything_is_taken(
    tmp_path: Path,
) -> None:
    async with ShimBench(tmp_path).running() as shim:
        shim.hypervisor.check_error = PreconditionFailed(
            "guest kernel", path=Path("/no/vmlinux"), why="cannot be read", fix="build it", errno=2
        )
        error = await refusal(shim.create())
        assert error.code == Code.FAILED_PRECONDITION
        assert "guest kernel /no/vmlinux" in str(error)
        assert "build it" in str(error)
        assert not shim.hypervisor.helpers
        assert not shim.mounts.calls
        assert not shim.state_dir.exists()


async def test_a_container_cannot_ask_for_the_processes_of_one_of_several(tmp_path: Path) -> None:
    apart = [{"type": "network"}, {"type": "pid"}]
    asks = [{"type": "network"}, {"type": "pid", "path": "/proc/7/ns/pid"}]
    member = pod_annotations("container", "p1")
    async with ShimBench(tmp_path).running() as shim:
        shim.agent.program(SLEEP)
        await shim.run("p1", config=spec(annotations=pod_annotations("sandbox", "p1")))
        for container in ("a", "b"):
            alone = spec(annotations=member, linux={"namespaces": apart})
            await shim.run(container, config=alone)
        error = await refusal(
            shim.create("c", config=spec(annotations=member, linux={"namespaces": asks}))
        )
        text = documented(
            "container … asks for the processes of another container, and 2 run in this VM, which "
            "cannot be told apart by a pid of the host; leave the target out (kubectl debug "
            "without --target), or set shareProcessNamespace"
        )
        assert text.search(str(error))


@pytest.mark.parametrize(
    ("linux", "code", "words"),
    [
        ({"namespaces": [{"type": "pid"}]}, Code.FAILED_PRECONDITION, _HOST_NETWORK.pattern),
        ({"namespaces": [{"type": "network"}, {"type": "user"}]}, Code.INVALID_ARGUMENT, "uidMap"),
        (
            {
                "namespaces": [{"type": "network"}],
                "devices": [{"path": "/dev/kvm", "type": "c", "major": 10, "minor": 232}],
            },
            Code.INVALID_ARGUMENT,
            "/dev/kvm",
        ),
    ],
)
async def test_a_spec_that_no_vm_can_have_is_refused_before_anything_is_taken(
    tmp_path: Path, linux: dict[str, object], code: Code, words: str
) -> None:
    async with ShimBench(tmp_path).running() as shim:
        error = await refusal(shim.create(config=spec(linux=linux)))
        assert error.code == code
        assert re.search(words, str(error))
        assert not shim.hypervisor.helpers
        assert not shim.mounts.calls


@pytest.mark.parametrize("part", ["vmm", "virtiofsd", "vhost-device-vsock", "agent"])
async def test_the_death_of_a_part_ends_every_process_with_137_within_a_second(
    tmp_path: Path, part: str, autojump_clock: trio.testing.MockClock
) -> None:
    async with ShimBench(tmp_path).running() as shim:
        shim.agent.program(SLEEP)
        await shim.run()
        await shim.exec("e1")
        await shim.start(exec_id="e1")
        if part == "vmm":
            shim.machine.die("killed by SIGKILL")
        elif part == "agent":
            shim.agent.wire.drop()
        else:
            shim.hypervisor.helper(part).die()
        with trio.fail_after(10):
            assert (await shim.wait(exec_id="e1")).exit_status == 137
            assert (await shim.wait()).exit_status == 137
        assert [message.id for message in shim.publisher.named("exit")] == ["e1", "c1"]
        reason = str(shim.log.named("sandbox failed")[0]["reason"])
        assert {"vmm": "SIGKILL", "agent": "agent"}.get(part, part) in reason
        assert not shim.log.named("output cut short")
        assert (await shim.state()).status == process_pb.STOPPED
        assert "137" not in str(await refusal(shim.exec("e2")))
        assert (await shim.delete()).exit_status == 137


async def test_after_the_vm_died_a_pod_says_why_it_takes_no_container(tmp_path: Path) -> None:
    async with ShimBench(tmp_path).running() as shim:
        shim.agent.program(SLEEP)
        await shim.run("p1", config=spec(annotations=pod_annotations("sandbox", "p1")))
        shim.machine.die("killed by SIGKILL")
        await shim.wait("p1")
        config = spec(annotations=pod_annotations("container", "p1"))
        error = await refusal(shim.create("a", config=config))
        assert error.code == Code.UNAVAILABLE
        assert "SIGKILL" in str(error)


async def test_the_death_of_the_vm_while_it_boots_fails_create_with_the_reason(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with ShimBench(tmp_path).running() as shim:

        async def power_on(machine: object) -> None:
            shim.nursery.start_soon(die)

        async def die() -> None:
            await trio.testing.wait_all_tasks_blocked()
            shim.machine.die("was killed by SIGSEGV")

        shim.hypervisor.on_launch = power_on
        with trio.fail_after(10):
            error = await refusal(shim.create())
        assert "SIGSEGV" in str(error)


async def test_an_agent_that_never_answers_create_ends_in_the_deadline(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with ShimBench(tmp_path).running() as shim:
        shim.agent.hang("CreateContainer")
        error = await refusal(shim.create(timeout_s=2))
        assert error.code == Code.DEADLINE_EXCEEDED
        assert "creating the container in the guest" in str(error)


async def test_a_kill_that_a_hung_agent_ignores_kills_the_vm(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with ShimBench(tmp_path).running() as shim:
        shim.agent.program(SLEEP)
        await shim.run()
        shim.agent.hang("SignalProcess")
        with trio.fail_after(10):
            await shim.kill()
            assert (await shim.wait()).exit_status == 137
        assert shim.machine.exit is not None


async def test_a_refused_member_is_removed_from_guest_and_share(tmp_path: Path) -> None:
    async with ShimBench(tmp_path).running() as shim:
        shim.agent.program(SLEEP)
        await shim.run("p1", config=spec(annotations=pod_annotations("sandbox", "p1")))
        shim.agent.fail("CreateContainer", Code.INTERNAL, "no such user")
        config = spec(annotations=pod_annotations("container", "p1"))
        assert "no such user" in str(await refusal(shim.create("a", config=config)))
        assert "a" not in os.listdir(f"{shim.state_dir.path}/mounts")
        shim.agent.behave("CreateContainer")
        await shim.run("a", config=config)


async def test_an_agent_without_reports_is_dialled(tmp_path: Path) -> None:
    config = RuntimeConfig(agent=AgentConfig(readiness="dial"))
    async with ShimBench(tmp_path, config).running() as shim:
        shim.agent_reports = False
        shim.agent.keeps_output = False
        shim.agent.program(Program(stdout=b"x" * 100_000, exit_status=4))
        fifo = shim.fifo("out")
        reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
        await shim.create(stdout=fifo)
        await shim.start()
        assert await read_to_end(reader) == b"x" * 100_000
        assert (await shim.wait()).exit_status == 4


@pytest.mark.parametrize("reports", [True, False])
async def test_created_container_that_is_killed_ends_under_any_agent(
    tmp_path: Path, reports: bool
) -> None:
    config = RuntimeConfig(agent=AgentConfig(readiness="push" if reports else "dial"))
    async with ShimBench(tmp_path, config).running() as shim:
        shim.agent_reports = reports
        shim.agent.program(SLEEP)
        await shim.create()
        await shim.kill()
        assert (await shim.wait()).exit_status == 137


async def test_a_pod_gets_one_shm_and_its_resolv_conf(tmp_path: Path) -> None:
    resolv = tmp_path / "resolv.conf"
    resolv.write_text("nameserver 10.0.0.1\nsearch a.b\n")
    mounts = [
        {"destination": "/etc/resolv.conf", "type": "bind", "source": str(resolv),
         "options": ["rbind", "ro"]},
        {"destination": "/dev/shm", "type": "bind", "source": "/run/x/shm", "options": ["rbind"]},
    ]  # fmt: skip
    config = spec(annotations=pod_annotations("sandbox", "p1"), mounts=mounts, hostname="pod")
    async with ShimBench(tmp_path).running() as shim:
        await shim.create("p1", config=config)
        sandbox = shim.agent.sandbox
        assert isinstance(sandbox, agent_pb2.CreateSandboxRequest)
        assert list(sandbox.dns) == ["nameserver 10.0.0.1", "search a.b"]
        assert sandbox.hostname == "pod"
        assert [storage.driver for storage in sandbox.storages] == ["virtio-fs", "ephemeral"]
        sent = shim.agent.called("CreateContainer")[0].OCI
        assert [mount.source for mount in sent.Mounts] == [
            "/run/kata-containers/shared/containers/volume:1-resolv.conf",
            "/run/kata-containers/sandbox/shm",
        ]
        bound = [call for call in shim.mounts.calls if call[0] == "bind"]
        assert bound[-1][1] == str(resolv)
        assert bound[-1][3] is True


async def read_to_end(descriptor: int) -> bytes:
    """Everything a fifo brings until its last writer has closed it."""
    data = b""
    while True:
        await trio.lowlevel.wait_readable(descriptor)
        try:
            chunk = os.read(descriptor, 1 << 16)
        except BlockingIOError:
            continue
        if not chunk:
            os.close(descriptor)
            return data
        data += chunk


async def test_a_vmm_with_a_vsock_of_its_own_needs_no_daemon_for_it(tmp_path: Path) -> None:
    async with ShimBench(tmp_path).running() as shim:
        shim.hypervisor.hybrid_vsock = True
        await shim.create()
        assert [helper.name for helper in shim.hypervisor.helpers] == ["virtiofsd"]
        assert HybridVsock(id="vsock0", uds_path=shim.agent.uds_path) in shim.machine.spec.devices
        await shim.start()


async def test_a_daemon_that_goes_in_order_waits_for_the_end_of_its_vmm(tmp_path: Path) -> None:
    async with ShimBench(tmp_path).running() as shim:
        shim.agent.program(SLEEP)
        await shim.run()
        shim.hypervisor.helper("virtiofsd").die(code=0)
        shim.agent.wire.drop()
        await trio.sleep(0.5)  # a VMM takes a while to end after it has let its devices go
        shim.machine.die("the guest powered off")
        assert (await shim.wait()).exit_status == 137
        failed = shim.log.named("sandbox failed")
        assert "the guest powered off" in str(failed[0]["reason"])


async def test_a_lost_agent_waits_for_the_end_of_a_vmm_that_is_on_its_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_process, "is_ending", lambda pid: pid == shim.machine.pid)
    async with ShimBench(tmp_path).running() as shim:
        shim.agent.program(SLEEP)
        await shim.run()
        shim.agent.wire.drop()
        await trio.sleep(0.5)  # what a large VMM needs to give its memory back
        shim.machine.die("was killed by SIGKILL")
        assert (await shim.wait()).exit_status == 137
        failed = shim.log.named("sandbox failed")
        assert "was killed by SIGKILL" in str(failed[0]["reason"])


async def test_a_launch_that_fails_says_why_though_its_daemons_end_first(tmp_path: Path) -> None:
    async with ShimBench(tmp_path).running() as shim:

        async def give_up(_: object) -> None:
            shim.machine.die()
            shim.hypervisor.helper("virtiofsd").die(code=0)
            await trio.testing.wait_all_tasks_blocked()
            raise LaunchFailed("qemu", "gave no answer within 15 s", [])

        shim.hypervisor.on_launch = give_up
        error = await refusal(shim.create())
        assert "gave no answer within 15 s" in str(error)
