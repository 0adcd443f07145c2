"""Tells how a QEMU ended from everything it left: its status and its last events. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from .machine import ExitKind, VmExit
from .process_end import judge_process

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .child import ChildExit

# What the guest or the host asked QEMU to do. Source: QEMU qapi/run-state.json ShutdownCause.
REASONS: Final = {
    "guest-shutdown": (ExitKind.CLEAN, "the guest powered off"),
    "guest-reset": (ExitKind.REBOOT, "the guest rebooted"),
    "guest-panic": (ExitKind.PANIC, "the guest kernel panicked"),
    "host-qmp-system-reset": (ExitKind.REBOOT, "the machine was reset from the host"),
    "host-qmp-quit": (ExitKind.KILLED, "the VMM was told to quit"),
    "host-signal": (ExitKind.KILLED, "the VMM was ended by a signal"),
    "host-ui": (ExitKind.KILLED, "the VMM was closed from the host"),
    "host-error": (ExitKind.CRASH, "the VMM ended by an error of its own"),
}


@dataclass(slots=True)
class EndFacts:
    """What the events said before the connection ended."""

    shutdown_reason: str | None = None
    panicked: bool = False
    protocol_failure: str | None = None


def classify(ending: ChildExit, facts: EndFacts, stderr_tail: Sequence[str]) -> VmExit:
    """Join the process's end and the events into the one exit.

    The exit code alone says nothing: power-off, reboot and panic all end with 0.
    Source: measured on QEMU 7.2, tests/hypervisors/test_qemu_exit.py.
    """
    kind, reason = _judge(ending, facts)
    if kind in (ExitKind.CRASH, ExitKind.UNKNOWN) and stderr_tail:
        reason = f"{reason}: {' | '.join(stderr_tail[-3:])}"
    return VmExit(kind=kind, code=ending.code, signal=ending.signal, reason=reason)


def _judge(ending: ChildExit, facts: EndFacts) -> tuple[ExitKind, str]:
    if facts.panicked:
        return REASONS["guest-panic"]
    if facts.shutdown_reason in REASONS:
        return REASONS[facts.shutdown_reason]
    if facts.protocol_failure is not None:
        # We kill a VMM whose control connection is useless; the cause is what matters.
        return ExitKind.CRASH, f"the VMM broke its control protocol: {facts.protocol_failure}"
    if (found := judge_process(ending)) is not None:
        return found
    why = facts.shutdown_reason or "no reason given"
    return ExitKind.UNKNOWN, f"the VMM exited with 0 ({why})"
