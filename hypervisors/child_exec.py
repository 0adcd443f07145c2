"""The part of `child.py` that runs between fork and exec.

Everything here is called in the forked child (`become`) or prepares for it: plain system calls in
a fixed order, no trio, no allocation of anything that outlives the exec.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import resource
import signal
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NoReturn, Self

if TYPE_CHECKING:
    from types import TracebackType

DEFAULT_ENV: Final = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}
# Source: linux/prctl.h
PR_SET_PDEATHSIG: Final = 1
PR_SET_NO_NEW_PRIVS: Final = 38

_libc: ctypes.CDLL | None = None


def prepare() -> None:
    """Load libc's functions before forking: the linker's lock must not be taken in a child."""
    global _libc
    if _libc is None:
        _libc = ctypes.CDLL(None, use_errno=True)
        _ = _libc.prctl, _libc.unshare, _libc.setns


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """Whom a child becomes: it keeps no other group than these."""

    uid: int
    gid: int
    groups: tuple[int, ...] = ()


@dataclass(slots=True, kw_only=True)
class ExecPlan:
    """What the child does with itself before it becomes the program."""

    program: str
    argv: list[str]
    env: dict[str, str]
    cwd: str
    stdio: tuple[int | None, int | None, int | None]
    merge_output: bool
    fds: dict[int, int]
    limits: dict[int, tuple[int, int]]
    user: Account | None
    join: tuple[int, ...]
    unshare: int
    death_signal: int
    no_new_privileges: bool


class Pipes:
    """The pipes between parent and child; closes what is left of them on exit.

    gate    parent to child: one byte opens it, end of file means that the parent is gone
    status  child to parent: a failed stage and its errno; end of file means exec succeeded
    stderr  child to parent, when the tail is kept
    """

    def __init__(self, *, keep_stderr: bool) -> None:
        self._open: set[int] = set()
        try:
            self.gate_read, self.gate_write = self._pipe()
            self.status_read, self.status_write = self._pipe()
            self.stderr_read, self.stderr_write = self._pipe() if keep_stderr else (-1, -1)
        except OSError:
            self.__exit__(None, None, None)
            raise
        if keep_stderr:
            os.set_blocking(self.stderr_read, False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for fd in tuple(self._open):
            self._close(fd)

    def close_child_ends(self) -> None:
        """In the parent, after fork: only then does end of file mean anything."""
        for fd in (self.gate_read, self.status_write, self.stderr_write):
            self._close(fd)

    def close_gate(self) -> None:
        """Tell a child that waits at the gate to go away."""
        self._close(self.gate_write)

    def take_stderr_read(self) -> int | None:
        """Hand the reading end over to the caller."""
        if self.stderr_read < 0:
            return None
        self._open.discard(self.stderr_read)
        return self.stderr_read

    def _pipe(self) -> tuple[int, int]:
        ends = os.pipe2(os.O_CLOEXEC)
        self._open.update(ends)
        return ends

    def _close(self, fd: int) -> None:
        if fd in self._open:
            self._open.discard(fd)
            os.close(fd)


def become(plan: ExecPlan, pipes: Pipes, parent: int) -> NoReturn:
    """Turn the forked child into the program, or report the failed stage and end. Never returns."""
    stage = "signals"
    status = pipes.status_write
    try:
        signal.set_wakeup_fd(-1)
        for number in signal.valid_signals():
            if number not in (signal.SIGKILL, signal.SIGSTOP):
                signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        stage = "death signal"
        _prctl(PR_SET_PDEATHSIG, plan.death_signal)
        stage = "gate"
        # The writing end is ours too until closed; with it open we would never see the parent die.
        os.close(pipes.gate_write)
        if not os.read(pipes.gate_read, 1):
            os._exit(127)
        stage = "session"
        os.setsid()
        stage = "namespaces"
        for namespace in plan.join:
            _check(_c().setns(namespace, 0))
        stage = "descriptors"
        status = _arrange_fds(plan, pipes)
        stage = "limits"
        for kind, limit in plan.limits.items():
            resource.setrlimit(kind, limit)
        stage = "directory"
        os.chdir(plan.cwd)
        stage = "namespaces"
        if plan.unshare:
            _check(_c().unshare(plan.unshare))
        stage = "user"
        _drop_privileges(plan)
        if os.getppid() != parent:
            # The parent opened the gate and died while no death signal was set.
            os._exit(127)
        stage = "exec"
        os.execve(plan.program, plan.argv, plan.env)
    except OSError as error:
        _report(status, stage, error.errno or errno.EIO)
    except BaseException:
        _report(status, stage, errno.EINVAL)
    finally:
        os._exit(127)


def leave_parent(*, keep: int) -> None:
    """In a forked child that works instead of executing: die with the parent, hold nothing of it.

    Only descriptor `keep` and the standard ones stay open.
    """
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if keep > 3:
        os.closerange(3, keep)
    os.closerange(keep + 1, 0x7FFFFFFF)


def _arrange_fds(plan: ExecPlan, pipes: Pipes) -> int:
    """Put every descriptor on its number and close the rest; returns the status pipe's new number.

    Sources are first copied above all targets, so that no move overwrites a later one's source.
    """
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    wanted = {number: null if fd is None else fd for number, fd in enumerate(plan.stdio)}
    if pipes.stderr_write >= 0:
        wanted[2] = pipes.stderr_write
        if plan.merge_output:
            wanted[1] = pipes.stderr_write
    wanted.update(plan.fds)
    above = max(wanted) + 1
    status = fcntl.fcntl(pipes.status_write, fcntl.F_DUPFD_CLOEXEC, above)
    copies = {
        target: fcntl.fcntl(source, fcntl.F_DUPFD_CLOEXEC, above)
        for target, source in wanted.items()
    }
    for target, copy in copies.items():
        os.dup2(copy, target, inheritable=True)
    low = 0
    for number in sorted([*wanted, status]):
        if low < number:
            # Guarded: CPython turns an empty range into close_range(2) with last = ~0U, everything.
            os.closerange(low, number)
        low = number + 1
    # The highest number there is, not RLIMIT_NOFILE: that may have been lowered below open ones.
    os.closerange(low, 0x7FFFFFFF)
    return status


def _drop_privileges(plan: ExecPlan) -> None:
    if plan.user is not None:
        uid, gid = plan.user.uid, plan.user.gid
        os.setgroups(plan.user.groups)
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
        # Changing credentials clears the death signal. Source: prctl(2) PR_SET_PDEATHSIG.
        _prctl(PR_SET_PDEATHSIG, plan.death_signal)
    if plan.no_new_privileges:
        _prctl(PR_SET_NO_NEW_PRIVS, 1)


def _prctl(option: int, value: int) -> None:
    _check(_c().prctl(option, ctypes.c_ulong(value), 0, 0, 0))


def _c() -> ctypes.CDLL:
    assert _libc is not None, "prepare() comes first"
    return _libc


def _check(result: int) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def _report(status: int, stage: str, code: int) -> None:
    os.write(status, f"{stage.replace(' ', '-')} {code}".encode("ascii"))
