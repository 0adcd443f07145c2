"""`binary://` loggers: a program of the user's that reads a process's output from descriptors.

Source: containerd docs/runtime-v2.md "Logging": descriptor 3 is stdout, 4 stderr, 5 is closed (or
written to) when the logger is ready; the environment holds CONTAINER_ID and CONTAINER_NAMESPACE
and nothing else.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import trio

from hypervisors.child import Child, Recorder, spawn
from hypervisors.errors import HypervisorError
from shimv2.errors import DeadlineExceeded, FailedPrecondition
from shimv2.stdio_fifo import PipeSink

if TYPE_CHECKING:
    from shimv2.stdio import LoggerCommand

READY_DEADLINE_S: Final = 10.0
# At the end of its input a logger flushes and leaves by itself; then it is told, then killed.
LEAVE_GRACE_S: Final = 2.0
TERMINATE_GRACE_S: Final = 8.0


class LoggerProcess:
    """A running logger. `stop` must be called; closing the sinks is what tells it to end."""

    def __init__(self, child: Child, stdout: PipeSink, stderr: PipeSink) -> None:
        self._child = child
        self.stdout = stdout
        self.stderr = stderr
        self.on_stopped: Callable[[], None] = lambda: None

    async def stop(self) -> None:
        """Close its input and wait for its end, within a bound. Idempotent; safe to cancel."""
        self.stdout.close()
        self.stderr.close()
        try:
            with trio.move_on_after(LEAVE_GRACE_S) as leaving:
                await self._child.wait()
            if leaving.cancelled_caught:
                self._child.send_signal(signal.SIGTERM)
                with trio.move_on_after(TERMINATE_GRACE_S):
                    await self._child.wait()
        finally:
            await self._child.aclose()
            self.on_stopped()


async def start_logger(
    command: LoggerCommand,
    *,
    container_id: str,
    namespace: str,
    record: Recorder,
    ready_deadline_s: float = READY_DEADLINE_S,
) -> LoggerProcess:
    """Start a logger and wait until it is ready.

    Raises:
        FailedPrecondition: it cannot be executed, or ended before it was ready.
        DeadlineExceeded: it was not ready in time.
    """
    fds: list[int] = []
    try:
        fds += os.pipe2(os.O_CLOEXEC)
        fds += os.pipe2(os.O_CLOEXEC)
        fds += os.pipe2(os.O_CLOEXEC)
        out_read, out_write, err_read, err_write, ready_read, ready_write = fds
        child = await _spawn(
            command, {3: out_read, 4: err_read, 5: ready_write}, container_id, namespace, record
        )
        for fd in (out_read, err_read, ready_write):
            fds.remove(fd)
            os.close(fd)
        os.set_blocking(out_write, False)
        os.set_blocking(err_write, False)
        logger = LoggerProcess(child, PipeSink(out_write), PipeSink(err_write))
        fds.remove(out_write)
        fds.remove(err_write)
        try:
            await _wait_ready(command, ready_read, ready_deadline_s)
        except BaseException:
            with trio.CancelScope(shield=True):  # bounded by the child's own reap deadline
                logger.stdout.close()
                logger.stderr.close()
                await child.aclose()
            raise
        return logger
    finally:
        for fd in fds:
            os.close(fd)


async def _spawn(
    command: LoggerCommand,
    pass_fds: dict[int, int],
    container_id: str,
    namespace: str,
    record: Recorder,
) -> Child:
    null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    try:
        return await spawn(
            "logger",
            [str(command.path), *command.arguments],
            record=record,
            pass_fds=pass_fds,
            stderr=null,  # a pipe that nobody drains would stop a chatty one
            env={"CONTAINER_ID": container_id, "CONTAINER_NAMESPACE": namespace},
        )
    except HypervisorError as exc:
        raise FailedPrecondition(f"logger {command.path} cannot be started: {exc}") from exc
    finally:
        os.close(null)


async def _wait_ready(command: LoggerCommand, ready: int, deadline_s: float) -> None:
    os.set_blocking(ready, False)
    with trio.move_on_after(deadline_s) as waiting:
        await trio.lowlevel.wait_readable(ready)
    if waiting.cancelled_caught:
        raise DeadlineExceeded(
            f"logger {command.path} was not ready after {deadline_s:g} s; "
            "it must close descriptor 5 when it is"
        )
    if not os.read(ready, 1) and command.must_report_ready:
        raise FailedPrecondition(f"logger {command.path} ended before it was ready")
