"""What a VMM process's own end says, where no event explains it. Pure."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Final

from .machine import ExitKind

if TYPE_CHECKING:
    from .child import ChildExit

# Sent by somebody; every other signal is raised by what the VMM itself did.
SENT_SIGNALS: Final = frozenset(
    {signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT}
)


def judge_process(ending: ChildExit) -> tuple[ExitKind, str] | None:
    """Kind and reason of a signal or a failure; None for an exit with 0, which says nothing."""
    if ending.signal is not None:
        kind = ExitKind.KILLED if ending.signal in SENT_SIGNALS else ExitKind.CRASH
        hint = " (a system call its sandbox forbids)" if ending.signal == signal.SIGSYS else ""
        return kind, f"the VMM {ending}{hint}"
    if ending.code != 0:
        return ExitKind.CRASH, f"the VMM {ending}"
    return None
