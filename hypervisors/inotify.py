"""Waits for files to appear in a directory, by event instead of by polling."""

from __future__ import annotations

import ctypes
import os
from typing import TYPE_CHECKING, Final

import trio

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

# Source: linux/inotify.h
IN_MOVED_TO: Final = 0x80
IN_CREATE: Final = 0x100


async def wait_created(paths: Iterable[Path]) -> None:
    """Return once every path exists. The caller sets the deadline. Safe to cancel.

    Raises:
        OSError: a parent directory cannot be watched.
    """
    missing = list(paths)
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    if fd < 0:
        raise _last_error()
    try:
        for directory in {path.parent for path in missing}:
            mask = ctypes.c_uint32(IN_CREATE | IN_MOVED_TO)
            if libc.inotify_add_watch(fd, os.fsencode(directory), mask) < 0:
                raise _last_error()
        # Looked at only after the watch is set: what appears from here on wakes us.
        while missing := [path for path in missing if not _exists(path)]:
            await trio.lowlevel.wait_readable(fd)
            os.read(fd, 4096)
    finally:
        os.close(fd)


def _exists(path: Path) -> bool:
    return os.path.lexists(path)


def _last_error() -> OSError:
    code = ctypes.get_errno()
    return OSError(code, f"inotify: {os.strerror(code)}")
