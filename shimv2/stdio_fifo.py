"""Fifos and files as non-blocking streams: the two ends a relay reads and writes.

Every wait is a checkpoint that can be cancelled; nothing here blocks the loop on a reader or writer
that does not come. Closing wakes whoever waits.
"""

from __future__ import annotations

import contextlib
import os
import stat
from fcntl import fcntl, ioctl
from pathlib import Path
from typing import Final, Protocol

import trio

from shimv2.errors import FailedPrecondition, InvalidArgument, NotFound

CHUNK_BYTES: Final = 256 << 10
_F_SETPIPE_SZ: Final = 1031  # Source: linux/fcntl.h
_FIONREAD: Final = 0x541B  # Source: asm-generic/ioctls.h
_PIPE_BYTES: Final = 1 << 20
# After CloseIO a client that keeps its end of the fifo open, silent, is taken to be done. Long
# enough for a copier of the client that still holds bytes it had read before.
CLOSED_INPUT_QUIET_S: Final = 2.0


class Sink(Protocol):
    """Where a stream's bytes go."""

    async def write(self, data: bytes) -> None: ...
    async def drained(self) -> None: ...
    def close(self) -> None: ...


class PipeSink:
    """The writing side of a fifo or pipe. After its reader has gone, bytes are dropped."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._is_broken = False
        self._is_enlarged = False

    async def write(self, data: bytes) -> None:
        """Write all of `data`, waiting for the reader as long as it takes.

        Raises:
            trio.ClosedResourceError: `close` was called meanwhile.
        """
        if self._is_broken:
            await trio.lowlevel.checkpoint()
            return
        rest = memoryview(data)
        while rest:
            if self._descriptor < 0:
                raise trio.ClosedResourceError("the stream was closed")
            try:
                rest = rest[os.write(self._descriptor, rest) :]
            except BlockingIOError:
                self._enlarge()
                await trio.lowlevel.wait_writable(self._descriptor)
            except BrokenPipeError:
                # The process must not notice that nobody listens: a log reader may restart.
                self._is_broken = True
                return
        await trio.lowlevel.checkpoint_if_cancelled()

    async def drained(self) -> None:
        """Wait until the reader has taken everything; for ever if there is no reader."""
        while not self._is_drained():  # noqa: ASYNC110  # a pipe has no event for being empty
            await trio.sleep(0.002)
        await trio.lowlevel.checkpoint_if_cancelled()

    def close(self) -> None:
        """Close once; a waiting writer gets ClosedResourceError."""
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            trio.lowlevel.notify_closing(descriptor)
            os.close(descriptor)

    def _is_drained(self) -> bool:
        if self._descriptor < 0 or self._is_broken:
            return True
        return not any(ioctl(self._descriptor, _FIONREAD, bytes(4)))

    def _enlarge(self) -> None:
        # Only for a stream that has filled its pipe: the memory counts against a host-wide limit,
        # and going beyond it needs a capability. Failing costs speed, nothing else.
        if not self._is_enlarged:
            self._is_enlarged = True
            with contextlib.suppress(OSError):
                fcntl(self._descriptor, _F_SETPIPE_SZ, _PIPE_BYTES)


class FileSink:
    """A regular file or character device, appended to."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    async def write(self, data: bytes) -> None:
        """Write all of `data`; what a full disk refuses is dropped, the process goes on."""
        rest = memoryview(data)
        with contextlib.suppress(OSError):
            while rest and self._descriptor >= 0:
                rest = rest[os.write(self._descriptor, rest) :]
        await trio.lowlevel.checkpoint()

    async def drained(self) -> None:
        """A file has what was written."""
        await trio.lowlevel.checkpoint()

    def close(self) -> None:
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            os.close(descriptor)


def open_output(path: Path, name: str) -> Sink:
    """Open an output that a client made: a fifo, or a file or character device.

    Raises:
        NotFound: nothing there. InvalidArgument: a directory, socket or block device.
    """
    # O_RDWR on a fifo needs no reader, and keeps the pipe when the reader goes.
    descriptor = _open(path, name, os.O_RDWR | os.O_NONBLOCK | os.O_APPEND)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISFIFO(mode):
        return PipeSink(descriptor)
    if stat.S_ISREG(mode) or stat.S_ISCHR(mode):
        return FileSink(descriptor)
    os.close(descriptor)
    raise InvalidArgument(f"{name} {path} is neither a fifo nor a file")


class StdinFifo:
    """The reading side of a client's stdin fifo.

    A writer of our own keeps the fifo open when the client goes away or is restarted; only
    `finish` (CloseIO) gives it up, and then the end comes after all that was written before.
    """

    def __init__(self, path: Path) -> None:
        self._writer = -1
        self._is_finishing = False
        self._waiting: trio.CancelScope | None = None
        self._reader = _open(path, "stdin", os.O_RDONLY | os.O_NONBLOCK)
        self._is_fifo = stat.S_ISFIFO(os.fstat(self._reader).st_mode)
        if self._is_fifo:
            try:
                self._writer = _open(path, "stdin", os.O_WRONLY | os.O_NONBLOCK)
            except BaseException:
                os.close(self._reader)
                raise

    def finish(self) -> None:
        """The client will write no more (CloseIO). Idempotent, never waits."""
        if self._is_finishing:
            return
        self._is_finishing = True
        if self._waiting is not None:
            self._waiting.deadline = trio.current_time() + CLOSED_INPUT_QUIET_S
        if self._writer >= 0:
            writer, self._writer = self._writer, -1
            os.close(writer)

    async def read(self) -> bytes:
        """The next bytes, or b"" at the end of input."""
        while self._reader >= 0:
            # Waiting first matters: before the first writer, read(2) says end of file.
            if self._is_fifo and not await self._wait_readable():
                return b""
            if not self._is_fifo:
                await trio.lowlevel.checkpoint()
            with contextlib.suppress(BlockingIOError):
                return os.read(self._reader, CHUNK_BYTES) if self._reader >= 0 else b""
        return b""

    def close(self) -> None:
        """Close once; a waiting reader gets the end of input."""
        self.finish()
        if self._reader >= 0:
            reader, self._reader = self._reader, -1
            trio.lowlevel.notify_closing(reader)
            os.close(reader)

    async def _wait_readable(self) -> bool:
        """False when there will be nothing more to read."""
        with trio.CancelScope() as scope:
            self._waiting = scope
            if self._is_finishing:
                scope.deadline = trio.current_time() + CLOSED_INPUT_QUIET_S
            try:
                await trio.lowlevel.wait_readable(self._reader)
            except trio.ClosedResourceError:
                return False
            finally:
                self._waiting = None
        return not scope.cancelled_caught


def _open(path: Path, name: str, flags: int) -> int:
    try:
        return os.open(path, flags | os.O_CLOEXEC | os.O_NOCTTY)
    except FileNotFoundError as exc:
        raise NotFound(f"{name} {path} does not exist") from exc
    except IsADirectoryError as exc:
        raise InvalidArgument(f"{name} {path} is a directory") from exc
    except OSError as exc:
        raise FailedPrecondition(f"cannot open {name} {path}: {exc.strerror}") from exc
