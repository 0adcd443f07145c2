"""What the real agent does with requests that it must not follow."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
import trio

from agent_proto.errors import AgentStatus
from agent_proto.pb import agent_pb2
from tests.guest.agent_process import connect, needs_agent, running_agent, spec
from tests.harness.limitations import documented
from ttrpc import Code

pytestmark = [needs_agent, pytest.mark.root]

SHARED = "/run/kata-containers/shared/containers"


async def _receive(stream: trio.SocketStream, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = await stream.receive_some(count - len(data))
        assert part
        data += part
    return data


async def _status_of_reply(stream: trio.SocketStream) -> tuple[int, int]:
    """Stream id and status code of the next frame."""
    length, stream_id, kind, _ = struct.unpack(">IIBB", await _receive(stream, 10))
    body = await _receive(stream, length)
    assert kind == 2
    # Response.status is field 1, its code is field 1 of that, both first.
    return stream_id, body[3] if body[:1] == b"\x0a" else 0


async def test_message_beyond_4_mib_is_refused_and_the_connection_lives(tmp_path: Path) -> None:
    async with running_agent(tmp_path) as guest:
        sock = await connect(guest.socket_path)
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(sock))
        size = (4 << 20) + 1
        await stream.send_all(struct.pack(">IIBB", size, 1, 1, 0))
        for _ in range(5):
            await stream.send_all(bytes(min(1 << 20, size)))
            size -= 1 << 20
            if size <= 0:
                break
        assert await _status_of_reply(stream) == (1, Code.RESOURCE_EXHAUSTED)
        await stream.send_all(struct.pack(">IIBB", 2, 4, 1, 0) + b"\x0a\x00")
        assert await _status_of_reply(stream) == (4, Code.INVALID_ARGUMENT)
        await stream.send_all(struct.pack(">IIBB", 3, 5, 1, 0) + b"\x0a\x01x")
        assert await _status_of_reply(stream) == (5, Code.UNIMPLEMENTED)
        await stream.aclose()


@pytest.mark.parametrize("cid", ["", ".", "../x", "a/b", "-x", "x" * 129])
async def test_id_that_could_leave_a_directory_is_refused(tmp_path: Path, cid: str) -> None:
    async with running_agent(tmp_path) as guest:
        request = agent_pb2.CreateContainerRequest(
            container_id=cid, OCI=spec(guest.rootfs, ["true"])
        )
        with pytest.raises(AgentStatus) as refused:
            await guest.client.create_container(request)
        assert refused.value.code == Code.INVALID_ARGUMENT


@pytest.mark.parametrize(
    "path", ["/etc/x", f"{SHARED}/../x", f"{SHARED}", f"{SHARED}/a/../../../x", "relative"]
)
async def test_copied_file_can_not_leave_the_shared_tree(tmp_path: Path, path: str) -> None:
    async with running_agent(tmp_path) as guest:
        request = agent_pb2.CopyFileRequest(path=path, file_size=1, file_mode=0o100644, data=b"x")
        with pytest.raises(AgentStatus) as refused:
            await guest.client.copy_file(request)
        assert refused.value.code == Code.INVALID_ARGUMENT


async def test_copied_file_follows_no_link_that_was_planted(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    async with running_agent(tmp_path) as guest:
        link = agent_pb2.CopyFileRequest(
            path=f"{SHARED}/link", file_mode=0o120777, data=os.fsencode(outside)
        )
        await guest.client.copy_file(link)
        through = agent_pb2.CopyFileRequest(
            path=f"{SHARED}/link/file", file_size=1, file_mode=0o100644, dir_mode=0o755, data=b"x"
        )
        with pytest.raises(AgentStatus):
            await guest.client.copy_file(through)
        over = agent_pb2.CopyFileRequest(
            path=f"{SHARED}/link", file_size=1, file_mode=0o100644, data=b"x"
        )
        await guest.client.copy_file(over)
    assert not list(outside.iterdir())


async def test_file_appears_when_its_last_piece_is_there(tmp_path: Path) -> None:
    async with running_agent(tmp_path) as guest:

        async def send(offset: int, data: bytes) -> None:
            await guest.client.copy_file(
                agent_pb2.CopyFileRequest(
                    path=f"{SHARED}/d/f",
                    file_size=6,
                    file_mode=0o100640,
                    dir_mode=0o755,
                    uid=0,
                    gid=0,
                    offset=offset,
                    data=data,
                )
            )

        made = spec(guest.rootfs, ["sh", "-c", "cat /d/f; read x; cat /d/f"])
        await send(0, b"abc")
        source = f"{SHARED}/d"
        made.Mounts.add(destination="/d", type="bind", source=source, options=["rbind", "ro"])
        request = agent_pb2.CreateContainerRequest(container_id="c1", exec_id="c1", OCI=made)
        await guest.client.create_container(request)
        await guest.client.start_container("c1")
        assert b"No such file" in await guest.client.read_stderr("c1", "c1")
        await send(3, b"def")
        await guest.client.write_stdin("c1", "c1", b"go\n")
        assert await guest.output("c1") == b"abcdef"


@pytest.mark.parametrize("target", ["/proc/1", "/proc/sys", "/proc/self/exe"])
async def test_mount_that_hides_proc_is_refused(tmp_path: Path, target: str) -> None:
    async with running_agent(tmp_path) as guest:
        made = spec(guest.rootfs, ["true"])
        made.Mounts.add(destination=target, type="tmpfs", source="tmpfs")
        request = agent_pb2.CreateContainerRequest(container_id="c1", OCI=made)
        with pytest.raises(AgentStatus) as refused:
            await guest.client.create_container(request)
        assert refused.value.code == Code.INVALID_ARGUMENT


async def test_mount_point_that_is_a_link_stays_inside_of_the_root(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    async with running_agent(tmp_path) as guest:
        (guest.rootfs / "data").symlink_to(outside)
        made = spec(guest.rootfs, ["sh", "-c", "touch /data/x && echo made"])
        made.Mounts.add(destination="/data/sub", type="tmpfs", source="tmpfs")
        request = agent_pb2.CreateContainerRequest(container_id="c1", exec_id="c1", OCI=made)
        await guest.client.create_container(request)
        await guest.client.start_container("c1")
        await guest.client.wait_process("c1", "c1")
    assert not list(outside.iterdir())


async def test_device_that_no_rule_allows_can_be_made_but_not_opened(tmp_path: Path) -> None:
    async with running_agent(tmp_path) as guest:
        (guest.rootfs / "bin/mknod").symlink_to("busybox")
        script = "mknod /dev/mem c 1 1 && cat /dev/mem; echo status $?; cat /dev/null && echo null"
        await guest.start("c1", "sh", "-c", script)
        assert await guest.output("c1") == b"status 1\nnull\n"
        assert b"Operation not permitted" in await guest.client.read_stderr("c1", "c1")


async def test_rules_without_their_program_are_unimplemented(tmp_path: Path) -> None:
    async with running_agent(tmp_path) as guest:
        with pytest.raises(AgentStatus, match="iptables-save is not in the guest") as refused:
            await guest.client.get_ip_tables(ipv6=False)
        assert refused.value.code == Code.UNIMPLEMENTED


async def test_policy_is_refused_because_it_would_not_be_enforced(tmp_path: Path) -> None:
    async with running_agent(tmp_path) as guest:
        text = documented("SetPolicy: this agent has no Rego engine, so it can't enforce a policy")
        with pytest.raises(AgentStatus, match=text) as refused:
            await guest.client.set_policy("package agent_policy")
        assert refused.value.code == Code.UNIMPLEMENTED


async def test_growing_a_volume_without_its_program_is_unimplemented(tmp_path: Path) -> None:
    async with running_agent(tmp_path) as guest:
        text = documented("resize2fs is not in the guest image")
        with pytest.raises(AgentStatus, match=text) as refused:
            await guest.client.resize_volume("/run/kata-containers/v", 1 << 30)
        assert refused.value.code == Code.UNIMPLEMENTED


async def test_what_a_container_cannot_have_is_refused_by_name(tmp_path: Path) -> None:
    async with running_agent(tmp_path) as guest:
        raw = agent_pb2.CreateContainerRequest(
            container_id="c1", OCI=spec(guest.rootfs, ["true"]), stdout_port=7
        )
        text = documented("stdio over vsock ports: only RPC streams are served")
        with pytest.raises(AgentStatus, match=text):
            await guest.client.create_container(raw)
        noted = agent_pb2.CreateContainerRequest(
            container_id="c1", OCI=spec(guest.rootfs, ["true"])
        )
        noted.OCI.Linux.Seccomp.DefaultAction = "SCMP_ACT_NOTIFY"
        text = documented('seccomp action "SCMP_ACT_NOTIFY"')
        with pytest.raises(AgentStatus, match=text):
            await guest.client.create_container(noted)
