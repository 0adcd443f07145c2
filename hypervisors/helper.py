"""A daemon that serves one device of a machine over a unix socket."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Final

import trio

if TYPE_CHECKING:
    from pathlib import Path

    from trio import TaskStatus

    from .child import Child, ChildExit

# Enough to leave its namespaces in order; a daemon that needs longer is stuck.
STOP_GRACE_S: Final = 1.0


class Helper:
    """A running helper and the sockets it left behind.

    Start `run` in a nursery: it drains the daemon's stderr and returns its exit, which the caller
    turns into an event when it comes before the machine's.
    """

    def __init__(self, child: Child, sockets: tuple[Path, ...]) -> None:
        self.name = child.name
        self.pid = child.pid
        self._child = child
        self._sockets = sockets

    @property
    def exit(self) -> ChildExit | None:
        """How it ended; None while it lives."""
        return self._child.exit

    @property
    def stderr_tail(self) -> list[str]:
        """Its last words."""
        return self._child.stderr_tail

    async def run(self, *, task_status: TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> ChildExit:
        """Supervise until the daemon has ended. Safe to cancel: the daemon goes on."""
        return await self._child.run(task_status=task_status)

    async def wait(self) -> ChildExit:
        """Return the exit, the same to every caller. Safe to cancel."""
        return await self._child.wait()

    async def aclose(self) -> None:
        """Stop the daemon, reap it and unlink its sockets. Idempotent.

        Shielded, and bounded by the grace and `child.REAP_DEADLINE_S`.
        """
        with trio.move_on_after(STOP_GRACE_S, shield=True):
            await self._child.stop(grace_s=STOP_GRACE_S)
        await self._child.aclose()
        for path in self._sockets:
            with contextlib.suppress(OSError):
                os.unlink(path)
