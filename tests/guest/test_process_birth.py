"""What a container that may look into every process sees of those that the agent makes."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from agent_proto.errors import AgentStatus
from agent_proto.pb import agent_pb2, oci_pb2
from tests.guest.agent_process import Guest, needs_agent, running_agent, spec
from tests.harness.limitations import documented

pytestmark = [
    needs_agent,
    pytest.mark.root,
    pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler for the watcher"),
]

KIND = "io.katacontainers.pkg.oci.container_type"


@pytest.fixture(scope="session")
def watcher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A static program that looks at all processes until /tmp/stop exists."""
    program = tmp_path_factory.mktemp("watcher") / "watcher"
    source = Path(__file__).with_name("watcher.c")
    subprocess.run(["cc", "-O2", "-static", "-o", program, source], check=True)
    return program


def _request(
    guest: Guest, cid: str, args: list[str], *, kind: str = "", joins: bool = False
) -> agent_pb2.CreateContainerRequest:
    made = spec(guest.rootfs, args)
    for names in (
        made.Process.Capabilities.Bounding,
        made.Process.Capabilities.Effective,
        made.Process.Capabilities.Permitted,
    ):
        names.append("CAP_SYS_PTRACE")
    # A directory that both containers have, to say when it is enough.
    shared = str(guest.rootfs / "etc")
    made.Mounts.add(destination="/tmp", type="bind", source=shared, options=["rbind"])
    if kind:
        made.Annotations[KIND] = kind
    return agent_pb2.CreateContainerRequest(
        container_id=cid, exec_id=cid, OCI=made, sandbox_pidns=joins
    )


async def _run(guest: Guest, request: agent_pb2.CreateContainerRequest) -> None:
    await guest.client.create_container(request)
    await guest.client.start_container(request.container_id)


async def _report(guest: Guest, cid: str) -> str:
    (guest.rootfs / "etc/stop").touch()
    return (await guest.output(cid)).decode()


def _refuse(request: agent_pb2.CreateContainerRequest, calls: Sequence[str]) -> None:
    """Give the container a seccomp profile, and no no_new_privs with it."""
    profile = request.OCI.Linux.Seccomp
    profile.DefaultAction = "SCMP_ACT_ALLOW"
    profile.Syscalls.add(Names=calls, Action="SCMP_ACT_ERRNO")


@pytest.mark.parametrize("has_profile", [False, True])
async def test_exec_is_not_met_before_it_is_at_home(
    tmp_path: Path, watcher: Path, has_profile: bool
) -> None:
    async with running_agent(tmp_path) as guest:
        shutil.copy(watcher, guest.rootfs / "bin/watcher")
        request = _request(guest, "c1", ["/bin/watcher"])
        if has_profile:
            _refuse(request, ["clone3", "unshare"])
        await _run(guest, request)
        assert await guest.client.read_stdout("c1", "c1") == b"watching\n"
        for number in range(150):
            # With capabilities of its own, as shims send them, and with the container's.
            process = oci_pb2.Process(Args=["true"], Cwd="/", Env=["PATH=/bin"])
            request = agent_pb2.ExecProcessRequest(
                container_id="c1", exec_id=f"e{number}", process=process
            )
            await guest.client.exec_process(request)
            assert await guest.client.wait_process("c1", f"e{number}") == 0
        report = await _report(guest, "c1")
    assert "BAD" not in report, report
    assert int(report.split()[-1]) > 0, "nothing was seen early: the watcher is too slow to prove"


async def test_memory_of_an_exec_in_the_making_is_nobody_elses(
    tmp_path: Path, watcher: Path
) -> None:
    async with running_agent(tmp_path) as guest:
        shutil.copy(watcher, guest.rootfs / "bin/watcher")
        await _run(guest, _request(guest, "c1", ["/bin/watcher", "attack"]))
        assert await guest.client.read_stdout("c1", "c1") == b"watching\n"
        tmp = guest.rootfs / "etc"
        reached = 0
        for number in range(300):
            process = oci_pb2.Process(Args=["true"], Cwd="/", Env=["PATH=/bin"])
            request = agent_pb2.ExecProcessRequest(
                container_id="c1", exec_id=f"e{number}", process=process
            )
            # One that is hit is not what was asked for any more.
            with contextlib.suppress(AgentStatus):
                await guest.client.exec_process(request)
                reached += await guest.client.wait_process("c1", f"e{number}") == 99
            if reached == 10:
                break
        await _report(guest, "c1")
        assert (tmp / "inside").exists(), "none was hit: the watcher is too slow to prove anything"
        assert not (tmp / "escaped").exists()


async def test_profile_that_would_leave_a_capability_to_an_exec_is_refused_among_watchers(
    tmp_path: Path,
) -> None:
    async with running_agent(tmp_path) as guest:
        strict = _request(guest, "strict", ["sleep", "1000"])
        _refuse(strict, ["setsid"])
        for names in (
            strict.OCI.Process.Capabilities.Bounding,
            strict.OCI.Process.Capabilities.Effective,
            strict.OCI.Process.Capabilities.Permitted,
        ):
            names.remove("CAP_SYS_PTRACE")
        await _run(guest, strict)
        await guest.exec("strict", "e1", "true")  # nobody can look into it
        await _run(guest, _request(guest, "other", ["sleep", "1000"]))
        refusal = documented(
            "the seccomp profile does not allow …, which a process takes that is put among others "
            "of which one may have CAP_SYS_PTRACE; allow it, or set no_new_privs "
            "(allowPrivilegeEscalation: false)"
        )
        with pytest.raises(AgentStatus, match=refusal):
            await guest.exec("strict", "e2", "true")
        await guest.exec("other", "e1", "true")


async def test_container_that_joins_a_shared_pid_namespace_is_not_met_before_it_is_at_home(
    tmp_path: Path, watcher: Path
) -> None:
    async with running_agent(tmp_path) as guest:
        shutil.copy(watcher, guest.rootfs / "bin/watcher")
        await _run(guest, _request(guest, "pod", ["sleep", "1000"], kind="pod_sandbox"))
        await _run(guest, _request(guest, "w", ["/bin/watcher"], kind="pod_container", joins=True))
        assert await guest.client.read_stdout("w", "w") == b"watching\n"
        for number in range(40):
            cid = f"c{number}"
            await _run(guest, _request(guest, cid, ["true"], kind="pod_container", joins=True))
            assert await guest.client.wait_process(cid, cid) == 0
            await guest.client.remove_container(cid)
        report = await _report(guest, "w")
    # Each container has a mount of the same root, so that the roots are the same directory.
    assert "BAD" not in report, report
    assert int(report.split()[-1]) > 0, "nothing was seen early: the watcher is too slow to prove"


async def test_pod_shares_the_pid_namespace_of_its_own_container(tmp_path: Path) -> None:
    async with running_agent(tmp_path) as guest:
        await _run(guest, _request(guest, "pod", ["sleep", "1111"], kind="pod_sandbox"))
        await _run(guest, _request(guest, "one", ["sleep", "1"], kind="pod_container", joins=True))
        script = "cat /proc/1/cmdline; echo; cat /proc/[0-9]*/cmdline; echo; kill -0 1 && echo seen"
        await _run(
            guest, _request(guest, "two", ["sh", "-c", script], kind="pod_container", joins=True)
        )
        said = await guest.output("two")
        assert said.startswith(b"sleep\x001111\x00\n"), said
        assert b"sleep\x001\x00" in said
        assert said.endswith(b"seen\n")
        # The end of one that is not the pod's own ends nobody else.
        assert await guest.client.wait_process("one", "one") == 0
        three = _request(guest, "three", ["sh", "-c", "echo here"], joins=True)
        await _run(guest, three)
        assert await guest.output("three") == b"here\n"
        await _run(guest, _request(guest, "own", ["sh", "-c", "echo $$"], kind="pod_container"))
        assert await guest.output("own") == b"1\n"
        # Execs see what their container sees.
        await guest.exec("pod", "e1", "sh", "-c", "cat /proc/1/cmdline", terminal=True)
        assert b"1111" in await guest.output("pod", "e1")
