"""The publisher against a containerd that comes and goes."""

from __future__ import annotations

import socket
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from shimv2 import events
from shimv2.events import EventPublisher
from shimv2.logs import Log, LogSink
from shimv2.pb.containerd_events_pb2 import TaskExit, TaskOOM, TaskStart
from shimv2.pb.containerd_forward_pb2 import ForwardRequest
from ttrpc import Code, Server, StatusError


class Containerd:
    """Takes events on a real socket; may be stopped, made to refuse, or to keep silent."""

    def __init__(self, directory: Path) -> None:
        self.path = str(directory / "c.ttrpc")
        self.topics: list[str] = []
        self.envelopes: list[object] = []
        self.refusals: list[Code] = []
        self.is_silent = False
        self.arrived = trio.Event()

    async def forward(self, _context, payload: bytes) -> bytes:
        if self.is_silent:
            await trio.sleep_forever()
        if self.refusals:
            raise StatusError(self.refusals.pop(0), "no")
        envelope = ForwardRequest.FromString(payload).envelope
        self.topics.append(envelope.topic)
        self.envelopes.append(envelope)
        self.arrived.set()
        self.arrived = trio.Event()
        return b""

    @asynccontextmanager
    async def running(self):
        with socket.socket(socket.AF_UNIX) as listener:
            _bind(listener, self.path)
            listener.listen()
            server = Server({events.SERVICE: {"Forward": self.forward}})
            async with trio.open_nursery() as nursery:
                await nursery.start(server.serve, listener)
                yield
                nursery.cancel_scope.cancel()

    async def has(self, count: int) -> None:
        with trio.fail_after(20):
            while len(self.topics) < count:
                await self.arrived.wait()


def _bind(listener: socket.socket, path: str) -> None:
    Path(path).unlink(missing_ok=True)
    listener.bind(path)


@asynccontextmanager
async def publishing(address: str):
    publisher = EventPublisher(address, "ns", Log(LogSink()))
    async with trio.open_nursery() as nursery:
        await nursery.start(publisher.run)
        yield publisher
        nursery.cancel_scope.cancel()


async def test_events_arrive_in_order_and_complete(tmp_path):
    containerd = Containerd(tmp_path)
    async with containerd.running(), publishing(f"unix://{containerd.path}") as publisher:
        publisher.publish("/tasks/start", TaskStart(container_id="c", pid=7))
        publisher.publish("/tasks/oom", TaskOOM(container_id="c"))
        publisher.publish("/tasks/exit", TaskExit(container_id="c", id="c", exit_status=3))
        assert await publisher.flush(5)
    assert containerd.topics == ["/tasks/start", "/tasks/oom", "/tasks/exit"]
    envelope = containerd.envelopes[2]
    assert envelope.namespace == "ns"
    assert envelope.timestamp.seconds > 0
    assert envelope.event.type_url == "containerd.events.TaskExit"
    assert TaskExit.FromString(envelope.event.value).exit_status == 3


async def test_events_wait_for_a_containerd_that_comes_later(tmp_path):
    containerd = Containerd(tmp_path)
    async with publishing(containerd.path) as publisher:
        for number in range(5):
            publisher.publish(f"/tasks/{number}", TaskOOM())
        assert not await publisher.flush(0.01)
        async with containerd.running():
            await containerd.has(5)
    assert containerd.topics == [f"/tasks/{number}" for number in range(5)]


async def test_order_survives_a_restart_of_containerd(tmp_path):
    containerd = Containerd(tmp_path)
    async with publishing(containerd.path) as publisher:
        async with containerd.running():
            publisher.publish("/tasks/0", TaskOOM())
            await containerd.has(1)
        for number in (1, 2, 3):
            publisher.publish(f"/tasks/{number}", TaskOOM())
        async with containerd.running():
            await containerd.has(4)
    assert containerd.topics == [f"/tasks/{number}" for number in range(4)]


async def test_an_event_that_containerd_will_never_take_holds_nothing_up(tmp_path):
    containerd = Containerd(tmp_path)
    containerd.refusals = [Code.INVALID_ARGUMENT]
    async with containerd.running(), publishing(containerd.path) as publisher:
        publisher.publish("/tasks/bad", TaskOOM())
        publisher.publish("/tasks/good", TaskOOM())
        assert await publisher.flush(5)
    assert containerd.topics == ["/tasks/good"]


async def test_a_passing_refusal_is_tried_again_in_its_place(tmp_path):
    containerd = Containerd(tmp_path)
    containerd.refusals = [Code.UNAVAILABLE, Code.UNKNOWN]
    async with containerd.running(), publishing(containerd.path) as publisher:
        publisher.publish("/tasks/first", TaskOOM())
        publisher.publish("/tasks/second", TaskOOM())
        assert await publisher.flush(10)
    assert containerd.topics == ["/tasks/first", "/tasks/second"]


async def test_a_silent_containerd_is_given_up_after_five_seconds(tmp_path, monkeypatch):
    monkeypatch.setattr(events, "CALL_DEADLINE_S", 0.05)
    containerd = Containerd(tmp_path)
    containerd.is_silent = True
    async with containerd.running(), publishing(containerd.path) as publisher:
        publisher.publish("/tasks/1", TaskOOM())
        assert not await publisher.flush(0.3)
        containerd.is_silent = False
        assert await publisher.flush(10)
    assert containerd.topics == ["/tasks/1"]


async def test_a_full_queue_gives_up_what_is_no_exit():
    publisher = EventPublisher("/nowhere", "ns", Log(LogSink()))
    publisher.publish("/tasks/first", TaskOOM())
    for _ in range(events.MAX_QUEUED):
        publisher.publish("/tasks/exit", TaskExit())
        publisher.publish("/tasks/oom", TaskOOM())
    topics = [queued.topic for queued in publisher._queue]
    assert len(topics) == events.MAX_QUEUED
    assert topics[0] == "/tasks/first"
    assert topics.count("/tasks/exit") >= events.MAX_QUEUED - 2
    assert publisher.dropped == events.MAX_QUEUED + 1
    await trio.lowlevel.checkpoint()


async def test_without_an_address_events_are_only_logged(tmp_path):
    publisher = EventPublisher("", "ns", Log(LogSink()))
    publisher.publish("/tasks/oom", TaskOOM())
    assert await publisher.flush(0)


@pytest.mark.parametrize("count", [0, 1])
async def test_flush_with_nothing_to_send_returns_at_once(tmp_path, count, autojump_clock):
    publisher = EventPublisher("/nowhere", "ns", Log(LogSink()))
    for _ in range(count):
        publisher.publish("/tasks/oom", TaskOOM())
    before = trio.current_time()
    assert await publisher.flush(3) is (count == 0)
    assert trio.current_time() - before == 3 * count
