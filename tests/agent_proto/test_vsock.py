"""Dialling: a hybrid vsock device that behaves, many that don't, and what AF_VSOCK allows."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import trio

from agent_proto.errors import AgentUnreachable, HandshakeRefused
from agent_proto.vsock import (
    LONGEST_ATTEMPT_S,
    HybridVsock,
    KernelVsock,
    dial,
    dial_until,
)
from tests.fakes.fake_wire import bound
from tests.harness.own_process import open_descriptors


def unusable_vsock() -> str:
    try:
        socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM).close()
    except OSError as error:
        return f"no AF_VSOCK here: {error}"
    return ""


class Device:
    """A vsock device that answers a CONNECT with given bytes and then keeps or ends the stream."""

    def __init__(self, path: Path, answers: list[bytes], *, hangs_up: bool = False) -> None:
        self.endpoint = HybridVsock(path, 1024)
        self.requests: list[bytes] = []
        self._answers = answers
        self._hangs_up = hangs_up

    async def serve(self, *, task_status: trio.TaskStatus[None]) -> None:
        listener = bound(self.endpoint.uds_path)
        with listener:
            async with trio.open_nursery() as nursery:
                task_status.started()
                while True:
                    sock, _ = await listener.accept()
                    nursery.start_soon(self._answer, trio.SocketStream(sock))

    async def _answer(self, stream: trio.SocketStream) -> None:
        async with stream:
            self.requests.append(await stream.receive_some(64))
            for piece in self._answers:
                await stream.send_all(piece)
                await trio.sleep(0.01)
            if not self._hangs_up:
                async for data in stream:
                    await stream.send_all(data)


async def test_stream_is_handed_over_at_its_first_byte(tmp_path, autojump_clock):
    device = Device(tmp_path / "v", [b"OK 5\nfirst", b" second"])
    async with trio.open_nursery() as nursery:
        await nursery.start(device.serve)
        sock = await dial(device.endpoint, timeout_s=5)
        assert not sock.getblocking()
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(sock))
        async with stream:
            assert await stream.receive_some() == b"first"
            assert await stream.receive_some() == b" second"
            await stream.send_all(b"echo")
            assert await stream.receive_some() == b"echo"
        assert device.requests == [b"CONNECT 1024\n"]
        nursery.cancel_scope.cancel()


async def test_answer_in_single_bytes_is_understood(tmp_path, autojump_clock):
    device = Device(tmp_path / "v", [bytes([byte]) for byte in b"OK 1073741824\n"])
    async with trio.open_nursery() as nursery:
        await nursery.start(device.serve)
        (await dial(device.endpoint, timeout_s=5)).close()
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    "answers", [[], [b"OK"], [b"OK 5"], [b"NO\n"], [b"\xff" * 1000], [b"OK " + b"1" * 100]]
)
async def test_wrong_answer_is_refused_and_nothing_stays_open(tmp_path, answers, autojump_clock):
    device = Device(tmp_path / "v", answers, hangs_up=True)
    async with trio.open_nursery() as nursery:
        await nursery.start(device.serve)
        before = open_descriptors()
        with pytest.raises(HandshakeRefused):
            await dial(device.endpoint, timeout_s=5)
        await trio.sleep(1)
        assert open_descriptors() <= before
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("answers", [[], [b"OK 5"]])
async def test_silent_device_is_given_up_at_the_deadline(tmp_path, answers, autojump_clock):
    device = Device(tmp_path / "v", answers)
    async with trio.open_nursery() as nursery:
        await nursery.start(device.serve)
        started = trio.current_time()
        with pytest.raises(AgentUnreachable, match="within 3 s"):
            await dial(device.endpoint, timeout_s=3)
        assert trio.current_time() - started == pytest.approx(3)
        nursery.cancel_scope.cancel()


async def test_missing_socket_is_named(tmp_path):
    with pytest.raises(AgentUnreachable, match=r"absent.*No such file"):
        await dial(HybridVsock(tmp_path / "absent"), timeout_s=30)


async def test_path_longer_than_a_socket_address_is_named(tmp_path):
    with pytest.raises(AgentUnreachable, match="too long"):
        await dial(HybridVsock(tmp_path / ("x" * 110)), timeout_s=30)


async def test_device_that_stopped_listening_is_unreachable(tmp_path):
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(os.fspath(tmp_path / "v"))
    with pytest.raises(AgentUnreachable, match="refused"):
        await dial(HybridVsock(tmp_path / "v"), timeout_s=30)


async def test_full_accept_queue_is_a_failed_attempt_not_a_hang(tmp_path):
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as waiting:
        listener.bind(os.fspath(tmp_path / "v"))
        listener.listen(0)
        waiting.connect(os.fspath(tmp_path / "v"))
        with pytest.raises(AgentUnreachable, match="temporarily"):
            await dial(HybridVsock(tmp_path / "v"), timeout_s=30)


async def test_cancelled_dial_leaves_nothing_open(tmp_path, autojump_clock):
    device = Device(tmp_path / "v", [])
    async with trio.open_nursery() as nursery:
        await nursery.start(device.serve)
        before = open_descriptors()
        with trio.move_on_after(1) as scope:
            await dial(device.endpoint, timeout_s=100)
        assert scope.cancelled_caught
        await trio.sleep(1)
        assert open_descriptors() <= before
        nursery.cancel_scope.cancel()


async def test_dial_until_waits_for_the_socket_to_appear(tmp_path, autojump_clock):
    device = Device(tmp_path / "v", [b"OK 5\n"])
    started = trio.current_time()
    async with trio.open_nursery() as nursery:

        async def boot() -> None:
            await trio.sleep(5)
            await nursery.start(device.serve)

        nursery.start_soon(boot)
        (await dial_until(device.endpoint, deadline_s=30)).close()
        assert 5 <= trio.current_time() - started <= 6
        assert len(device.requests) == 1
        nursery.cancel_scope.cancel()


async def test_dial_until_backs_off_and_names_its_last_failure(tmp_path, autojump_clock):
    started = trio.current_time()
    with pytest.raises(AgentUnreachable, match=r"gave up after 2[0-9] attempts") as caught:
        await dial_until(HybridVsock(tmp_path / "absent"), deadline_s=10)
    assert trio.current_time() - started <= 10
    assert isinstance(caught.value.__cause__, AgentUnreachable)


async def test_dial_until_leaves_a_wedged_device_for_another_attempt(tmp_path, autojump_clock):
    device = Device(tmp_path / "v", [])
    async with trio.open_nursery() as nursery:
        await nursery.start(device.serve)
        started = trio.current_time()
        with pytest.raises(AgentUnreachable):
            await dial_until(device.endpoint, deadline_s=10)
        assert trio.current_time() - started <= 10
        assert 4 <= len(device.requests) <= 10 / LONGEST_ATTEMPT_S
        nursery.cancel_scope.cancel()


@pytest.mark.skipif(bool(unusable_vsock()), reason=unusable_vsock() or "usable")
async def test_kernel_vsock_without_such_a_guest_is_unreachable():
    # Context id 3 is a guest's; without one the kernel refuses at once or never answers.
    with pytest.raises(AgentUnreachable, match=r"vsock://3:1024"):
        await dial(KernelVsock(3), timeout_s=0.2)
