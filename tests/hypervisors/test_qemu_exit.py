"""Every way a QEMU can end, and what we call it.

The rows with events were measured on QEMU 7.2.22; the code is 0 in all of them.
"""

from __future__ import annotations

import signal

import pytest

from hypervisors.child import ChildExit
from hypervisors.machine import ExitKind
from hypervisors.qemu_exit import EndFacts, classify

ZERO = ChildExit(code=0, signal=None)
ONE = ChildExit(code=1, signal=None)


def by(number):
    return ChildExit(code=None, signal=number)


@pytest.mark.parametrize(
    ("ending", "facts", "kind", "words"),
    [
        (ZERO, EndFacts(shutdown_reason="guest-shutdown"), ExitKind.CLEAN, "powered off"),
        (ZERO, EndFacts(shutdown_reason="guest-reset"), ExitKind.REBOOT, "rebooted"),
        (ZERO, EndFacts(shutdown_reason="guest-panic", panicked=True), ExitKind.PANIC, "panicked"),
        (ZERO, EndFacts(shutdown_reason="guest-panic"), ExitKind.PANIC, "panicked"),
        (by(9), EndFacts(panicked=True), ExitKind.PANIC, "panicked"),
        (ZERO, EndFacts(shutdown_reason="host-qmp-quit"), ExitKind.KILLED, "quit"),
        (ZERO, EndFacts(shutdown_reason="host-signal"), ExitKind.KILLED, "signal"),
        (by(9), EndFacts(), ExitKind.KILLED, "SIGKILL"),
        (by(15), EndFacts(), ExitKind.KILLED, "SIGTERM"),
        (by(11), EndFacts(), ExitKind.CRASH, "SIGSEGV"),
        (by(signal.SIGSYS), EndFacts(), ExitKind.CRASH, "sandbox forbids"),
        (by(signal.SIGRTMIN + 3), EndFacts(), ExitKind.CRASH, "signal 37"),
        (ONE, EndFacts(), ExitKind.CRASH, "exited with 1: last words"),
        (ZERO, EndFacts(), ExitKind.UNKNOWN, "exited with 0 (no reason given): last words"),
        (ZERO, EndFacts(shutdown_reason="subsystem-reset"), ExitKind.UNKNOWN, "subsystem-reset"),
        (by(9), EndFacts(protocol_failure="junk"), ExitKind.CRASH, "broke its control protocol"),
        # Hung in its exit after the guest had powered off, and killed for that.
        (by(9), EndFacts(shutdown_reason="guest-shutdown"), ExitKind.CLEAN, "powered off"),
    ],
)
def test_end_is_classified(ending, facts, kind, words):
    result = classify(ending, facts, ["last words"])
    assert result.kind is kind
    assert words in result.reason
    assert (result.code, result.signal) == (ending.code, ending.signal)


def test_only_a_guests_own_power_off_is_clean():
    """The caller maps CLEAN to a container's own exit; nothing else may look like it."""
    reasons = ["guest-reset", "guest-panic", "host-error", "host-qmp-quit", "host-signal", None]
    for ending in (ZERO, ONE, by(9), by(11)):
        for reason in reasons:
            facts = EndFacts(shutdown_reason=reason)
            assert classify(ending, facts, []).kind is not ExitKind.CLEAN
