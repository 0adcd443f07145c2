"""What Cloud Hypervisor's event monitor says, and how the machine ended. Pure.

The monitor writes one JSON object after the other, each followed by an empty line. It writes
without waiting, so an event that does not fit into the socket is cut or lost, and the next one
begins behind an empty line as ever. A compromised VMM is the guest: size and nesting are bounded.
Source: Cloud Hypervisor v53, event_monitor/src/lib.rs; conversations in tests/vectors/clh.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from .bounded_json import parse_json
from .machine import ExitKind, VmExit
from .process_end import judge_process

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from .child import ChildExit

# The longest we know of, a removed device's, has 200 bytes.
MAX_EVENT_BYTES: Final = 16384
_SEPARATOR: Final = b"\n\n"


@dataclass(frozen=True, slots=True)
class MonitorEvent:
    """`source` is "vmm", "vm", "guest", "virtio-device"; `properties` are texts by name."""

    source: str
    name: str
    properties: Mapping[str, str]


class EventStream:
    """Takes the monitor's bytes at any split and returns the events they complete."""

    def __init__(self) -> None:
        self.dropped = 0
        self._buffer = bytearray()
        self._is_skipping = False

    def feed(self, data: bytes) -> list[MonitorEvent]:
        """Events that cannot be read are counted and passed over, never raised."""
        self._buffer += data
        *pieces, rest = self._buffer.split(_SEPARATOR)
        events: list[MonitorEvent] = []
        for piece in pieces:
            if self._is_skipping:
                self._is_skipping = False
                continue
            event = _parse(bytes(piece))
            if event is None:
                self.dropped += 1
            else:
                events.append(event)
        if len(rest) > MAX_EVENT_BYTES:
            self.dropped += not self._is_skipping
            self._is_skipping = True
            # The last byte may be the first half of the separator.
            rest = rest[-1:]
        self._buffer = rest
        return events


def _parse(piece: bytes) -> MonitorEvent | None:
    if len(piece) > MAX_EVENT_BYTES:
        return None
    try:
        value = parse_json(piece)
    except ValueError:
        return None
    match value:
        case {"source": str(source), "event": str(name), **others}:
            return MonitorEvent(source, name, _texts(others.get("properties")))
    return None


def _texts(properties: object) -> dict[str, str]:
    if not isinstance(properties, dict):
        return {}
    return {name: text for name, text in properties.items() if isinstance(text, str)}


@dataclass(slots=True)
class EndFacts:
    """What was seen before the process ended."""

    panicked: bool = False
    rebooted: bool = False
    told_to_quit: bool = False


def classify(ending: ChildExit, facts: EndFacts, stderr_tail: Sequence[str]) -> VmExit:
    """Join the process's end and the events into the one exit.

    A power-off ends with 0, and so does a SIGTERM of somebody else's, which cannot be told apart.
    After a panic or a reboot it is we who kill the VMM, which would boot the machine again.
    """
    kind, reason = _judge(ending, facts)
    if kind is ExitKind.CRASH and stderr_tail:
        reason = f"{reason}: {' | '.join(stderr_tail[-3:])}"
    return VmExit(kind=kind, code=ending.code, signal=ending.signal, reason=reason)


def _judge(ending: ChildExit, facts: EndFacts) -> tuple[ExitKind, str]:
    if facts.panicked:
        return ExitKind.PANIC, "the guest kernel panicked"
    if facts.rebooted:
        return ExitKind.REBOOT, "the guest rebooted"
    if (found := judge_process(ending)) is not None:
        return found
    if facts.told_to_quit:
        return ExitKind.KILLED, "the VMM was told to quit"
    return ExitKind.CLEAN, "the guest powered off"
