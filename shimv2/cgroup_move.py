"""Moves processes between cgroups, in a child process.

The kernel lets the first move in a while wait for a grace period of RCU, 10 ms and more, in which
the writer is stuck in write(2); those that follow take microseconds. The shim goes on meanwhile.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, NoReturn

import trio

from netns.inside import leave_parent

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

# Creating pods in a mass makes the moves queue for one lock of the kernel's.
MOVE_S: Final = 10.0
EXIT_S: Final = 1.0
_MAX_ANSWER_BYTES: Final = 4096


class Move:
    """A move that is under way. Use as a context manager, or call `aclose` in the end."""

    def __init__(self, pid: int, pidfd: int, answer_fd: int, directories: Sequence[str]) -> None:
        self._pid = pid
        self._pidfd = pidfd
        self._answer_fd = answer_fd
        self._directories = directories

    @classmethod
    def start(cls, pids: Sequence[int], directories: Sequence[str]) -> Move:
        """Begin to move `pids` into the cgroups at `directories`, and what they have started.

        The child dies with the caller; what it has moved then stays moved. Raises OSError if there
        is no process to be had.
        """
        reading, writing = os.pipe2(os.O_CLOEXEC)
        try:
            pid = os.fork()
            if pid == 0:
                _move_and_exit(pids, directories, writing)
            try:
                pidfd = os.pidfd_open(pid)
            except OSError:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                raise
        except OSError:
            os.close(reading)
            raise
        finally:
            os.close(writing)
        return cls(pid, pidfd, reading, directories)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def done(self) -> dict[str, OSError]:
        """Wait for the end; return what failed, by directory. Processes that are gone don't count.

        Raises:
            TimeoutError: the kernel did nothing within `MOVE_S`.
        """
        answer = b""
        with trio.move_on_after(MOVE_S) as limit:
            while True:
                await trio.lowlevel.wait_readable(self._answer_fd)
                part = os.read(self._answer_fd, _MAX_ANSWER_BYTES)
                if not part:
                    break
                answer += part
        if limit.cancelled_caught:
            raise TimeoutError(f"the kernel moved no process within {MOVE_S:g} s")
        return self._failures(answer.decode("ascii", "replace"))

    async def aclose(self) -> None:
        """End the child and collect it. Idempotent, shielded, bounded.

        It is at its end, or stuck in write(2), where no signal reaches it until the kernel has
        moved the process. If that takes longer, a zombie stays until we end.
        """
        if self._pidfd < 0:
            return
        pidfd, self._pidfd = self._pidfd, -1
        trio.lowlevel.notify_closing(self._answer_fd)
        os.close(self._answer_fd)
        try:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            with trio.move_on_after(EXIT_S, shield=True):
                await trio.lowlevel.wait_readable(pidfd)
        finally:
            _collect(pidfd)

    def _failures(self, answer: str) -> dict[str, OSError]:
        if not answer.endswith("end"):
            return {self._directories[0]: OSError(0, "the process that moves died")}
        failures = {}
        for item in answer.split()[:-1]:
            index, _, code = item.partition(":")
            directory = self._directories[int(index)]
            failures[directory] = OSError(int(code), os.strerror(int(code)), directory)
        return failures


def _collect(pidfd: int) -> None:
    os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)
    os.close(pidfd)


def write_pid(directory: str, pid: int) -> None:
    """Move one process now; a process that is gone is no failure. Raises OSError."""
    descriptor = os.open(f"{directory}/cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, str(pid).encode("ascii"))
    except ProcessLookupError:
        return
    finally:
        os.close(descriptor)


def _move_all(pids: Sequence[int], directories: Sequence[str], answer_fd: int) -> None:
    for index, directory in enumerate(directories):
        for pid in pids:
            try:
                write_pid(directory, pid)
            except OSError as error:
                os.write(answer_fd, f"{index}:{error.errno} ".encode("ascii"))


def _children(pids: Sequence[int]) -> list[int]:
    """Only for speed: the caller looks again."""
    found: list[int] = []
    for pid in pids:
        try:
            with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as stream:
                found += map(int, stream.read().split())
        except OSError:
            continue
    return [pid for pid in found if pid != os.getpid()]


def _move_and_exit(pids: Sequence[int], directories: Sequence[str], answer_fd: int) -> NoReturn:
    try:
        leave_parent(keep=(answer_fd,))
        # What is forked meanwhile is born inside, or is among the children when all is done.
        _move_all(pids, directories, answer_fd)
        _move_all(_children(pids), directories, answer_fd)
        os.write(answer_fd, b"end")
    finally:
        os._exit(0)
