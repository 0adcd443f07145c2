"""How a Firecracker's end is judged: status, metrics, console."""

from __future__ import annotations

import json
import signal

import pytest

from hypervisors import fifo_lines
from hypervisors.child import ChildExit
from hypervisors.fc_exit import EndFacts, classify, faults
from hypervisors.fifo_lines import FifoLines
from hypervisors.machine import ExitKind

PANIC = ["[ 1.0] Kernel panic - not syncing: sysrq", "[ 1.1] Call Trace:"]


def ended(code=None, number=None):
    return ChildExit(code=code, signal=number)


@pytest.mark.parametrize(
    ("ending", "told", "console", "kind", "reason"),
    [
        (ended(0), False, [], ExitKind.REBOOT, "the guest rebooted"),
        (ended(0), False, PANIC, ExitKind.PANIC, "the guest kernel panicked"),
        (ended(0), True, [], ExitKind.CLEAN, "the guest ended as it was asked to"),
        (ended(0), True, PANIC, ExitKind.PANIC, "the guest kernel panicked"),
        (
            ended(None, signal.SIGKILL), False, PANIC, ExitKind.KILLED,
            "the VMM was killed by SIGKILL",
        ),
        (
            ended(None, signal.SIGABRT), False, [], ExitKind.CRASH,
            "the VMM was killed by SIGABRT: oh",
        ),
        (ended(1), False, [], ExitKind.CRASH, "the VMM exited with 1: oh"),
        (
            ended(148), False, PANIC, ExitKind.CRASH,
            "the VMM exited with 148: it made a system call that its seccomp filter forbids: oh",
        ),
        (ended(156), False, [], ExitKind.CRASH, "the VMM exited with 156: SIGHUP: oh"),
    ],
)  # fmt: skip
def test_end_is_judged_by_status_first_then_by_the_console(ending, told, console, kind, reason):
    found = classify(ending, EndFacts(told_to_end=told), console, ["oh"])
    assert (found.kind, found.reason) == (kind, reason)
    assert (found.code, found.signal) == (ending.code, ending.signal)


def test_crash_names_what_the_metrics_counted_and_other_ends_do_not():
    line = json.dumps(
        {"seccomp": {"num_faults": 1}, "block": {"execute_fails": 2}, "vcpu": {"failures": 0}}
    ).encode()
    facts = EndFacts(faults=faults(line))
    assert facts.faults == {"forbidden system calls": 1, "failed disk requests": 2}
    text = classify(ended(148), facts, [], []).reason
    assert text.endswith("forbids: 1 forbidden system calls | 2 failed disk requests")
    assert classify(ended(0), facts, [], ["x"]).reason == "the guest rebooted"


@pytest.mark.parametrize(
    "line",
    [b"", b"{", b"[]", b"3", b'{"seccomp": 1}', b'{"seccomp": {"num_faults": "1"}}', b"[" * 4000,
     b'{"seccomp": {"num_faults": -1}}', b"\xff{}",
     b'{"seccomp": {"num_faults": 1%s}}' % (b"0" * 4000)],
)  # fmt: skip
def test_metrics_of_a_vmm_that_was_taken_over_say_nothing(line):
    assert faults(line) == {}


async def test_fifo_gives_whole_lines_passes_over_long_ones_and_keeps_the_last(tmp_path):
    lines: list[bytes] = []
    fifo = FifoLines(tmp_path / "fifo", lines.append, max_line=100)
    writer = (tmp_path / "fifo").open("wb", buffering=0)
    try:
        for piece in (
            b"one\ntw",
            b"o\n",
            b"x" * 80,
            b"y" * 80 + b"tail\n",
            b"z" * 101 + b"\nlast\n",
        ):
            writer.write(piece)
            fifo.drain()
        assert lines == [b"one", b"two", b"last"]
        assert fifo.tail(1) == ["last"]
        await fifo.grown()
        fifo.wake()
        await fifo.grown()
    finally:
        writer.close()
        fifo.close()
        fifo.close()
    fifo.drain()


async def test_of_very_many_lines_at_once_the_last_are_looked_at(tmp_path):
    lines: list[bytes] = []
    fifo = FifoLines(tmp_path / "fifo", lines.append, max_line=10)
    with (tmp_path / "fifo").open("wb", buffering=0) as writer:
        writer.write(b"z" * 11)
        fifo.drain()
        writer.write(b"\n" + b"".join(b"%d\n" % number for number in range(100)))
        fifo.drain()
    fifo.close()
    assert lines == [b"%d" % number for number in range(100)][-fifo_lines.LINES_A_CHUNK :]
