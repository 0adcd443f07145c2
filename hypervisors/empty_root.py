"""Takes the host's files away from a VMM that runs: its root becomes an empty directory.

Empty but for /dev/null: QEMU opens that when it locks its first image, and if it can't, it locks
none, so that two machines could write to one disk.

A VMM has opened, or was handed, all it needs when it answers for the first time. From then on a
guest that breaks out of it finds no file, and a client that takes /proc/<pid>/root of the task's
pid for the container's files (`nerdctl cp`) does not read or write the host's.

pivot_root moves the root of every process that has the namespace's old one, so it can be done to
the VMM from outside, by a process that has entered its mount namespace. That is a forked child: the
caller must not go there. A VMM that opens disks by name while it runs keeps the root, which then
cannot be written by any way through its process.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import stat
import struct
from typing import TYPE_CHECKING, Final, NoReturn

import trio

from . import child_exec
from .errors import LaunchFailed

if TYPE_CHECKING:
    from collections.abc import Callable

    Step = tuple[str, Callable[[], int]]
    Steps = Callable[[ctypes.CDLL], tuple[Step, ...]]

# A handful of system calls.
DEADLINE_S: Final = 5.0

# Source: linux/sched.h, linux/mount.h, sys/mount.h, asm/unistd_64.h
CLONE_NEWNS: Final = 0x00020000
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC = 1, 2, 4, 8
_MS_REMOUNT, _MS_BIND, _MS_REC = 1 << 5, 1 << 12, 1 << 14
_MS_PRIVATE, _MS_SLAVE = 1 << 18, 1 << 19
_SYS_MOUNT_SETATTR: Final = 442
_MOUNT_ATTR_RDONLY: Final = 1
_AT_FDCWD: Final = -100
_AT_RECURSIVE: Final = 0x8000
_MNT_DETACH: Final = 2
_SYS_PIVOT_ROOT: Final = 155
# Exists wherever a VMM runs; only hidden for as long as it takes.
_PLACE: Final = b"/proc"
_OPTIONS: Final = b"size=4k,mode=555"
_NULL: Final = b"/dev/null"


async def empty_root(name: str, pid: int) -> None:
    """Give the VMM `pid`, which has a mount namespace of its own, an empty root. Cancelling waits.

    Raises:
        LaunchFailed: it can still see the host's files.
    """
    await _change_root(name, pid, _pivot)


async def read_only_root(name: str, pid: int) -> None:
    """Make every file system read-only for the VMM `pid`, as `empty_root`; devices stay writable.

    What is unmounted on the host goes there, too.

    Raises:
        LaunchFailed: it can still write the host's files.
    """
    await _change_root(name, pid, _forbid_writing)


async def _change_root(name: str, pid: int, steps: Steps) -> None:
    child_exec.prepare()
    answer, far = os.pipe2(os.O_CLOEXEC)
    try:
        try:
            helper = os.fork()
            if helper == 0:
                _work_and_exit(pid, far, steps)
        finally:
            os.close(far)
        said = await collect(helper, answer)
    finally:
        os.close(answer)
    if said != b"done":
        stage, _, code = said.decode("ascii", "replace").partition(" ")
        why = f"{stage}: {os.strerror(int(code))}" if code else "the helper process died"
        raise LaunchFailed(name, f"could not be kept from the host's files ({why})", ())


async def collect(helper: int, answer: int) -> bytes:
    """What a forked child has written to the pipe `answer` before its end, which is enforced.

    Shielded: the child is reaped in any case.
    """
    pidfd = os.pidfd_open(helper)
    try:
        with trio.move_on_after(DEADLINE_S, shield=True):
            await trio.lowlevel.wait_readable(pidfd)
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        with trio.move_on_after(DEADLINE_S, shield=True):
            await trio.lowlevel.wait_readable(pidfd)
        _reap(pidfd)
        os.set_blocking(answer, False)
        try:
            return os.read(answer, 64)
        except BlockingIOError:
            return b""
    finally:
        os.close(pidfd)


def _reap(pidfd: int) -> None:
    os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)


def _work_and_exit(pid: int, answer: int, steps: Steps) -> NoReturn:
    said = b""
    try:
        child_exec.leave_parent(keep=answer)
        said = _work(pid, ctypes.CDLL(None, use_errno=True), steps)
    finally:
        os.write(answer, said)
        os._exit(0)


def _work(pid: int, libc: ctypes.CDLL, steps: Steps) -> bytes:
    path = f"/proc/{pid}/ns/mnt"
    try:
        namespace = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        if os.fstat(namespace).st_ino == os.stat("/proc/self/ns/mnt").st_ino:
            return f"namespace {errno.EEXIST}".encode()  # ours: nothing in it may be touched
    except (FileNotFoundError, ProcessLookupError):
        return b"done"  # dead, which others tell
    except OSError as error:
        return f"namespace {error.errno}".encode()
    enter: Step = ("setns", lambda: libc.setns(namespace, CLONE_NEWNS))
    for stage, step in (enter, *steps(libc)):
        if step() != 0:
            return f"{stage} {ctypes.get_errno()}".encode()
    return b"done"


def _pivot(libc: ctypes.CDLL) -> tuple[Step, ...]:
    flags = _MS_NOSUID | _MS_NODEV | _MS_NOEXEC
    sealed = _MS_REMOUNT | _MS_RDONLY | flags
    null = _PLACE + _NULL
    return (
        ("private", lambda: libc.mount(None, b"/", None, _MS_REC | _MS_PRIVATE, None)),
        ("mount", lambda: libc.mount(b"none", _PLACE, b"tmpfs", flags, _OPTIONS)),
        ("mkdir", lambda: libc.mkdir(os.path.dirname(null), 0o755)),
        ("mknod", lambda: libc.mknod(null, stat.S_IFREG, 0)),
        ("bind", lambda: libc.mount(_NULL, null, None, _MS_BIND, None)),
        ("seal", lambda: libc.mount(b"none", _PLACE, None, sealed, _OPTIONS)),
        ("chdir", lambda: libc.chdir(_PLACE)),
        ("pivot_root", lambda: libc.syscall(_SYS_PIVOT_ROOT, b".", b".")),
        ("umount", lambda: libc.umount2(b".", _MNT_DETACH)),
    )


def _forbid_writing(libc: ctypes.CDLL) -> tuple[Step, ...]:
    attributes = struct.pack("4Q", _MOUNT_ATTR_RDONLY, 0, 0, 0)

    def set_read_only() -> int:
        where = (_AT_FDCWD, b"/", _AT_RECURSIVE)
        result: int = libc.syscall(_SYS_MOUNT_SETATTR, *where, attributes, len(attributes))
        return result

    return (
        ("slave", lambda: libc.mount(None, b"/", None, _MS_REC | _MS_SLAVE, None)),
        ("mount_setattr", set_read_only),
    )
