"""Undoes what a journal holds while a shim serves: what takes its time holds up nobody else.

The undo functions are those of `undo`, which `delete` runs without an event loop; only how they
wait is different. What can't be undone stays in the journal, for the next who tries.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import trio

from shimv2 import host_process, journal
from shimv2.undo import KILL_DEADLINE_S, LIVE

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from shimv2.journal import Entry, Journal
    from shimv2.state_dir import StateDir
    from shimv2.undo import Outcome

    Fields = Mapping[str, str | int]


async def undo_live(held: Journal) -> list[str]:
    """Undo and release all that is held and not `DEFERRED`, newest first; return the problems.

    Bounded for each process and for the network; the event loop goes on meanwhile. If cancelled,
    what is left stays held.
    """
    problems: list[str] = []
    for entry in reversed(held.held):
        if entry.kind in journal.DEFERRED:
            continue
        problem = await _undo_entry(entry, os.path.dirname(held.path))
        if problem is None:
            held.release(entry)
        else:
            problems.append(problem)
    return problems


async def remove_state_live(state_dir: StateDir) -> list[str]:
    """Do as `cleanup.remove_state` for what an earlier sandbox of this name has left."""
    if not state_dir.exists():
        return []
    left: list[journal.Left] = []
    for entry in journal.to_replay(state_dir.journal):
        problem = await _undo_entry(entry, state_dir.path)
        if problem is not None:
            left.append(journal.Left(entry, problem))
    if any(journal.outlasts(one.entry, state_dir.path) for one in left):
        return [one.problem for one in left]
    return state_dir.remove()


async def _undo_entry(entry: Entry, home: str) -> str | None:
    waiting = _WAITING.get(entry.kind)
    if waiting is None:
        return journal.undo_entry(entry, home, LIVE.get(entry.kind))
    try:
        outcome = await waiting(entry.fields)
    except Exception as error:  # an undo must never stop the others
        outcome = f"{type(error).__name__}: {error}"
    return None if outcome is None else f"{entry.kind} #{entry.number}: {outcome}"


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
