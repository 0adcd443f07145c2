"""The command monitor of acrn-dm: what comes back at any split, and whose answer it is."""

from __future__ import annotations

import json
import socket
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from hypervisors.acrn_exit import EndFacts, classify
from hypervisors.acrn_messages import MAX_MESSAGE_BYTES, MessageStream
from hypervisors.acrn_monitor import CommandMonitor
from hypervisors.child import ChildExit
from hypervisors.errors import CommandRejected, CommandTimeout, ControlLost
from hypervisors.machine import ExitKind

# As cJSON prints them, one behind the other.
SENT = b'{\n\t"ack":\t0\n}{\n\t"vm_event":\t0,\n\t"delta_time":\t3\n}\n{\n\t"vm_event":\t1\n}'
MEANT = [{"ack": 0}, {"vm_event": 0, "delta_time": 3}, {"vm_event": 1}]


@pytest.mark.parametrize("size", [1, 2, 3, 7, len(SENT)])
def test_messages_are_found_at_any_split(size):
    stream = MessageStream()
    pieces = [SENT[at : at + size] for at in range(0, len(SENT), size)]
    assert [message for piece in pieces for message in stream.feed(piece)] == MEANT


@pytest.mark.parametrize(
    "data",
    [b"hello", b"[1]", b"3", b'"text"', b"{" * (MAX_MESSAGE_BYTES + 1), b'{"a": ' + b"[" * 5000],
)
def test_what_can_become_no_message_is_an_error(data):
    with pytest.raises(ValueError, match="no JSON object"):
        MessageStream().feed(data)


class Peer:
    """The other end of a monitor's connection."""

    def __init__(self):
        ours, self.sock = socket.socketpair()
        ours.setblocking(False)
        self.events = []
        self.monitor = CommandMonitor(ours)
        self.monitor.on_event = self.events.append

    def close(self):
        self.sock.close()
        self.monitor.close()


@asynccontextmanager
async def connected():
    made = Peer()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(made.monitor.run)
        yield made
        nursery.cancel_scope.cancel()
    made.close()


async def said(peer):
    await trio.testing.wait_all_tasks_blocked()
    return json.loads(peer.sock.recv(4096))


async def test_command_returns_when_it_is_acknowledged():
    async with connected() as peer:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(peer.monitor.command, "blkrescan", "5,/images/a")
            assert await said(peer) == {"command": "blkrescan", "arguments": "5,/images/a"}
            peer.sock.sendall(b'{"vm_event":\t2}{"ack":\t0}')
        assert peer.events == [2]


async def test_refusal_and_strange_acknowledgements_are_errors():
    async with connected() as peer:

        async def refused():
            with pytest.raises(CommandRejected, match="blkrescan: ack -1"):
                await peer.monitor.command("blkrescan", "5,x")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(refused)
            await said(peer)
            peer.sock.sendall(b'{"ack":\t"no number"}{"ack":\t-1}')


async def test_late_answer_is_not_the_next_commands():
    async with connected() as peer:
        with pytest.raises(CommandTimeout, match="no answer within"):
            await peer.monitor.command("blkrescan", "5,x", timeout_s=0.01)
        await said(peer)
        peer.sock.sendall(b'{"ack":\t0}')

        async def refused():
            with pytest.raises(CommandRejected):
                await peer.monitor.command("destroy")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(refused)
            assert await said(peer) == {"command": "destroy"}
            peer.sock.sendall(b'{"ack":\t-1}')


@pytest.mark.parametrize("last", [b"", b"garbage"])
async def test_end_of_the_connection_ends_who_waits_and_who_comes(last):
    async with connected() as peer:

        async def lost():
            with pytest.raises(ControlLost):
                await peer.monitor.command("destroy")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(lost)
            await said(peer)
            peer.sock.sendall(last)
            peer.sock.close()
        await lost()


ZERO = ChildExit(code=0, signal=None)


@pytest.mark.parametrize(
    ("ending", "facts", "kind", "reason"),
    [
        (ZERO, {"powered_off": True}, ExitKind.CLEAN, "the guest powered off"),
        (
            ZERO,
            {"powered_off": True, "triple_fault": True},
            ExitKind.REBOOT,
            "the guest rebooted, or its kernel panicked",
        ),
        (ChildExit(code=None, signal=9), {"was_reset": True}, ExitKind.REBOOT, "rebooted"),
        (ZERO, {"told_to_quit": True}, ExitKind.KILLED, "the VMM was told to quit"),
        (ChildExit(code=None, signal=9), {"told_to_quit": True}, ExitKind.KILLED, "SIGKILL"),
        (ChildExit(code=None, signal=11), {}, ExitKind.CRASH, "SIGSEGV: last words"),
        (ChildExit(code=1, signal=None), {}, ExitKind.CRASH, "exited with 1: last words"),
        (ZERO, {}, ExitKind.UNKNOWN, "no reason given"),
    ],
)
def test_end_is_judged_by_all_that_was_seen(ending, facts, kind, reason):
    found = classify(ending, EndFacts(**facts), ["last words"])
    assert found.kind is kind
    assert reason in found.reason
    assert (found.code, found.signal) == (ending.code, ending.signal)
