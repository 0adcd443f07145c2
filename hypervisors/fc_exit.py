"""How a Firecracker ended, by its status, its last metrics and the guest's console. Pure.

The end of the process is all that it tells: a guest that resets ends it with 0, whether it was a
reboot or a panic. The console says which: the kernel writes the panic's line before it resets. A
guest that has taken over its own kernel can write such a line, which concerns it alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from .bounded_json import parse_json
from .machine import ExitKind, VmExit
from .process_end import judge_process

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from .child import ChildExit

PANIC: Final = "Kernel panic - not syncing"
# The panic's line and the registers and stack that may follow it.
PANIC_LINES: Final = 100
# Source: Firecracker v1.16, src/vmm/src/lib.rs FcExitCode.
CODES: Final[Mapping[int, str]] = {
    148: "it made a system call that its seccomp filter forbids",
    149: "SIGBUS: memory or a file that it had mapped is gone",
    150: "SIGSEGV",
    151: "SIGXFSZ: a file grew over its limit",
    152: "its configuration is bad",
    153: "its command line is bad",
    154: "SIGXCPU: its limit of processor time is reached",
    155: "SIGPIPE: what it writes to is closed",
    156: "SIGHUP",
    157: "SIGILL",
}
# The counters are 64 bits wide: what is more is no Firecracker's, and costs time to write down.
_MAX_COUNT: Final = (1 << 64) - 1
# Counters of the metrics that explain an end, and what they count.
# Source: Firecracker v1.16, src/vmm/src/logger/metrics.rs.
FAULTS: Final[Mapping[tuple[str, str], str]] = {
    ("seccomp", "num_faults"): "forbidden system calls",
    ("signals", "sigbus"): "SIGBUS",
    ("signals", "sigsegv"): "SIGSEGV",
    ("signals", "sigill"): "SIGILL",
    ("vmm", "panic_count"): "panics of the VMM",
    ("vcpu", "failures"): "failures of vCPUs",
    ("block", "execute_fails"): "failed disk requests",
    ("net", "tap_read_fails"): "failed reads of a tap",
    ("net", "tap_write_fails"): "failed writes to a tap",
}


@dataclass(slots=True)
class EndFacts:
    """What was seen before the process ended. `faults` is of the last metrics line."""

    told_to_end: bool = False
    faults: dict[str, int] = field(default_factory=dict)


def faults(line: bytes) -> dict[str, int]:
    """What went wrong according to one line of metrics; {} for one that cannot be read."""
    try:
        metrics = parse_json(line)
    except ValueError:
        return {}
    if not isinstance(metrics, dict):
        return {}
    found = {}
    for (group, name), words in FAULTS.items():
        counters = metrics.get(group)
        count = counters.get(name) if isinstance(counters, dict) else None
        if isinstance(count, int) and 0 < count <= _MAX_COUNT:
            found[words] = count
    return found


def classify(
    ending: ChildExit, facts: EndFacts, console_tail: Sequence[str], last_words: Sequence[str]
) -> VmExit:
    """Join the process's end and what was seen into the one exit."""
    kind, reason = _judge(ending, facts, console_tail)
    if kind is ExitKind.CRASH:
        said = [f"{count} {words}" for words, count in facts.faults.items()]
        reason = ": ".join([reason, " | ".join([*said, *last_words[-3:]])] if said or last_words
                           else [reason])  # fmt: skip
    return VmExit(kind=kind, code=ending.code, signal=ending.signal, reason=reason)


def _judge(ending: ChildExit, facts: EndFacts, console_tail: Sequence[str]) -> tuple[ExitKind, str]:
    if ending.code is not None and ending.code in CODES:
        return ExitKind.CRASH, f"the VMM {ending}: {CODES[ending.code]}"
    if (found := judge_process(ending)) is not None:
        return found
    if any(PANIC in line for line in console_tail):
        return ExitKind.PANIC, "the guest kernel panicked"
    if facts.told_to_end:
        return ExitKind.CLEAN, "the guest ended as it was asked to"
    return ExitKind.REBOOT, "the guest rebooted"
