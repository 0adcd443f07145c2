"""A process's stdin, stdout and stderr as trio streams over the agent's calls.

At most one chunk is under way in each stream, so a reader that stalls stalls the process and costs
the host one chunk of memory. Nothing is buffered here, and the bytes are opaque.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import trio

from agent_proto.errors import AgentStatus
from agent_proto.limits import MAX_CHUNK_BYTES
from ttrpc.errors import Code

if TYPE_CHECKING:
    from agent_proto.client import AgentClient

_Read = Callable[[str, str, int], Awaitable[bytes]]


class ProcessOutput(trio.abc.ReceiveStream):
    """What a process writes to stdout or stderr. Made by `stdout_of` and `stderr_of`."""

    def __init__(self, read: _Read, cid: str, exec_id: str) -> None:
        self._read: Final = read
        self._cid: Final = cid
        self._exec_id: Final = exec_id
        self._one_user: Final = _OneUser()
        self._ended = False

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Wait for output; return at most `max_bytes` of it, or `b""` at the end and ever after.

        A process that the agent no longer knows has ended its output. Cancelling drops the chunk
        that is under way: only who gives the stream up should.

        Raises:
            AgentUnreachable, AgentStatus, AgentMisbehaved: the output is cut off here.
            trio.ClosedResourceError, trio.BusyResourceError: as for any trio stream.
        """
        with self._one_user.inside():
            if self._ended:
                await trio.lowlevel.checkpoint()
                return b""
            size = min(max_bytes or MAX_CHUNK_BYTES, MAX_CHUNK_BYTES)
            try:
                data = await self._read(self._cid, self._exec_id, size)
            except AgentStatus as error:
                if error.code != Code.NOT_FOUND:
                    raise
                data = b""
            self._ended = not data
            return data

    async def aclose(self) -> None:
        """Stop reading. The process isn't told; what it goes on to write stays in the guest."""
        self._one_user.close()
        await trio.lowlevel.checkpoint()


class ProcessInput(trio.abc.SendStream):
    """What a process reads from stdin. Made by `stdin_of`."""

    def __init__(self, client: AgentClient, cid: str, exec_id: str) -> None:
        self._client: Final = client
        self._cid: Final = cid
        self._exec_id: Final = exec_id
        self._one_user: Final = _OneUser()
        self._ended = False

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Hand `data` to the process, waiting as long as its pipe is full.

        No data does nothing: the end of input has its own method. When cancelled, an unknown part
        of the data has arrived.

        Raises:
            trio.BrokenResourceError: the process is gone.
            AgentUnreachable, AgentStatus, AgentMisbehaved: the agent or the connection failed.
            trio.ClosedResourceError, trio.BusyResourceError: as for any trio stream.
        """
        with self._one_user.inside():
            if self._ended:
                raise trio.ClosedResourceError("the input has been ended")
            await trio.lowlevel.checkpoint()
            view = memoryview(data)
            while view:
                chunk = bytes(view[:MAX_CHUNK_BYTES])
                with _gone_is_broken():
                    taken = await self._client.write_stdin(self._cid, self._exec_id, chunk)
                view = view[taken:]

    async def wait_send_all_might_not_block(self) -> None:
        """Return at once: only trying tells whether the process's pipe has room."""
        with self._one_user.inside():
            await trio.lowlevel.checkpoint()

    async def send_eof(self) -> None:
        """End the process's input. Idempotent; a process that is gone needs no end of input."""
        with self._one_user.inside():
            if self._ended:
                await trio.lowlevel.checkpoint()
                return
            try:
                await self._client.close_stdin(self._cid, self._exec_id)
            except AgentStatus as error:
                if error.code != Code.NOT_FOUND:
                    raise
            self._ended = True

    async def aclose(self) -> None:
        """Stop writing. The process isn't told: that is what `send_eof` does."""
        self._one_user.close()
        await trio.lowlevel.checkpoint()


@contextmanager
def _gone_is_broken() -> Iterator[None]:
    try:
        yield
    except AgentStatus as error:
        if error.code != Code.NOT_FOUND:
            raise
        raise trio.BrokenResourceError("the process is gone") from error


class _OneUser:
    """Keeps a second task out: two at once would put two chunks under way and mix their order."""

    def __init__(self) -> None:
        self._taken = False
        self._closed = False

    @contextmanager
    def inside(self) -> Iterator[None]:
        if self._closed:
            raise trio.ClosedResourceError("this stream has been closed")
        if self._taken:
            raise trio.BusyResourceError("another task is using this stream")
        self._taken = True
        try:
            yield
        finally:
            self._taken = False

    def close(self) -> None:
        self._closed = True


def stdin_of(client: AgentClient, cid: str, exec_id: str) -> ProcessInput:
    """Return a process's stdin."""
    return ProcessInput(client, cid, exec_id)


def stdout_of(client: AgentClient, cid: str, exec_id: str) -> ProcessOutput:
    """Return a process's stdout."""
    return ProcessOutput(client.read_stdout, cid, exec_id)


def stderr_of(client: AgentClient, cid: str, exec_id: str) -> ProcessOutput:
    """Return a process's stderr."""
    return ProcessOutput(client.read_stderr, cid, exec_id)
