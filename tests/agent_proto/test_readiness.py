"""The guest's report that it serves: heard, or found out to be none."""

from __future__ import annotations

import json
import os
import socket
import stat
from pathlib import Path

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from agent_proto.errors import AgentMisbehaved, AgentTimeout, AgentUnreachable
from agent_proto.readiness import (
    ANY_PORT,
    MAX_REPORT_BYTES,
    READY_PORT,
    BootReport,
    ReadinessListener,
    parse_report,
    readiness_path,
)
from agent_proto.vsock import HybridVsock, KernelVsock
from tests.agent_proto.test_vsock import unusable_vsock

REPORT = b'{"agent": "ours", "version": "1.2", "boot_ms": {"kernel": 310, "agent": 4.5}}\n'
HEARD = BootReport("ours", "1.2", {"kernel": 310.0, "agent": 4.5})


@pytest.fixture
def endpoint(tmp_path: Path) -> HybridVsock:
    return HybridVsock(tmp_path / "vsock.sock", READY_PORT)


async def call(endpoint: HybridVsock, *pieces: bytes, hang_up: bool = True) -> None:
    """Do what the guest does: connect, say something, hang up or not."""
    stream = await trio.open_unix_socket(readiness_path(endpoint))
    async with stream:
        for piece in pieces:
            await stream.send_all(piece)
            await trio.sleep(0.01)
        if not hang_up:
            await trio.sleep_forever()


async def test_report_is_heard_even_if_it_comes_before_the_wait(endpoint, autojump_clock):
    async with ReadinessListener.listen(endpoint) as listener:
        assert listener.port == READY_PORT
        await call(endpoint, REPORT)
        assert await listener.wait(timeout_s=5) == HEARD


@pytest.mark.parametrize("cut", range(1, len(REPORT), 7))
async def test_report_is_heard_in_pieces(endpoint, cut, autojump_clock):
    async with ReadinessListener.listen(endpoint) as listener, trio.open_nursery() as nursery:
        nursery.start_soon(call, endpoint, REPORT[:cut], REPORT[cut:])
        assert await listener.wait(timeout_s=5) == HEARD


async def test_caller_need_not_hang_up_nor_send_only_one_line(endpoint, autojump_clock):
    async with ReadinessListener.listen(endpoint) as listener, trio.open_nursery() as nursery:

        async def talkative() -> None:
            await call(endpoint, REPORT + b"and more\n", hang_up=False)

        nursery.start_soon(talkative)
        assert await listener.wait(timeout_s=5) == HEARD
        nursery.cancel_scope.cancel()


async def test_caller_without_a_word_is_passed_over(endpoint, autojump_clock):
    async with ReadinessListener.listen(endpoint) as listener, trio.open_nursery() as nursery:

        async def silent() -> None:
            await call(endpoint, hang_up=False)

        await call(endpoint)
        nursery.start_soon(silent)
        await trio.testing.wait_all_tasks_blocked()
        await call(endpoint, REPORT)
        assert await listener.wait(timeout_s=60) == HEARD
        nursery.cancel_scope.cancel()


async def test_no_report_is_a_timeout(endpoint, autojump_clock):
    async with ReadinessListener.listen(endpoint) as listener:
        with pytest.raises(AgentTimeout, match="readiness report within 5 s"):
            await listener.wait(timeout_s=5)


async def test_unfinished_line_is_misbehaviour(endpoint, autojump_clock):
    async with ReadinessListener.listen(endpoint) as listener, trio.open_nursery() as nursery:

        async def stuck() -> None:
            await call(endpoint, REPORT[:-1], hang_up=False)

        nursery.start_soon(stuck)
        with pytest.raises(AgentMisbehaved, match="within 10 s"):
            await listener.wait(timeout_s=60)
        nursery.cancel_scope.cancel()


async def test_endless_line_is_misbehaviour(endpoint, autojump_clock):
    async with ReadinessListener.listen(endpoint) as listener, trio.open_nursery() as nursery:
        nursery.start_soon(call, endpoint, b"x" * (MAX_REPORT_BYTES + 1))
        with pytest.raises(AgentMisbehaved, match="4096 bytes"):
            await listener.wait(timeout_s=60)
        nursery.cancel_scope.cancel()


async def test_cancelled_wait_can_be_repeated(endpoint, autojump_clock):
    async with ReadinessListener.listen(endpoint) as listener:
        with trio.move_on_after(1):
            await listener.wait()
        await call(endpoint, REPORT)
        assert await listener.wait(timeout_s=5) == HEARD


async def test_socket_is_private_and_goes_with_the_listener(endpoint):
    path = readiness_path(endpoint)
    assert path.name == "vsock.sock_1030"
    async with ReadinessListener.listen(endpoint) as listener:
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
        with pytest.raises(AgentUnreachable, match="in use"):
            ReadinessListener.listen(endpoint)
        assert path.exists()
        listener.close()
        assert not path.exists()


async def test_path_too_long_is_named(tmp_path):
    with pytest.raises(AgentUnreachable, match="too long"):
        ReadinessListener.listen(HybridVsock(tmp_path / ("x" * 110), READY_PORT))


@pytest.mark.skipif(bool(unusable_vsock()), reason=unusable_vsock() or "usable")
async def test_kernel_vsock_listeners_get_ports_of_their_own_and_name_them(autojump_clock):
    async with ReadinessListener.listen(KernelVsock(3, ANY_PORT)) as listener:
        assert 0 < listener.port < ANY_PORT
        with pytest.raises(AgentTimeout):
            await listener.wait(timeout_s=1)
        async with ReadinessListener.listen(KernelVsock(4, listener.port)) as second:
            assert second.port not in (listener.port, ANY_PORT)


async def test_callers_that_are_other_guests_are_passed_over(endpoint, autojump_clock):
    # No two guests here: a unix socket whose callers have addresses stands for AF_VSOCK's.
    path = os.fspath(readiness_path(endpoint))
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    sock.bind(path)
    sock.listen(4)
    async with ReadinessListener(sock, KernelVsock(3, READY_PORT)) as listener:
        with socket.socket(socket.AF_UNIX) as caller:
            caller.bind(path + "-stranger")
            caller.connect(path)
            caller.send(REPORT)
        with pytest.raises(AgentTimeout):
            await listener.wait(timeout_s=5)


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"ready",
        b"[]",
        b"null",
        b"{}",
        b'{"agent": "a"}',
        b'{"agent": "", "version": "1"}',
        b'{"agent": 1, "version": "1"}',
        b'{"agent": "a", "version": "1", "boot_ms": []}',
        b'{"agent": "a", "version": "1", "boot_ms": {"k": "1"}}',
        b'{"agent": "a", "version": "1", "boot_ms": {"k": true}}',
        b'{"agent": "a", "version": "1", "boot_ms": {"k": -1}}',
        b'{"agent": "a", "version": "1", "boot_ms": {"k": NaN}}',
        b'{"agent": "a", "version": "1", "boot_ms": {"k": Infinity}}',
        b'{"agent": "a", "version": "1", "boot_ms": {"k": 1e999}}',
        b'{"agent": "a", "version": "1", "boot_ms": {"k": 1' + b"0" * 400 + b"}}",
        b'{"agent": "a", "version": "1", "boot_ms": {"k": 1' + b"0" * 4000 + b"}}",
        b'{"agent": "a", "version": "1", "boot_ms": '
        + json.dumps({str(n): 1 for n in range(33)}).encode()
        + b"}",
        b"[" * MAX_REPORT_BYTES,
        b'{"a":' * (MAX_REPORT_BYTES // 5),
        b'"\xff\xfe"',
        b"\x00" * 10,
    ],
)
def test_line_that_is_no_report_is_misbehaviour(line):
    with pytest.raises(AgentMisbehaved):
        parse_report(line)


def test_names_are_escaped_and_cut():
    line = json.dumps({"agent": "a\x1b[2J\n", "version": "v" * 100}).encode()
    report = parse_report(line)
    assert report.agent == r"a\x1b[2J\n"
    assert len(report.version) == 64


def test_unknown_members_are_passed_over():
    assert parse_report(b'{"agent": "a", "version": "1", "x": [1]}') == BootReport("a", "1", {})


@given(st.binary(max_size=200))
def test_no_line_does_anything_but_parse_or_misbehave(line):
    with pytest.raises(AgentMisbehaved):
        parse_report(line)
