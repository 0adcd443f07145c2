"""Does a small piece of work inside of another network namespace, in a child process.

`setns` would move the calling thread, and a failure on the way back would leave the shim with its
sockets in the pod's network. A forked child moves instead, works, hands bytes and file descriptors
over a socket and ends; the caller never leaves its namespace, and what the child imports never
becomes the caller's memory.

The answer is one header packet, with the descriptors, and then its bytes in packets.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import select
import signal
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, NamedTuple, NoReturn

import trio

from netns.errors import HelperLost, KernelRefused, NamespaceGone

# Each piece of work is a handful of system calls. They queue for the kernel's one network lock,
# which mass creation of pods has been seen to hold for seconds; an emulated host is slow, too.
WORK_S: Final = 30.0

_EXIT_S: Final = 1.0

MAX_FDS: Final = 128

# Ten thousand routes are 1.2 MB of netlink; more is no pod.
MAX_BYTES: Final = 16 << 20
_PACKET_BYTES: Final = 32 << 10

# Source: linux/sched.h
_CLONE_NEWNET: Final = 0x4000_0000

# errno (0: done), length of the bytes that follow, the operation that failed, what else is known.
_ANSWER: Final = struct.Struct("=iI200p255p")

_FD: Final = struct.Struct("=i")


class Outcome(NamedTuple):
    """What work hands back: bytes, and descriptors that become the caller's."""

    payload: bytes = b""
    fds: Sequence[int] = ()


Work = Callable[[], Outcome]


class WorkFailed(Exception):
    """Raised by work in the child: `operation` failed with `errno`."""

    def __init__(self, operation: str, errno: int, detail: str = "") -> None:
        super().__init__(operation, errno, detail)
        self.operation = operation
        self.errno = errno
        self.detail = detail


async def run_inside(
    namespace: Path | int, name: str, work: Work, *, timeout_s: float = WORK_S
) -> Outcome:
    """Run `work` in a child inside of `namespace` (a path, or an open descriptor of it).

    `work` runs between fork and exit: all descriptors of the caller's but the standard ones are
    closed, its signal handlers are gone. The descriptors of the outcome are close-on-exec and the
    caller's. Safe to cancel: the child and what it has made in descriptors are gone then.

    Raises:
        NamespaceGone: `namespace` can't be opened or isn't a network namespace.
        KernelRefused: `work` raised WorkFailed or OSError.
        HelperLost: no child was to be had, it was killed, or had no answer within `timeout_s`.
    """
    with _child(namespace, name, work) as (ours, pidfd):
        receiver = _Receiver(ours, name)
        try:
            with trio.move_on_after(timeout_s):
                while not receiver.is_complete:
                    await trio.lowlevel.wait_readable(ours)
                    receiver.receive()
                return receiver.outcome(namespace)
            raise _too_late(name, timeout_s)
        except BaseException:
            receiver.discard()
            raise
        finally:
            # Having answered it ends by itself; killing it makes that true for every other way
            # here. It is dead at once unless it hangs inside of the kernel; then a zombie stays
            # until we end.
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            with trio.move_on_after(_EXIT_S, shield=True):
                await trio.lowlevel.wait_readable(pidfd)


def run_inside_blocking(
    namespace: Path | int, name: str, work: Work, *, timeout_s: float = WORK_S
) -> Outcome:
    """Do as `run_inside`, for a caller without an event loop."""
    with _child(namespace, name, work) as (ours, pidfd):
        receiver = _Receiver(ours, name)
        try:
            while not receiver.is_complete:
                if not select.select([ours], [], [], timeout_s)[0]:
                    raise _too_late(name, timeout_s)
                receiver.receive()
            return receiver.outcome(namespace)
        except BaseException:
            receiver.discard()
            raise
        finally:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            select.select([pidfd], [], [], _EXIT_S)


@contextmanager
def _child(namespace: Path | int, name: str, work: Work) -> Iterator[tuple[socket.socket, int]]:
    """Fork; give the socket its answer comes on and its pidfd; collect it, dead or not."""
    try:
        namespace_fd = _opened(namespace)
    except OSError as error:
        raise NamespaceGone(str(namespace), error.errno or 0) from error
    try:
        _, pidfd, ours = fork_helper(
            name, lambda theirs: _work_and_exit(namespace_fd, theirs, work)
        )
        with ours:
            try:
                yield ours, pidfd
            finally:
                os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)
                os.close(pidfd)
    finally:
        os.close(namespace_fd)


def fork_helper(
    name: str, child: Callable[[socket.socket], NoReturn]
) -> tuple[int, int, socket.socket]:
    """Fork into `child`, which gets its end of a socket; return pid, pidfd and the other end.

    The shim counts against the limit of processes of the pod's cgroup: that there is no process to
    be had is the pod's trouble, and no defect.

    Raises:
        HelperLost: the kernel gave no process, socket or descriptor. Nothing is left then.
    """
    try:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    except OSError as error:
        raise _not_started(name, error) from error
    try:
        with theirs:
            pid = _forked(name)
            if pid == 0:
                child(theirs)
        return pid, _pidfd_of(name, pid), ours
    except BaseException:
        ours.close()
        raise


def _forked(name: str) -> int:
    try:
        return os.fork()
    except OSError as error:
        raise _not_started(name, error) from error


def _pidfd_of(name: str, pid: int) -> int:
    try:
        return os.pidfd_open(pid)
    except OSError as error:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)  # it has hardly begun: nothing in the kernel holds it yet
        raise _not_started(name, error) from error


def _opened(namespace: Path | int) -> int:
    if isinstance(namespace, int):
        return os.dup(namespace)
    return os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)


def _work_and_exit(namespace_fd: int, sock: socket.socket, work: Work) -> NoReturn:
    # No exception and no exit handler of the parent's may run here, whatever happens.
    code, operation, detail, outcome = 0, "setns", "", Outcome()
    try:
        leave_parent(keep=(namespace_fd, sock.fileno()))
        _setns(namespace_fd)
        operation = "work"
        outcome = work()
    except WorkFailed as error:
        code, operation, detail = error.errno, error.operation, error.detail
    except OSError as error:
        code, detail = error.errno or errno.EIO, str(error)
    except BaseException as error:
        code, detail = errno.EIO, f"{type(error).__name__}: {error}"
    try:
        payload = outcome.payload
        header = _ANSWER.pack(code, len(payload), operation.encode()[:199], detail.encode()[:254])
        socket.send_fds(sock, [header], outcome.fds)
        for start in range(0, len(payload), _PACKET_BYTES):
            sock.send(payload[start : start + _PACKET_BYTES])
    finally:
        os._exit(0)


def leave_parent(*, keep: Sequence[int]) -> None:
    """In a forked child: die with the parent, hold nothing of it, run none of its handlers.

    Only the descriptors in `keep` and the standard ones stay open.
    """
    # Source: linux/prctl.h PR_SET_PDEATHSIG = 1
    _libc().prctl(1, signal.SIGKILL, 0, 0, 0)
    # A collection would copy the pages of everything the parent has in memory.
    gc.disable()
    with suppress(ValueError):
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
    first = 3
    for kept in sorted(keep):
        os.closerange(first, kept)
        first = kept + 1
    os.closerange(first, os.sysconf("SC_OPEN_MAX"))


def unshare_network() -> None:
    """Put the calling process into a new network namespace.

    Raises:
        OSError: the kernel refused.
    """
    if _libc().unshare(_CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "unshare")


def join_network(path: Path) -> None:
    """Put the calling process into the network namespace at `path`.

    Raises:
        OSError: there is none, or the kernel refused.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    _setns(fd)
    os.close(fd)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _setns(fd: int) -> None:
    # os.setns exists from Python 3.12 on.
    if _libc().setns(fd, _CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "setns")


def _not_started(name: str, error: OSError) -> HelperLost:
    return HelperLost(name, f"could not be started: {error.strerror}")


def _too_late(name: str, timeout_s: float) -> HelperLost:
    return HelperLost(name, f"had no answer within {timeout_s:g} s")


class _Receiver:
    """Puts an answer together from its packets."""

    def __init__(self, sock: socket.socket, name: str) -> None:
        self._sock = sock
        self._name = name
        self._header: tuple[int, int, str, str] | None = None
        self._fds: list[int] = []
        self._payload = bytearray()

    @property
    def is_complete(self) -> bool:
        return self._header is not None and len(self._payload) >= self._header[1]

    def receive(self) -> None:
        """Take the packet that is there.

        Raises:
            HelperLost: there is none, and there will be none.
        """
        if self._header is not None:
            data = self._sock.recv(_PACKET_BYTES)
            if not data:
                raise HelperLost(self._name, "died")
            self._payload += data
            return
        # Not socket.recv_fds: Python 3.11 drops its flags, and with them close-on-exec.
        room = socket.CMSG_LEN(MAX_FDS * _FD.size)
        data, control, flags, _ = self._sock.recvmsg(_ANSWER.size, room, socket.MSG_CMSG_CLOEXEC)
        self._fds = [fd for _, _, raw in control for (fd,) in _FD.iter_unpack(raw)]
        if len(data) != _ANSWER.size or flags & socket.MSG_CTRUNC:
            raise HelperLost(self._name, "died")
        code, length, operation, detail = _ANSWER.unpack(data)
        if length > MAX_BYTES:
            raise HelperLost(self._name, f"answered {length} bytes")
        self._header = (code, length, operation.decode(), detail.decode(errors="replace"))

    def outcome(self, namespace: Path | int) -> Outcome:
        assert self._header is not None
        code, _, operation, detail = self._header
        if operation == "setns" and code:
            raise NamespaceGone(str(namespace), code)
        if code:
            raise KernelRefused(operation, code, detail)
        return Outcome(bytes(self._payload), self._fds)

    def discard(self) -> None:
        for fd in self._fds:
            os.close(fd)
        self._fds = []
