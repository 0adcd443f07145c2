"""Pins a pod's network namespace, whatever path it was given by.

A path may be taken away (`ip netns delete`) or name a process that ends (`/proc/<pid>/ns/net`);
an open descriptor keeps the namespace itself.
"""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from typing import Final

from netns.errors import HostNamespace, NamespaceGone

# Source: linux/nsfs.h NS_GET_NSTYPE; linux/sched.h CLONE_NEWNET
_NS_GET_NSTYPE: Final = 0xB703
_CLONE_NEWNET: Final = 0x4000_0000

# The shim's own, and the host's if the shim should live in another.
_NEVER: Final = ("/proc/self/ns/net", "/proc/1/ns/net")


class Namespace:
    """An open network namespace. `device` and `inode` identify it for as long as it lives."""

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self.fd = fd
        found = os.fstat(fd)
        self.device = found.st_dev
        self.inode = found.st_ino

    @classmethod
    def open(cls, path: Path) -> Namespace:
        """Pin the namespace at `path`; the caller closes it.

        Raises:
            NamespaceGone: there is none.
            HostNamespace: it is the host's or the shim's own.
        """
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise NamespaceGone(os.fspath(path), error.errno or 0) from error
        try:
            _check(fd, path)
            return cls(path, fd)
        except BaseException:
            os.close(fd)
            raise

    def close(self) -> None:
        """Let go. Idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _check(fd: int, path: Path) -> None:
    try:
        kind = fcntl.ioctl(fd, _NS_GET_NSTYPE)
    except OSError as error:
        raise NamespaceGone(os.fspath(path), errno.EINVAL) from error
    if kind != _CLONE_NEWNET:
        raise NamespaceGone(os.fspath(path), errno.EINVAL)
    found = os.fstat(fd)
    for never in _NEVER:
        try:
            other = os.stat(never)
        except OSError:
            continue
        if (found.st_dev, found.st_ino) == (other.st_dev, other.st_ino):
            raise HostNamespace(os.fspath(path))
