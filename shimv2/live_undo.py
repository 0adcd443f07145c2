"""Undoes what a journal holds while a shim serves: what takes its time holds up nobody else.

The undo functions are those of `undo`, which `delete` runs without an event loop; only how they
wait is different. What can't be undone stays in the journal, for the next who tries.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import trio

from shimv2 import host_process
from shimv2.journal import DEFERRED
from shimv2.undo import KILL_DEADLINE_S

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from shimv2.journal import Journal
    from shimv2.undo import Outcome

    Fields = Mapping[str, str | int]


async def undo_live(journal: Journal) -> list[str]:
    """Undo and release all that is held and not `DEFERRED`, newest first; return the problems.

    Bounded for each process and for the network; the event loop goes on meanwhile. If cancelled,
    what is left stays held.
    """
    problems: list[str] = []
    for entry in reversed(journal.held):
        if entry.kind in DEFERRED:
            continue
        waiting = _WAITING.get(entry.kind)
        if waiting is None:
            problems += journal.undo_some([entry])
            continue
        try:
            outcome = await waiting(entry.fields)
        except Exception as error:  # an undo must never stop the others
            outcome = f"{type(error).__name__}: {error}"
        if outcome is None:
            journal.release(entry)
        else:
            problems.append(f"{entry.kind} #{entry.number}: {outcome}")
    return problems


async def _process(fields: Fields) -> Outcome:
    """Do as `undo.process`."""
    pid = int(fields["pid"])
    descriptor = host_process.kill(pid, int(fields["start_time"]))
    if descriptor is None:
        return None
    try:
        with trio.move_on_after(KILL_DEADLINE_S):
            await trio.lowlevel.wait_readable(descriptor)
            return None
    finally:
        os.close(descriptor)
    return host_process.survived(pid, str(fields.get("name", "process")), KILL_DEADLINE_S)


async def _network(fields: Fields) -> Outcome:
    """Do as `undo.network`."""
    from netns.network import undo_recorded_live

    return await undo_recorded_live(fields)


_WAITING: dict[str, Callable[[Fields], Awaitable[Outcome]]] = {
    "process": _process,
    "network": _network,
}
"""Kinds that may take more than a moment."""
