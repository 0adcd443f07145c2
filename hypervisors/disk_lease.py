"""A disk that one machine has, and no other while it writes: ours, whatever its VMM does for locks.

QEMU finds out how to lock by /dev/null, which its empty root has not (empty_root.py); Cloud
Hypervisor would lock a node of its own (disk_nodes.py).
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from . import spec_check
from .errors import PreconditionFailed

if TYPE_CHECKING:
    from .machine import BlockDevice

# Source: linux/fcntl.h; struct flock of x86-64.
_F_OFD_SETLK: Final = 37
_FLOCK: Final = "hhqqi4x"


@dataclass(slots=True)
class Lease:
    """A disk in use by one machine, "file" or "host_device".

    `close` gives it back to others, unless `fd` was passed on: the lock goes with its last copy.
    """

    fd: int
    driver: str

    def close(self) -> None:
        """Let others have it. Idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def lease(device: BlockDevice) -> Lease:
    """Open a disk and keep other machines from it: from writing, when this one only reads.

    Raises:
        PreconditionFailed: as `spec_check.open_block`, or another machine has it.
    """
    fd, driver = spec_check.open_block(device)
    kind = fcntl.F_RDLCK if device.read_only else fcntl.F_WRLCK
    try:
        fcntl.fcntl(fd, _F_OFD_SETLK, struct.pack(_FLOCK, kind, os.SEEK_SET, 0, 0, 0))
    except OSError as error:
        os.close(fd)
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise
        raise PreconditionFailed(
            f"block device {device.id}",
            path=device.path,
            why="in use by another device or machine",
            fix="detach it there first",
        ) from error
    return Lease(fd, driver)
