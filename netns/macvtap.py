"""Opens the character device of a macvtap, inside of its namespace.

Its node in /dev, if the host has one at all, is the host's. The device number is told by sysfs
only, and only by one that was mounted in the namespace: so the helper process mounts its own, in a
mount namespace that ends with it.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import stat
import struct
from typing import Final

from netns.inside import WorkFailed

# Source: linux/if_tun.h, linux/sched.h, linux/mount.h
_TUNSETIFF: Final = 0x4004_54CA
_TUNSETVNETHDRSZ: Final = 0x4004_54D8
_IFF_TAP_NO_PI_VNET_HDR: Final = 0x0002 | 0x1000 | 0x4000
_IFF_MULTI_QUEUE: Final = 0x0100
_CLONE_NEWNS: Final = 0x0002_0000
_MS_REC_PRIVATE: Final = 0x4000 | (1 << 18)
_VNET_HEADER_BYTES: Final = 12
_IFREQ: Final = struct.Struct("=16sH22x")
_SYS: Final = "/sys"
_SCRATCH: Final = "/tmp"


def enter_own_mounts() -> None:
    """Give the process a sysfs of its network namespace, and a directory for device nodes.

    For helper processes: there is no way back.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    _check(libc.unshare(_CLONE_NEWNS), "unshare the mount namespace")
    _check(libc.mount(None, b"/", None, _MS_REC_PRIVATE, None), "make mounts private")
    _check(libc.mount(b"sysfs", _SYS.encode(), b"sysfs", 0, None), "mount sysfs")
    _check(libc.mount(b"tmpfs", _SCRATCH.encode(), b"tmpfs", 0, None), "mount tmpfs")


def open_macvtap(name: str, queues: int) -> list[int]:
    """Open the macvtap `name` once a queue, after `enter_own_mounts`.

    Raises:
        OSError: there is no such macvtap, or it has all its queues.
    """
    index = socket.if_nametoindex(name)
    with open(f"{_SYS}/class/net/{name}/tap{index}/dev", encoding="ascii") as number:
        major, minor = (int(part) for part in number.read().split(":"))
    node = f"{_SCRATCH}/{name}"
    os.mknod(node, stat.S_IFCHR | 0o600, os.makedev(major, minor))
    flags = _IFF_TAP_NO_PI_VNET_HDR | (_IFF_MULTI_QUEUE if queues > 1 else 0)
    fds: list[int] = []
    for _ in range(queues):
        fd = os.open(node, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        fcntl.ioctl(fd, _TUNSETIFF, _IFREQ.pack(name.encode(), flags))
        fcntl.ioctl(fd, _TUNSETVNETHDRSZ, struct.pack("=i", _VNET_HEADER_BYTES))
        fds.append(fd)
    return fds


def _check(result: int, operation: str) -> None:
    if result != 0:
        raise WorkFailed(operation, ctypes.get_errno())
