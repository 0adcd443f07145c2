"""Disks for a VMM that opens them by path, and may open nothing of the host's.

A disk gets a device node in a directory of the VMM's user's own; an image file becomes a loop
device first. The directory is a file system of its own, because nodes mean nothing where the host's
/run lies. A node exists only while the VMM opens it.

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


class DiskNodes:
    """The nodes of one VMM, below a directory that is its user's."""

    def __init__(self, directory: Path, account: Account | None) -> None:
        self._directory = directory
        self._account = account

    def mount(self) -> None:
        """Make the directory. Needs root; undone by `unmount`. Raises OSError."""
        os.mkdir(self._directory, 0o700)
        owner = self._account
        options = f"mode=0700,size=64k,nr_inodes={_NODES}"
        if owner is not None:
            options += f",uid={owner.uid},gid={owner.gid}"
        libc = ctypes.CDLL(None, use_errno=True)
        target = os.fsencode(self._directory)
        flags = ctypes.c_ulong(_MS_NOSUID | _MS_NOEXEC)
        if libc.mount(b"disks", target, b"tmpfs", flags, options.encode()) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), str(self._directory))

    def unmount(self) -> None:
        """Undo `mount`; what is not mounted is left as it is."""
        libc = ctypes.CDLL(None, use_errno=True)
        libc.umount2(os.fsencode(self._directory), _MNT_DETACH | _UMOUNT_NOFOLLOW)

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
            node = self._directory / device.id
            mode = 0o400 if device.read_only else 0o600
            os.mknod(node, stat.S_IFBLK | mode, number)
            stack.callback(os.unlink, node)
            if self._account is not None:
                os.chown(node, self._account.uid, self._account.gid)
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
