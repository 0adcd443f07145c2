"""Copies between a process's streams in the guest and its stdio on the host.

One job a process, three loops. At most one chunk of a stream is under way, which is all the
flow control there is: a reader that stalls stalls its stream and nothing else.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final, Protocol

import trio

from agent_proto.errors import AgentError
from shimv2.stdio_fifo import CHUNK_BYTES, Sink, StdinFifo

if TYPE_CHECKING:
    from shimv2.stdio import Stdio, StdioPlan

READ_GRACE_S: Final = 0.25
"""How long a reader may take for what lies in its fifo at the end, a pipe's buffer at most."""


class GuestStreams(Protocol):
    """The agent's stdio calls, bound to one process."""

    async def read_stdout(self, max_bytes: int) -> bytes: ...
    async def read_stderr(self, max_bytes: int) -> bytes: ...
    async def write_stdin(self, data: bytes) -> int: ...
    async def close_stdin(self) -> None: ...


class Relay:
    """Moves one process's bytes until its outputs have ended, then closes its stdio."""

    def __init__(self, plan: StdioPlan, stdio: Stdio, guest: GuestStreams) -> None:
        self._plan = plan
        self._stdio = stdio
        self._guest = guest
        self._scope = trio.CancelScope()
        self.is_running = False
        self.problem = ""  # why a stream ended before its end, if one did
        self.outputs_ended = trio.Event()
        self.finished = trio.Event()

    async def run(self) -> None:
        """Copy until the guest's outputs end or `abandon` is called. Raises nothing of its own."""
        self.is_running = True
        try:
            with self._scope:
                await self._copy()
                await self._let_read()
        finally:
            self.outputs_ended.set()
            self._stdio.close()
            # Bounded by the logger's own graces: its last lines would be lost otherwise.
            with trio.move_on_after(15, shield=True):
                await self._stdio.aclose()
            self.is_running = False
            self.finished.set()

    def abandon(self) -> None:
        """Stop copying now; what has not been copied is lost."""
        self._scope.cancel()

    def finish_input(self) -> None:
        """The client will write no more."""
        if self._stdio.stdin is not None:
            self._stdio.stdin.finish()

    async def _copy(self) -> None:
        async with trio.open_nursery() as inputs:
            inputs.start_soon(self._copy_input)
            async with trio.open_nursery() as outputs:
                stdio, guest = self._stdio, self._guest
                outputs.start_soon(self._copy_output, guest.read_stdout, stdio.stdout)
                if not self._plan.terminal:
                    outputs.start_soon(self._copy_output, guest.read_stderr, stdio.stderr)
            inputs.cancel_scope.cancel()

    async def _let_read(self) -> None:
        # A client that hears of the exit closes its fifos, read or not.
        # Source: containerd client/task.go Delete, pkg/cio/io_unix.go copyIO "cancel".
        with trio.move_on_after(READ_GRACE_S):
            for sink in (self._stdio.stdout, self._stdio.stderr):
                if sink is not None:
                    await sink.drained()

    async def _copy_input(self) -> None:
        with contextlib.suppress(AgentError):
            if self._stdio.stdin is not None:
                await self._pump_input(self._stdio.stdin)
                await self._guest.close_stdin()
            elif not self._plan.terminal:
                # No stdin reads as /dev/null does: at its end.
                await self._guest.close_stdin()

    async def _pump_input(self, stdin: StdinFifo) -> None:
        while data := await stdin.read():
            while data:
                taken = await self._guest.write_stdin(data)
                if taken <= 0:
                    return
                data = data[taken:]

    async def _copy_output(
        self, read: Callable[[int], Awaitable[bytes]], sink: Sink | None
    ) -> None:
        # Without a sink the output is read and dropped: unread, it would stop the process.
        with contextlib.suppress(trio.ClosedResourceError):
            try:
                while data := await read(CHUNK_BYTES):
                    if sink is not None:
                        await sink.write(data)
            except AgentError as exc:
                self.problem = str(exc)
