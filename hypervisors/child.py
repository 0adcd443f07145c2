"""Runs another program as a child whose existence is recorded before it executes.

Used for VMMs, their helper daemons and logger binaries. What it guarantees:

- the recorder has returned before the program's first instruction, so that no process exists which
  the sandbox's journal does not know;
- the child dies with us (PR_SET_PDEATHSIG, and a gate that closes when we die earlier);
- the child holds no descriptor but 0-2 and those listed;
- its end is seen through a pidfd, and it is only ever signalled through that pidfd.

`os.fork` instead of the interpreter's spawn machinery: the death signal is bound to the *thread*
that forks, and worker threads end early. Only the main thread may call `spawn`.
"""

from __future__ import annotations

import _thread
import contextlib
import errno
import os
import resource
import signal
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias

import trio

from . import child_exec
from .errors import SpawnFailed

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from trio import TaskStatus

    from .child_exec import Account

STDERR_TAIL_BYTES: Final = 8192
# From fork to exec takes milliseconds; a longer wait means that the disk with the program hangs.
EXEC_DEADLINE_S: Final = 10.0
# SIGKILL ends a process at once unless it hangs in the kernel; then waiting longer is no use.
REAP_DEADLINE_S: Final = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildRecord:
    """What a journal needs to find a child again: a pid alone may have been reused.

    `start_time` is field 22 of /proc/<pid>/stat, in clock ticks since boot.
    """

    name: str
    pid: int
    start_time: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildExit:
    """Exactly one of `code` and `signal` is set."""

    code: int | None
    signal: int | None

    def __str__(self) -> str:
        if self.signal is None:
            return f"exited with {self.code}"
        try:
            return f"was killed by {signal.Signals(self.signal).name}"
        except ValueError:
            return f"was killed by signal {self.signal}"


Recorder: TypeAlias = "Callable[[ChildRecord], None]"


class Child:
    """A running or ended child. Made by `spawn` only; close it with `aclose`."""

    def __init__(self, name: str, record: ChildRecord, pidfd: int, stderr_fd: int | None) -> None:
        self.name = name
        self.pid = record.pid
        self.start_time = record.start_time
        self.exit: ChildExit | None = None
        self._pidfd = pidfd
        self._stderr_fd = stderr_fd
        self._stderr_tail: deque[bytes] = deque()
        self._stderr_bytes = 0
        # Guards `exit`: trio lets only one task wait for a descriptor.
        self._wait_lock = trio.Lock()

    def __repr__(self) -> str:
        return f"<Child {self.name} pid={self.pid} exit={self.exit}>"

    async def run(self, *, task_status: TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> ChildExit:
        """Drain the child's stderr until it has ended; return its exit.

        Must run for as long as the child does, or a chatty child blocks once its pipe is full.
        Safe to cancel: the child goes on.
        """
        task_status.started()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._drain_stderr)
            ending = await self.wait()
            # A grandchild may still hold the pipe; what the child said is in it by now.
            nursery.cancel_scope.cancel()
        self._read_stderr()
        return ending

    async def wait(self) -> ChildExit:
        """Return the exit, the same one to every caller. Safe to cancel."""
        async with self._wait_lock:
            while self.exit is None:
                await trio.lowlevel.wait_readable(self._pidfd)
                self._reap()
            return self.exit

    def send_signal(self, number: int) -> bool:
        """Signal the child; False when it has ended. Never hits a reused pid."""
        if self.exit is not None:
            return False
        try:
            signal.pidfd_send_signal(self._pidfd, number)
        except ProcessLookupError:
            return False
        return True

    async def stop(self, *, grace_s: float) -> ChildExit:
        """SIGTERM, wait `grace_s`, SIGKILL; return the exit."""
        if self.send_signal(signal.SIGTERM):
            with trio.move_on_after(grace_s):
                return await self.wait()
        self.send_signal(signal.SIGKILL)
        return await self.wait()

    async def aclose(self) -> None:
        """Kill the child if it lives, reap it, release its descriptors. Idempotent.

        Shielded: a cancelled caller must not leave a process. If the deadline fires, the process
        hangs in the kernel; its record stays in the journal.
        """
        if self._pidfd < 0:
            return
        self.send_signal(signal.SIGKILL)
        with trio.move_on_after(REAP_DEADLINE_S, shield=True):
            await self.wait()
        self._read_stderr()
        if self._stderr_fd is not None:
            trio.lowlevel.notify_closing(self._stderr_fd)
            os.close(self._stderr_fd)
            self._stderr_fd = None
        if self.exit is not None and self._pidfd >= 0:  # another closer may have been faster
            os.close(self._pidfd)
            self._pidfd = -1

    @property
    def stderr_tail(self) -> list[str]:
        """The last lines the child wrote to stderr, at most `STDERR_TAIL_BYTES` of them."""
        self._read_stderr()
        text = b"".join(self._stderr_tail)[-STDERR_TAIL_BYTES:]
        return [line for line in text.decode("utf-8", "replace").splitlines() if line.strip()]

    def _reap(self) -> None:
        try:
            result = os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED | os.WNOHANG)
        except ChildProcessError:
            # Somebody else reaped it; the status is lost, that it ended is not.
            self.exit = ChildExit(code=None, signal=signal.SIGKILL)
            return
        if result is None:
            return
        if result.si_code == os.CLD_EXITED:
            self.exit = ChildExit(code=result.si_status, signal=None)
        else:
            self.exit = ChildExit(code=None, signal=result.si_status)

    async def _drain_stderr(self) -> None:
        with contextlib.suppress(trio.ClosedResourceError):
            while self._stderr_fd is not None:
                await trio.lowlevel.wait_readable(self._stderr_fd)
                if not self._read_stderr():
                    return

    def _read_stderr(self) -> bool:
        """Take what is in the pipe; False at its end."""
        if self._stderr_fd is None:
            return False
        # At most one pipe's worth a turn, so that a flood does not hold the loop.
        for _ in range(16):
            try:
                data = os.read(self._stderr_fd, 4096)
            except BlockingIOError:
                return True
            if not data:
                return False
            self._stderr_tail.append(data)
            self._stderr_bytes += len(data)
            while self._stderr_bytes - len(self._stderr_tail[0]) >= STDERR_TAIL_BYTES:
                self._stderr_bytes -= len(self._stderr_tail.popleft())
        return True


async def spawn(
    name: str,
    argv: Sequence[str],
    *,
    record: Recorder,
    program: str = "",
    pass_fds: Mapping[int, int] | Sequence[int] = (),
    env: Mapping[str, str] | None = None,
    cwd: str = "/",
    stdin: int | None = None,
    stdout: int | None = None,
    stderr: int | None = None,
    merge_output: bool = False,
    death_signal: int = signal.SIGKILL,
    user: Account | None = None,
    join: Sequence[int] = (),
    unshare: int = 0,
    rlimits: Mapping[int, tuple[int, int]] | None = None,
    no_new_privileges: bool = False,
) -> Child:
    """Start `argv` and return once the program is executing.

    Args:
        name: for the record and for messages.
        record: called with the child's identity before the program starts; if it raises, the
            program never runs and the error is passed on.
        program: the path of what is executed; argv[0] unless given.
        pass_fds: descriptors for the child, {number there: number here} or numbers to keep. They
            stay open here and stay the caller's.
        env: the whole environment; None gives PATH and LANG only.
        stdin, stdout: descriptors; None is /dev/null.
        stderr: a descriptor; None keeps a bounded tail in `Child.stderr_tail`.
        merge_output: stdout goes where stderr goes, into the tail.
        user: whom to become; capabilities go with root.
        join: open namespaces to enter, before any of its own are made; needs root.
        unshare: CLONE_NEW* flags of namespaces the child gets of its own; needs root.
        rlimits: soft and hard limits by RLIMIT number. Core dumps are always off.

    Cancellation: safe; a child that was made is killed and reaped.

    Raises:
        SpawnFailed: fork failed or the program cannot be executed (path, errno).
    """
    plan = child_exec.ExecPlan(
        program=program or argv[0],
        argv=list(argv),
        env=dict(env) if env is not None else child_exec.DEFAULT_ENV,
        cwd=cwd,
        stdio=(stdin, stdout, stderr),
        merge_output=merge_output,
        fds=dict(pass_fds if isinstance(pass_fds, Mapping) else {fd: fd for fd in pass_fds}),
        limits={resource.RLIMIT_CORE: (0, 0), **(rlimits or {})},
        user=user,
        join=tuple(join),
        unshare=unshare,
        death_signal=death_signal,
        no_new_privileges=no_new_privileges,
    )
    return await _start(name, plan, record)


async def _start(name: str, plan: child_exec.ExecPlan, record: Recorder) -> Child:
    if _thread.get_native_id() != os.getpid():
        raise RuntimeError("spawn() must be called by the main thread")
    with child_exec.Pipes(keep_stderr=plan.stdio[2] is None) as pipes:
        child = _fork(name, plan, pipes)
        try:
            record(ChildRecord(name=name, pid=child.pid, start_time=child.start_time))
            # A child that was killed at the gate is reported by its exit like any other.
            with contextlib.suppress(BrokenPipeError):
                os.write(pipes.gate_write, b"g")
            await _wait_executed(plan.program, pipes)
        except BaseException:
            await child.aclose()
            raise
        return child


def _fork(name: str, plan: child_exec.ExecPlan, pipes: child_exec.Pipes) -> Child:
    child_exec.prepare()
    # Blocked until the child has put back the default handlers: one of ours run there would write
    # into our own wakeup descriptor.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            child_exec.become(plan, pipes, parent)
    except OSError as error:
        raise SpawnFailed(plan.program, "fork", error.errno or errno.EAGAIN) from error
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    pidfd = -1
    try:
        pidfd = os.pidfd_open(pid)
        start_time = start_time_of(pid)
    except OSError as error:
        # The gate is still closed: when `pipes` goes, the child ends by itself.
        pipes.close_gate()
        os.waitpid(pid, 0)
        if pidfd >= 0:
            os.close(pidfd)
        raise SpawnFailed(plan.program, "pidfd_open", error.errno or errno.EMFILE) from error
    pipes.close_child_ends()
    record = ChildRecord(name=name, pid=pid, start_time=start_time)
    return Child(name, record, pidfd, pipes.take_stderr_read())


def start_time_of(pid: int) -> int:
    """Field 22 of /proc/<pid>/stat. Source: proc(5). Raises OSError when there is no such process.

    The command name in field 2 may hold blanks and parentheses, so counting starts behind its end.
    """
    with open(f"/proc/{pid}/stat", "rb") as stream:
        return int(stream.read().rpartition(b")")[2].split()[19])


async def _wait_executed(program: str, pipes: child_exec.Pipes) -> None:
    with trio.move_on_after(EXEC_DEADLINE_S) as scope:
        await trio.lowlevel.wait_readable(pipes.status_read)
    if scope.cancelled_caught:
        raise SpawnFailed(program, "exec", errno.ETIMEDOUT)
    # Close-on-exec ends the pipe: nothing in it means that the program runs.
    report = os.read(pipes.status_read, 256)
    if report:
        stage, _, code = report.decode("ascii", "replace").partition(" ")
        raise SpawnFailed(program, stage, int(code or errno.EIO))
