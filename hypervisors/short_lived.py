"""Runs a program that is expected to end by itself, within a bound: OCI hooks.

It leads a process group; at its deadline the whole group is killed. What it says, on stdout and
stderr, is kept as a bounded tail and never blocks it.
"""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING, NamedTuple

import trio

from .child import Child, ChildExit, spawn

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from .child import Recorder


class Program(NamedTuple):
    """What to run: `path` is executed, `argv` and `env` are all that it is given."""

    path: str
    argv: Sequence[str]
    env: Mapping[str, str]
    cwd: str
    join: tuple[int, ...] = ()  # namespaces to enter


class Ended(NamedTuple):
    """How it ended: `exit` is None if its time was up; `said` are its last lines."""

    exit: ChildExit | None
    said: list[str]


async def run_to_end(
    name: str, program: Program, stdin: int, *, timeout_s: float, record: Recorder
) -> Ended:
    """Run it; `record` as for `child.spawn`. When this returns or is cancelled it is gone.

    Only processes that it has started and outlived it by its own will may go on.

    Raises:
        SpawnFailed: it can't be executed.
    """
    child = await spawn(
        name,
        program.argv,
        program=program.path,
        record=record,
        env=program.env,
        cwd=program.cwd,
        join=program.join,
        stdin=stdin,
        merge_output=True,
    )
    try:
        with trio.move_on_after(timeout_s):
            await child.run()
        ended = child.exit
    finally:
        _kill_group(child)
        await child.aclose()
    return Ended(ended, child.stderr_tail)


def _kill_group(child: Child) -> None:
    """Kill it with what it has started, unless it has ended: its number may be another's then."""
    if child.exit is None:
        try:
            os.killpg(child.pid, signal.SIGKILL)
        except ProcessLookupError:
            child.send_signal(signal.SIGKILL)
