"""The QMP client against a scripted peer on the other end of a socket pair."""

from __future__ import annotations

import json
import os
import socket
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from hypervisors.errors import CommandRejected, CommandTimeout, ControlLost, DetachRefused
from hypervisors.qemu_removal import Removals
from hypervisors.qmp_client import QmpClient, socket_pair

GREETING = {"QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 0}}, "capabilities": []}}


class Peer:
    """The server's side: reads commands, writes what the test says."""

    def __init__(self, sock):
        self.socket = trio.socket.from_stdlib_socket(sock)
        self.fds = []
        self._buffer = b""

    async def command(self):
        while b"\n" not in self._buffer:
            data, ancillary, _, _ = await self.socket.recvmsg(65536, socket.CMSG_SPACE(64))
            assert data
            for _, _, fds in ancillary:
                self.fds += [
                    int.from_bytes(fds[i : i + 4], "little") for i in range(0, len(fds), 4)
                ]
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return json.loads(line)

    async def say(self, message):
        await self.socket.send(json.dumps(message).encode() + b"\r\n")

    async def answer(self, value):
        command = await self.command()
        await self.say({"return": value, "id": command["id"]})
        return command


@asynccontextmanager
async def connected(on_notification=lambda _: None):
    ours, theirs = socket_pair()
    theirs.setblocking(False)
    peer = Peer(theirs)
    client = QmpClient(ours, on_notification)
    with peer.socket:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(peer.say, GREETING)
            nursery.start_soon(peer.answer, {})
            await client.negotiate()
        async with trio.open_nursery() as nursery:
            await nursery.start(client.run)
            try:
                yield client, peer
            finally:
                client.close()


async def test_answers_reach_their_callers_in_any_order():
    async with connected() as (client, peer):
        results = {}

        async def ask(name):
            results[name] = await client.execute(name)

        async with trio.open_nursery() as nursery:
            for name in ("query-a", "query-b"):
                nursery.start_soon(ask, name)
            commands = [await peer.command(), await peer.command()]
            for command in reversed(commands):
                await peer.say({"return": command["execute"], "id": command["id"]})
    assert results == {"query-a": "query-a", "query-b": "query-b"}


async def test_refused_command_raises_its_class_and_text():
    async with connected() as (client, peer), trio.open_nursery() as nursery:

        async def ask():
            with pytest.raises(CommandRejected, match="device_del: DeviceNotFound: gone") as caught:
                await client.execute("device_del", {"id": "x"})
            assert caught.value.error_class == "DeviceNotFound"

        nursery.start_soon(ask)
        command = await peer.command()
        assert command["arguments"] == {"id": "x"}
        error = {"class": "DeviceNotFound", "desc": "gone"}
        await peer.say({"id": command["id"], "error": error})


async def test_mute_server_costs_the_deadline_and_its_late_answer_is_dropped(autojump_clock):
    async with connected() as (client, peer):
        with pytest.raises(CommandTimeout, match="no answer within 5 s"):
            await client.execute("stop")
        late = await peer.command()
        async with trio.open_nursery() as nursery:

            async def ask():
                assert await client.execute("cont") == "right"

            nursery.start_soon(ask)
            command = await peer.command()
            await peer.say({"return": "wrong", "id": late["id"]})
            await peer.say({"return": "right", "id": command["id"]})


@pytest.mark.parametrize("ending", ["eof", "garbage"])
async def test_every_pending_call_gets_the_end_of_the_connection(ending):
    async with connected() as (client, peer):
        async with trio.open_nursery() as nursery:

            async def ask():
                with pytest.raises(ControlLost):
                    await client.execute("stop")

            for _ in range(3):
                nursery.start_soon(ask)
            for _ in range(3):
                await peer.command()
            if ending == "garbage":
                await peer.socket.send(b"garbage\n")
            else:
                peer.socket.shutdown(socket.SHUT_RDWR)
        with pytest.raises(ControlLost):
            await client.execute("stop")
    assert client.failure == ("line that is not JSON" if ending == "garbage" else None)


async def test_server_that_ends_before_its_greeting_is_an_error_at_once():
    ours, theirs = socket_pair()
    theirs.close()
    with pytest.raises(ControlLost), trio.fail_after(30):
        await QmpClient(ours, lambda _: None).negotiate()
    ours.close()


async def test_notifications_during_negotiation_are_not_lost():
    seen = []
    ours, theirs = socket_pair()
    theirs.setblocking(False)
    peer = Peer(theirs)
    client = QmpClient(ours, lambda notification: seen.append(notification.name))
    await peer.say(GREETING)
    await peer.say({"event": "EARLY", "data": {}})
    async with trio.open_nursery() as nursery:
        nursery.start_soon(peer.answer, {})
        await client.negotiate()
    peer.socket.close()
    await client.run()
    assert seen == ["EARLY"]


async def test_descriptors_travel_with_their_command():
    read_end, write_end = os.pipe()
    async with connected() as (client, peer), trio.open_nursery() as nursery:

        async def ask():
            await client.execute("getfd", {"fdname": "x"}, fds=[write_end])

        nursery.start_soon(ask)
        await peer.answer({})
        (received,) = peer.fds
    os.close(write_end)
    os.write(received, b"!")
    assert os.read(read_end, 1) == b"!"
    os.close(received)
    os.close(read_end)


@asynccontextmanager
async def removals():
    """`Removals` over a live client; yields (removals, peer)."""
    made: list[Removals] = []
    async with connected(lambda notification: made[0].on_notification(notification)) as pair:
        client, peer = pair
        made.append(Removals(client))
        yield made[0], peer


def deleted(**data):
    return {"event": "DEVICE_DELETED", "data": data}


async def remove_and(script, deadline_s=1000.0):
    async with removals() as (removal, peer), trio.open_nursery() as nursery:
        nursery.start_soon(script, removal, peer)
        await removal.remove("disk", deadline_s)


async def test_removal_waits_for_the_event_with_the_devices_own_id():
    order = []

    async def script(removal, peer):
        await peer.answer({})
        await peer.say(deleted(path="/machine/peripheral/disk/virtio-backend"))
        await peer.say(deleted(device="other", path="/machine/peripheral/other"))
        await trio.testing.wait_all_tasks_blocked(0.05)
        order.append("others")
        await peer.say(deleted(device="disk", path="/machine/peripheral/disk"))

    await remove_and(script)
    assert order == ["others"]


@pytest.mark.parametrize(
    "refusal",
    [
        {"event": "DEVICE_UNPLUG_GUEST_ERROR", "data": {"device": "disk", "path": "/x"}},
        {"event": "MEM_UNPLUG_ERROR", "data": {"device": "disk", "msg": "busy"}},
        {
            "event": "ACPI_DEVICE_OST",
            "data": {
                "info": {
                    "device": "disk",
                    "source": 3,
                    "status": 130,
                    "slot": "0",
                    "slot-type": "D",
                }
            },
        },
    ],
)
async def test_refusal_by_the_guest_is_reported_at_once(refusal):
    async def script(removal, peer):
        await peer.answer({})
        await peer.say(refusal)

    with pytest.raises(ExceptionGroup) as caught, trio.fail_after(30):
        await remove_and(script)
    assert caught.group_contains(DetachRefused)


async def test_removal_that_succeeds_after_its_deadline_is_remembered():
    async with removals() as (removal, peer):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(peer.answer, {})
            with pytest.raises(DetachRefused, match="no answer within"):
                await removal.remove("disk", 0.05)
        await peer.say(deleted(device="disk", path="/machine/peripheral/disk"))
        await trio.testing.wait_all_tasks_blocked(0.05)
        await removal.remove("disk")


async def test_machine_that_ends_during_a_removal_ends_the_wait():
    async def script(removal, peer):
        await peer.answer({})
        removal.on_end()

    with pytest.raises(ExceptionGroup) as caught, trio.fail_after(30):
        await remove_and(script)
    assert caught.group_contains(ControlLost)
