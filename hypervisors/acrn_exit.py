"""Tells how an acrn-dm ended from its status and what was seen before. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .machine import ExitKind, VmExit
from .process_end import judge_process

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .child import ChildExit


@dataclass(slots=True)
class EndFacts:
    """What was seen before the end."""

    powered_off: bool = False
    triple_fault: bool = False
    was_reset: bool = False
    told_to_quit: bool = False

    @property
    def is_announced(self) -> bool:
        """Whether the process is to end by itself."""
        return self.powered_off or self.triple_fault or self.told_to_quit


def classify(ending: ChildExit, facts: EndFacts, words: Sequence[str]) -> VmExit:
    """Join the process's end and what was seen into the one exit; `words` are the VMM's last."""
    kind, reason = _judge(ending, facts)
    if kind in (ExitKind.CRASH, ExitKind.UNKNOWN) and words:
        reason = f"{reason}: {' | '.join(words[-3:])}"
    return VmExit(kind=kind, code=ending.code, signal=ending.signal, reason=reason)


def _judge(ending: ChildExit, facts: EndFacts) -> tuple[ExitKind, str]:
    if facts.was_reset:
        return ExitKind.REBOOT, "the guest rebooted"
    # Before the power-off: the hypervisor answers a triple fault with one.
    if facts.triple_fault:
        return ExitKind.REBOOT, "the guest rebooted, or its kernel panicked"
    if facts.powered_off:
        return ExitKind.CLEAN, "the guest powered off"
    if facts.told_to_quit and ending.code == 0:
        return ExitKind.KILLED, "the VMM was told to quit"
    if (found := judge_process(ending)) is not None:
        return found
    return ExitKind.UNKNOWN, "the VMM exited with 0 (no reason given)"
