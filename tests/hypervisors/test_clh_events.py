"""The event monitor of Cloud Hypervisor: splits, limits, garbage; and how a machine ended."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypervisors.child import ChildExit
from hypervisors.clh_events import (
    MAX_EVENT_BYTES,
    EndFacts,
    EventStream,
    MonitorEvent,
    classify,
)
from hypervisors.machine import ExitKind

VECTORS = Path(__file__).parents[1] / "vectors" / "clh"


def event(source="vm", name="booted", properties=None):
    fields = {"timestamp": {"secs": 1, "nanos": 2}, "source": source, "event": name}
    return json.dumps(fields | {"properties": properties}, indent=2).encode() + b"\n\n"


SESSION = (
    event("vmm", "starting")
    + event("virtio-device", "activated", {"id": "d0"})
    + event("vm", "device-removed", {"id": "d0", "bdf": "0000:00:05.0"})
    + event("guest", "panic", {"event": "panic"})
)
EVENTS = [
    MonitorEvent("vmm", "starting", {}),
    MonitorEvent("virtio-device", "activated", {"id": "d0"}),
    MonitorEvent("vm", "device-removed", {"id": "d0", "bdf": "0000:00:05.0"}),
    MonitorEvent("guest", "panic", {"event": "panic"}),
]


@pytest.mark.parametrize("size", [1, 2, 7, 64, 10_000])
def test_events_arrive_at_any_split(size):
    stream = EventStream()
    found = []
    for at in range(0, len(SESSION), size):
        found += stream.feed(SESSION[at : at + size])
    assert found == EVENTS
    assert stream.dropped == 0


def test_event_that_was_cut_costs_itself_and_no_other():
    stream = EventStream()
    cut = event("vm", "paused")[:30] + b"\n\n"
    assert stream.feed(cut + event("vm", "resumed")) == [MonitorEvent("vm", "resumed", {})]
    assert stream.dropped == 1


@pytest.mark.parametrize(
    "piece",
    [
        b"not json",
        b"[]",
        b'"text"',
        b'{"source": "vm"}',
        b'{"source": 3, "event": "x"}',
        b'{"source": "vm", "event": NaN}',
        b"[" * 100_00 + b"]" * 100_00,
        b"\xff\xfe",
    ],
)
def test_what_is_no_event_is_counted_and_passed_over(piece):
    stream = EventStream()
    assert stream.feed(piece + b"\n\n" + event()) == [MonitorEvent("vm", "booted", {})]
    assert stream.dropped == 1


def test_properties_of_another_kind_are_none():
    stream = EventStream()
    (found,) = stream.feed(event(properties={"id": 7, "name": "x"}))
    assert found.properties == {"name": "x"}
    (found,) = stream.feed(event(properties=[1]))
    assert found.properties == {}


def test_endless_event_is_neither_held_nor_taken_for_one():
    stream = EventStream()
    for _ in range(100):
        assert stream.feed(b"x" * MAX_EVENT_BYTES) == []
        assert len(stream._buffer) <= MAX_EVENT_BYTES
    assert stream.feed(b"\n") == []
    assert stream.feed(b"\n" + event()) == [MonitorEvent("vm", "booted", {})]
    assert stream.dropped == 1


@given(st.lists(st.binary(max_size=200), max_size=20))
def test_no_bytes_make_it_fail(pieces):
    stream = EventStream()
    for piece in pieces:
        stream.feed(piece)
    stream.feed(b"\n\n")
    assert stream.feed(event()) == [MonitorEvent("vm", "booted", {})]


@pytest.mark.parametrize(
    ("ending", "facts", "kind", "reason"),
    [
        ((0, None), {}, ExitKind.CLEAN, "the guest powered off"),
        ((0, None), {"told_to_quit": True}, ExitKind.KILLED, "the VMM was told to quit"),
        ((None, 9), {"rebooted": True}, ExitKind.REBOOT, "the guest rebooted"),
        ((None, 9), {"panicked": True, "rebooted": True}, ExitKind.PANIC, "panicked"),
        ((0, None), {"panicked": True}, ExitKind.PANIC, "panicked"),
        ((None, 9), {}, ExitKind.KILLED, "SIGKILL"),
        ((None, 9), {"told_to_quit": True}, ExitKind.KILLED, "SIGKILL"),
        ((None, int(signal.SIGSYS)), {}, ExitKind.CRASH, "its sandbox forbids): last words"),
        ((1, None), {}, ExitKind.CRASH, "exited with 1: last words"),
    ],
)
def test_end_is_told_from_events_first_and_then_from_the_process(ending, facts, kind, reason):
    code, number = ending
    found = classify(ChildExit(code=code, signal=number), EndFacts(**facts), ["last words"])
    assert found.kind is kind
    assert reason in found.reason
    assert (found.code, found.signal) == ending
