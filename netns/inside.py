"""Does a small piece of work inside of another network namespace, in a child process.

`setns` would move the calling thread, and a failure on the way back would leave the shim with its
sockets in the pod's network. A forked child moves instead, works, hands its file descriptors over a
socket and ends; the caller never leaves its namespace.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Final, NoReturn

import trio

from netns.errors import HelperLost, KernelRefused, NamespaceGone

# Each piece of work is a handful of system calls. They queue for the kernel's one network lock,
# which mass creation of pods has been seen to hold for seconds.
WORK_S: Final = 10.0

_EXIT_S: Final = 1.0

MAX_FDS: Final = 64

# Source: linux/sched.h
_CLONE_NEWNET: Final = 0x4000_0000

# What the child sends: errno (0: done) and the name of the operation that failed.
_ANSWER: Final = struct.Struct("=i200p")

_FD: Final = struct.Struct("=i")

Work = Callable[[], list[int]]


class WorkFailed(Exception):
    """Raised by work in the child: `operation` failed with `errno`."""

    def __init__(self, operation: str, errno: int) -> None:
        super().__init__(operation, errno)
        self.operation = operation
        self.errno = errno


async def run_inside(
    namespace: Path, name: str, work: Work, *, timeout_s: float = WORK_S
) -> list[int]:
    """Run `work` in a child inside of `namespace` and return the file descriptors it returns.

    `work` may only make system calls: it runs between fork and exit, where the interpreter's other
    users are gone. The descriptors are close-on-exec and the caller's. Safe to cancel: the child
    and what it has made are gone then.

    Raises:
        NamespaceGone: `namespace` can't be opened or isn't a network namespace.
        KernelRefused: `work` raised WorkFailed or OSError.
        HelperLost: the child was killed, or had no answer within `timeout_s`.
    """
    try:
        namespace_fd = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise NamespaceGone(os.fspath(namespace), error.errno or 0) from error
    try:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, theirs:
            pid = os.fork()
            if pid == 0:
                _child(namespace_fd, theirs, work)
            theirs.close()
            code, operation, fds = await _reap(pid, ours, name, timeout_s)
    finally:
        os.close(namespace_fd)
    if operation == "setns" and code:
        raise NamespaceGone(os.fspath(namespace), code)
    if code:
        raise KernelRefused(operation, code)
    return fds


def _child(namespace_fd: int, sock: socket.socket, work: Work) -> NoReturn:
    # No exception and no exit handler of the parent's may run here, whatever happens.
    code, operation, fds = 0, "", list[int]()
    try:
        _die_with_parent()
        operation = "setns"
        _setns(namespace_fd)
        operation = "work"
        fds = work()
    except WorkFailed as error:
        code, operation = error.errno, error.operation
    except OSError as error:
        code = error.errno or errno.EIO
    except BaseException:
        code = errno.EIO
    try:
        socket.send_fds(sock, [_ANSWER.pack(code, operation.encode())], fds)
    finally:
        os._exit(0)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _setns(fd: int) -> None:
    # os.setns exists from Python 3.12 on.
    if _libc().setns(fd, _CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "setns")


def _die_with_parent() -> None:
    # Source: linux/prctl.h PR_SET_PDEATHSIG = 1
    _libc().prctl(1, signal.SIGKILL, 0, 0, 0)


async def _reap(
    pid: int, sock: socket.socket, name: str, timeout_s: float
) -> tuple[int, str, list[int]]:
    """Take the child's answer and its exit status; kill it if it has no answer in time."""
    pidfd = os.pidfd_open(pid)
    try:
        with trio.move_on_after(timeout_s):
            await trio.lowlevel.wait_readable(sock)
            return _receive(sock, name)
        raise HelperLost(name, f"had no answer within {timeout_s:g} s")
    finally:
        # Having answered it ends by itself; killing it makes that true for every other way here.
        # It is dead at once unless it hangs inside of the kernel; then a zombie stays until we end.
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        with trio.move_on_after(_EXIT_S, shield=True):
            await trio.lowlevel.wait_readable(pidfd)
        _collect(pidfd)


def _collect(pidfd: int) -> None:
    os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)
    os.close(pidfd)


def _receive(sock: socket.socket, name: str) -> tuple[int, str, list[int]]:
    # Not socket.recv_fds: Python 3.11 drops its flags, and with them close-on-exec.
    room = socket.CMSG_LEN(MAX_FDS * _FD.size)
    data, control, flags, _ = sock.recvmsg(_ANSWER.size, room, socket.MSG_CMSG_CLOEXEC)
    fds = [fd for _, _, raw in control for (fd,) in _FD.iter_unpack(raw)]
    if len(data) != _ANSWER.size or flags & socket.MSG_CTRUNC:
        for fd in fds:
            os.close(fd)
        raise HelperLost(name, "died")
    code, operation = _ANSWER.unpack(data)
    return code, operation.decode(), fds
