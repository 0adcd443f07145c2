"""Containers and processes of the real agent."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest
import trio

from agent_proto.errors import AgentStatus
from agent_proto.pb import agent_pb2, oci_pb2
from tests.guest.agent_process import Guest, needs_agent, running_agent, spec
from ttrpc import Code

pytestmark = [needs_agent, pytest.mark.root]

# What the kernel puts into a pipe by default, and a bit of the process's own.
PIPE_BYTES = 64 * 1024


async def test_container_prints_and_ends_with_its_status(tmp_path: Path) -> None:
    async with running_agent(tmp_path) as guest:
        await guest.start("c1", "sh", "-c", "echo out; echo err >&2; exit 7")
        assert await guest.output("c1") == b"out\n"
        assert await guest.client.read_stderr("c1", "c1") == b"err\n"
        assert await guest.client.wait_process("c1", "c1") == 7
        await guest.client.remove_container("c1")
        with pytest.raises(AgentStatus) as gone:
            await guest.client.start_container("c1")
        assert gone.value.code == Code.NOT_FOUND


async def test_signal_ends_a_process_with_128_and_its_number(tmp_path: Path) -> None:
    async with running_agent(tmp_path) as guest:
        await guest.start("c1", "sleep", "1000")
        await guest.exec("c1", "e1", "sleep", "1000")
        await guest.client.signal_process("c1", "e1", 2)
        assert await guest.client.wait_process("c1", "e1") == 128 + 2
        # A pid namespace's first process without a handler would not see SIGTERM.
        await guest.client.signal_process("c1", "c1", 15)
        assert await guest.client.wait_process("c1", "c1") == 128 + 9


async def test_kill_of_everything_reaches_exec_processes(tmp_path: Path) -> None:
    async with running_agent(tmp_path) as guest:
        await guest.start("c1", "sleep", "1000")
        await guest.exec("c1", "e1", "sleep", "1000")
        await guest.client.signal_process("c1", "", 9)
        assert await guest.client.wait_process("c1", "e1") == 128 + 9
        assert await guest.client.wait_process("c1", "c1") == 128 + 9
        with pytest.raises(AgentStatus) as gone:
            await guest.client.signal_process("c1", "", 9)
        assert gone.value.code == Code.NOT_FOUND


async def test_every_waiter_gets_the_same_status(tmp_path: Path) -> None:
    async with running_agent(tmp_path) as guest:
        await guest.start("c1", "sh", "-c", "read x; exit 5")
        statuses = []

        async def wait() -> None:
            statuses.append(await guest.client.wait_process("c1", "c1"))

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(wait)
            await guest.client.write_stdin("c1", "c1", b"go\n")
        assert statuses == [5, 5, 5]


async def test_missing_program_fails_at_once_and_says_so(tmp_path: Path) -> None:
    async with running_agent(tmp_path) as guest:
        with pytest.raises(AgentStatus, match=r"executable file not found in \$PATH"):
            await guest.create("c1", ["no-such-program"])
        await guest.start("c2", "sleep", "1000")
        with pytest.raises(AgentStatus, match="no such file or directory"):
            await guest.exec("c2", "e1", "/bin/missing")
        with pytest.raises(AgentStatus) as unknown:
            await guest.client.wait_process("c2", "e1")
        assert unknown.value.code == Code.NOT_FOUND


async def test_exec_id_can_be_used_again_after_its_end(tmp_path: Path) -> None:
    async with running_agent(tmp_path) as guest:
        await guest.start("c1", "sleep", "1000")
        for code in (1, 2):
            await guest.exec("c1", "e", "sh", "-c", f"exit {code}")
            assert await guest.client.wait_process("c1", "e") == code
        await guest.exec("c1", "e", "sleep", "1000")
        with pytest.raises(AgentStatus) as duplicate:
            await guest.exec("c1", "e", "true")
        assert duplicate.value.code == Code.ALREADY_EXISTS


async def test_output_that_nobody_reads_stops_its_writer(tmp_path: Path) -> None:
    async with running_agent(tmp_path) as guest:
        script = "dd if=/dev/zero bs=1k count=256 2>/dev/null; echo done >/tmp/done"
        await guest.start("c1", "sh", "-c", script)
        first = await guest.client.read_stdout("c1", "c1", 1024)
        await guest.exec("c1", "look", "cat", "/tmp/done")
        assert await guest.output("c1", "look") == b""
        assert len(first + await guest.output("c1")) == 256 * 1024
        assert await guest.client.wait_process("c1", "c1") == 0


async def test_output_ends_though_a_background_child_holds_it(tmp_path: Path) -> None:
    async with running_agent(tmp_path) as guest:
        await guest.start("c1", "sleep", "1000")
        await guest.exec("c1", "e1", "sh", "-c", "sleep 1000 & echo said")
        assert await guest.output("c1", "e1") == b"said\n"
        assert await guest.client.wait_process("c1", "e1") == 0


async def test_input_reaches_the_process_and_ends(tmp_path: Path) -> None:
    async with running_agent(tmp_path) as guest:
        await guest.start("c1", "cat")
        sent = bytes(range(256)) * 1024
        received = []

        async def read() -> None:
            received.append(await guest.output("c1"))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            rest = sent
            while rest:
                rest = rest[await guest.client.write_stdin("c1", "c1", rest[:PIPE_BYTES]) :]
            await guest.client.close_stdin("c1", "c1")
        assert received == [sent]


async def test_terminal_has_the_size_it_was_given(tmp_path: Path) -> None:
    async with running_agent(tmp_path) as guest:
        await guest.start("c1", "sh", "-c", "read x; stty size", terminal=True)
        await guest.client.tty_win_resize("c1", "c1", 33, 99)
        await guest.client.write_stdin("c1", "c1", b"go\n")
        assert b"33 99" in await guest.output("c1")
        await guest.start("c2", "sleep", "1000")
        with pytest.raises(AgentStatus) as no_tty:
            await guest.client.tty_win_resize("c2", "c2", 1, 1)
        assert no_tty.value.code == Code.UNAVAILABLE


async def test_paused_container_does_nothing_until_it_is_resumed(tmp_path: Path) -> None:
    async with running_agent(tmp_path) as guest:
        await guest.start("c1", "sh", "-c", "read x; echo after; exit 3")
        await guest.client.pause_container("c1")
        await guest.client.write_stdin("c1", "c1", b"go\n")
        with trio.move_on_after(0.3) as waiting:
            await guest.client.wait_process("c1", "c1")
        assert waiting.cancelled_caught
        with pytest.raises(AgentStatus) as paused:
            await guest.exec("c1", "e1", "true")
        assert paused.value.code == Code.FAILED_PRECONDITION
        await guest.client.resume_container("c1")
        assert await guest.output("c1") == b"after\n"
        assert await guest.client.wait_process("c1", "c1") == 3


async def test_seccomp_profile_holds_for_init_and_exec(tmp_path: Path) -> None:
    async with running_agent(tmp_path) as guest:
        profile = oci_pb2.LinuxSeccomp(DefaultAction="SCMP_ACT_ALLOW")
        profile.Syscalls.add(Names=["mkdir", "mkdirat"], Action="SCMP_ACT_ERRNO")
        made = spec(guest.rootfs, ["sh", "-c", "mkdir /tmp/a || echo refused; sleep 1000"])
        (guest.rootfs / "bin/mkdir").symlink_to("busybox")
        made.Linux.Seccomp.CopyFrom(profile)
        await guest.client.create_container(
            agent_pb2.CreateContainerRequest(container_id="c1", exec_id="c1", OCI=made)
        )
        await guest.client.start_container("c1")
        assert await guest.client.read_stdout("c1", "c1") == b"refused\n"
        await guest.exec("c1", "e1", "mkdir", "/tmp/b")
        assert await guest.client.wait_process("c1", "e1") == 1


async def test_user_namespace_maps_the_containers_root_to_an_ordinary_user(tmp_path: Path) -> None:
    async with running_agent(tmp_path) as guest:
        script = "cat /proc/self/uid_map; id -u; echo x >/dev/null && echo >/tmp/made && echo fine"
        made = spec(guest.rootfs, ["sh", "-c", f"{script}; sleep 1000"])
        made.Linux.Namespaces.add(Type="user")
        for mappings in (made.Linux.UIDMappings, made.Linux.GIDMappings):
            mappings.add(HostID=100000, ContainerID=0, Size=65536)
        made.Process.Rlimits.add(Type="RLIMIT_CORE", Hard=4096, Soft=4096)
        await guest.client.create_container(
            agent_pb2.CreateContainerRequest(container_id="c1", exec_id="c1", OCI=made)
        )
        await guest.client.start_container("c1")
        said = b""
        while not said.endswith(b"fine\n"):
            part = await guest.client.read_stdout("c1", "c1")
            assert part, (said, await guest.client.read_stderr("c1", "c1"))
            said += part
        assert said.split() == [b"0", b"100000", b"65536", b"0", b"fine"]
        await guest.exec("c1", "e1", "sh", "-c", "id -u; touch /tmp/more; ulimit -c", terminal=True)
        assert await guest.output("c1", "e1") == b"0\r\n8\r\n"


async def test_recursively_read_only_mount_is_read_only_down_to_its_submounts(
    tmp_path: Path,
) -> None:
    async with running_agent(tmp_path) as guest:
        # The agent's /run is a mount of its own below /.
        script = "touch /host/run/made 2>&1; touch /host/made 2>&1; sleep 1000"
        made = spec(guest.rootfs, ["sh", "-c", script])
        made.Mounts.add(destination="/host", type="bind", source="/", options=["rbind", "rro"])
        await guest.client.create_container(
            agent_pb2.CreateContainerRequest(container_id="c1", exec_id="c1", OCI=made)
        )
        await guest.client.start_container("c1")
        said = b""
        while said.count(b"\n") < 2:
            said += await guest.client.read_stdout("c1", "c1")
        assert said.count(b"Read-only file system") == 2, said


async def test_start_hook_runs_in_the_container_and_its_failure_is_the_starts(
    tmp_path: Path,
) -> None:
    async with running_agent(tmp_path) as guest:
        for cid, status in (("good", 0), ("bad", 3)):
            made = spec(guest.rootfs, ["cat", "/tmp/state"])
            script = f"cat >/tmp/state; exit {status}"
            made.Hooks.StartContainer.add(Path="/bin/sh", Args=["sh", "-c", script], Timeout=10)
            made.Hooks.StartContainer[0].Env.append("PATH=/bin")
            await guest.client.create_container(
                agent_pb2.CreateContainerRequest(container_id=cid, exec_id=cid, OCI=made)
            )
            if status == 0:
                await guest.client.start_container(cid)
                assert b'"id":"good"' in await guest.output(cid)
            else:
                with pytest.raises(AgentStatus, match="hook /bin/sh"):
                    await guest.client.start_container(cid)
        made = spec(guest.rootfs, ["true"])
        made.Hooks.Prestart.add(Path="/bin/true")
        with pytest.raises(AgentStatus) as refused:
            await guest.client.create_container(
                agent_pb2.CreateContainerRequest(container_id="c3", OCI=made)
            )
        assert refused.value.code == Code.UNIMPLEMENTED


async def test_start_hook_is_who_the_program_will_be(tmp_path: Path) -> None:
    async with running_agent(tmp_path) as guest:
        made = spec(guest.rootfs, ["cat", "/tmp/hook"])
        made.Process.User.UID, made.Process.User.GID = 1000, 2000
        made.Process.User.AdditionalGids.append(3000)
        for names in (made.Process.Capabilities.Effective, made.Process.Capabilities.Permitted):
            del names[:]
        made.Process.NoNewPrivileges = True
        made.Linux.Seccomp.DefaultAction = "SCMP_ACT_ALLOW"
        made.Linux.Seccomp.Syscalls.add(Names=["unshare"], Action="SCMP_ACT_ERRNO")
        wanted = "Uid|Gid|Groups|CapEff|CapPrm|NoNewPrivs|Seccomp:"
        made.Hooks.StartContainer.add(
            Path="/bin/sh",
            Args=["sh", "-c", f"grep -E '^({wanted})' /proc/self/status >/tmp/hook"],
            Env=["PATH=/bin"],
        )
        (guest.rootfs / "bin/grep").symlink_to("busybox")
        await _run(guest, made)
        said = dict(line.split(":\t") for line in (await guest.output("c1")).decode().splitlines())
        assert said["Uid"].split() == ["1000"] * 4
        assert said["Gid"].split() == ["2000"] * 4
        assert said["Groups"].split() == ["3000"]
        assert int(said["CapEff"], 16) == int(said["CapPrm"], 16) == 0
        assert (said["NoNewPrivs"], said["Seccomp"]) == ("1", "2")


async def test_container_whose_start_hangs_can_be_removed(tmp_path: Path) -> None:
    async with running_agent(tmp_path) as guest:
        made = spec(guest.rootfs, ["true"])
        made.Mounts.add(
            destination="/said", type="bind", source=str(guest.rootfs / "etc"), options=["rbind"]
        )
        os.mkfifo(guest.rootfs / "etc/running")
        running = os.open(guest.rootfs / "etc/running", os.O_RDONLY | os.O_NONBLOCK)
        script = "echo >/said/running; sleep 1000"
        made.Hooks.StartContainer.add(Path="/bin/sh", Args=["sh", "-c", script], Env=["PATH=/bin"])
        await guest.client.create_container(
            agent_pb2.CreateContainerRequest(container_id="c1", exec_id="c1", OCI=made)
        )
        async with trio.open_nursery() as nursery:

            async def start() -> None:
                # Its end before the program's beginning looks the same as that to the agent.
                with contextlib.suppress(AgentStatus):
                    await guest.client.start_container("c1")

            nursery.start_soon(start)
            await trio.lowlevel.wait_readable(running)  # the hook is at it
            os.close(running)
            await guest.client.remove_container("c1")
        with pytest.raises(AgentStatus) as gone:
            await guest.client.start_container("c1")
        assert gone.value.code == Code.NOT_FOUND


@pytest.mark.parametrize(
    ("propagation", "shown"),
    [("shared", "shared:"), ("rshared", "shared:"), ("rslave", ""), ("unbindable", "unbindable")],
)
async def test_root_has_the_propagation_that_was_asked_for(
    tmp_path: Path, propagation: str, shown: str
) -> None:
    async with running_agent(tmp_path) as guest:
        script = "while read -r a b c d point rest; do [ $point = / ] && echo $rest; done"
        made = spec(guest.rootfs, ["sh", "-c", f"{script} </proc/self/mountinfo"])
        made.Linux.RootfsPropagation = propagation
        # Each volume has its own, whatever the root's.
        made.Mounts.add(
            destination="/etc", type="bind", source=str(guest.rootfs), options=["rbind", "rshared"]
        )
        await _run(guest, made)
        said = (await guest.output("c1")).decode()
        assert said
        assert shown in said
        assert ("shared:" in said) == (shown == "shared:")


async def test_unknown_propagation_is_refused(tmp_path: Path) -> None:
    async with running_agent(tmp_path) as guest:
        made = spec(guest.rootfs, ["true"])
        made.Linux.RootfsPropagation = "sideways"
        with pytest.raises(AgentStatus, match='rootfsPropagation "sideways"'):
            await _run(guest, made)


@pytest.mark.parametrize("directory", ["/closed/work", "/closed/new/er", "/fresh/one"])
@pytest.mark.parametrize("read_only", [False, True])
async def test_working_directory_is_made_and_entered_as_root(
    tmp_path: Path, directory: str, read_only: bool
) -> None:
    async with running_agent(tmp_path) as guest:
        (guest.rootfs / "closed/work").mkdir(parents=True)
        (guest.rootfs / "closed").chmod(0o700)
        made = spec(guest.rootfs, ["sh", "-c", "echo $PWD; id -u; touch /x 2>&1"])
        made.Root.Readonly = read_only
        made.Process.User.UID = 1000
        made.Process.Cwd = directory
        for held in (made.Process.Capabilities.Effective, made.Process.Capabilities.Permitted):
            del held[:]
        made.Process.Env.append(f"PWD={directory}")
        await _run(guest, made)
        said = await guest.output("c1")
        assert said.startswith(f"{directory}\n1000\n".encode()), said


async def _run(guest: Guest, made: oci_pb2.Spec) -> None:
    request = agent_pb2.CreateContainerRequest(container_id="c1", exec_id="c1", OCI=made)
    await guest.client.create_container(request)
    await guest.client.start_container("c1")
