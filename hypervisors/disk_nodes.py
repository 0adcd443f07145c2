"""Disks for a VMM that opens them by path, and may open nothing of the host's.

A disk gets a device node in a directory that the VMM's user may pass; an image file becomes a loop
device first. The directory is a file system of its own, because nodes mean nothing where the host's
/run lies. A node exists only while the VMM opens it.

Directory and nodes stay root's, and are reached by a descriptor: a VMM that its guest has taken
over may own what is around them. It can neither put a link in a node's place, which would be given
to it whatever it leads to, nor keep a node, nor open one for writing that it was shown to read.

The VMM's own lock on a disk would be on that node: what keeps other machines away is the lease.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import stat
import struct
from typing import TYPE_CHECKING, Final

from .errors import PreconditionFailed

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from .child_exec import Account
    from .disk_lease import Lease
    from .machine import BlockDevice

# Source: sys/mount.h
_MS_NOSUID, _MS_NOEXEC = 2, 8
_MNT_DETACH, _UMOUNT_NOFOLLOW = 2, 8
# Source: linux/loop.h: struct loop_config, of which loop_info64 is the larger part.
_LOOP_CTL_GET_FREE: Final = 0x4C82
_LOOP_CONFIGURE: Final = 0x4C0A
_LOOP_MAJOR: Final = 7
_LO_FLAGS_READ_ONLY: Final = 1
_LO_FLAGS_AUTOCLEAR: Final = 4
_LOOP_CONFIG: Final = struct.Struct("=II 5Q 4I 64s 64s 32s 2Q 8Q")
# Another program may take the free device first.
_LOOP_ATTEMPTS: Final = 8
_NODES: Final = 64
# The VMM's group may look a node up, nothing else.
_MODE: Final = 0o710


class DiskNodes:
    """The nodes of one VMM; `mount` or `make` their directory before the VMM runs."""

    def __init__(self, directory: Path, account: Account | None) -> None:
        self._directory = directory
        self._account = account
        self._fd = -1

    def mount(self) -> None:
        """Make the directory, a file system of its own. Undone by `unmount`. Raises OSError."""
        os.mkdir(self._directory, 0o700)
        options = f"mode={_MODE:o},size=64k,nr_inodes={_NODES}"
        libc = ctypes.CDLL(None, use_errno=True)
        target = os.fsencode(self._directory)
        flags = ctypes.c_ulong(_MS_NOSUID | _MS_NOEXEC)
        if libc.mount(b"disks", target, b"tmpfs", flags, options.encode()) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), str(self._directory))
        try:
            self._open()
        except OSError:
            self.unmount()
            raise

    def make(self) -> None:
        """Make the directory where nodes mean something. Undone by `close`. Raises OSError."""
        os.mkdir(self._directory, 0o700)
        self._open()

    def unmount(self) -> None:
        """Undo `mount`; what is not mounted is left as it is."""
        self.close()
        libc = ctypes.CDLL(None, use_errno=True)
        libc.umount2(os.fsencode(self._directory), _MNT_DETACH | _UMOUNT_NOFOLLOW)

    def close(self) -> None:
        """Let go of the directory. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _open(self) -> None:
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        self._fd = os.open(self._directory, flags)
        os.fchmod(self._fd, _MODE)
        if self._account is not None:
            os.fchown(self._fd, -1, self._account.gid)

    def put(self, name: str, content: bytes) -> None:
        """Make a file that the VMM may write to, in as little room as there is. Raises OSError."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        fd = os.open(name, flags, 0o600, dir_fd=self._fd)
        with os.fdopen(fd, "wb") as stream:
            stream.write(content)
            if self._account is not None:
                os.fchown(fd, -1, self._account.gid)
            os.fchmod(fd, 0o660)

    @contextlib.contextmanager
    def exposed(self, device: BlockDevice, lease: Lease) -> Iterator[str]:
        """Show a leased disk to the VMM as a node, whose name this gives, while the block lasts.

        Raises:
            PreconditionFailed: no loop device for an image file.
        """
        status = os.fstat(lease.fd)
        with contextlib.ExitStack() as stack:
            number = status.st_rdev
            if not stat.S_ISBLK(status.st_mode):
                number = stack.enter_context(_loop_device(device, lease.fd))
            os.mknod(device.id, stat.S_IFBLK | 0o400, number, dir_fd=self._fd)
            stack.callback(os.unlink, device.id, dir_fd=self._fd)
            if self._account is not None:
                os.chown(device.id, -1, self._account.gid, dir_fd=self._fd, follow_symlinks=False)
            os.chmod(device.id, 0o440 if device.read_only else 0o660, dir_fd=self._fd)
            yield device.id


@contextlib.contextmanager
def _loop_device(device: BlockDevice, fd: int) -> Iterator[int]:
    """A loop device over an open image; it goes with its last user, who may be the VMM."""
    try:
        loop, number = _configure_loop(fd, read_only=device.read_only)
    except OSError as error:
        raise PreconditionFailed(
            f"block device {device.id}",
            path=device.path,
            why="no loop device can be made of it for the VMM's user",
            errno=error.errno,
            fix="load the module loop, or use a block device",
        ) from error
    try:
        yield number
    finally:
        os.close(loop)


def _configure_loop(fd: int, *, read_only: bool) -> tuple[int, int]:
    flags = _LO_FLAGS_AUTOCLEAR | (_LO_FLAGS_READ_ONLY if read_only else 0)
    info = (*(0,) * 5, 0, 0, 0, flags, b"", b"", b"", 0, 0)
    config = _LOOP_CONFIG.pack(fd, 0, *info, *(0,) * 8)
    control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    try:
        for attempt in range(_LOOP_ATTEMPTS):
            number = fcntl.ioctl(control, _LOOP_CTL_GET_FREE)
            mode = os.O_RDONLY if read_only else os.O_RDWR
            loop = os.open(f"/dev/loop{number}", mode | os.O_CLOEXEC)
            try:
                fcntl.ioctl(loop, _LOOP_CONFIGURE, config)
            except OSError as error:
                os.close(loop)
                if error.errno != errno.EBUSY or attempt == _LOOP_ATTEMPTS - 1:
                    raise
            else:
                return loop, os.makedev(_LOOP_MAJOR, number)
    finally:
        os.close(control)
    raise AssertionError("unreachable")
