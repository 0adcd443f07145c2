"""Tells that something changed in one of a few directories or files of the host, by inotify."""

from __future__ import annotations

import ctypes
import os
from typing import Final

import trio

from shimv2.errors import ResourceExhausted

# Source: linux/inotify.h
_IN_ATTRIB: Final = 0x4
_IN_CLOSE_WRITE: Final = 0x8
_IN_MOVED: Final = 0x40 | 0x80
_IN_CREATE: Final = 0x100
_IN_DELETE: Final = 0x200
_IN_MODIFY: Final = 0x2
_IN_IGNORED: Final = 0x8000
_IN_Q_OVERFLOW: Final = 0x4000
_MASK: Final = (
    _IN_ATTRIB | _IN_CLOSE_WRITE | _IN_MOVED | _IN_CREATE | _IN_DELETE | _IN_MODIFY
)  # fmt: skip
_EVENT_HEAD: Final = 16
_BUFFER: Final = 64 << 10


class FileWatch:
    """One inotify instance, of which a user may have few (128 by default); close it.

    A path is watched for a name of the caller's choice, which `changed` returns; it may be watched
    for several.
    """

    def __init__(self) -> None:
        """Raises ResourceExhausted when the user has too many."""
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd: int = self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._fd < 0:
            raise ResourceExhausted(
                f"inotify: {os.strerror(ctypes.get_errno())}; raise fs.inotify.max_user_instances"
            )
        # The kernel has one watch for an inode, however often and by whichever path it is added.
        self._names: dict[int, set[str]] = {}

    @property
    def is_closed(self) -> bool:
        return self._fd < 0

    def add(self, path: str, name: str) -> None:
        """Watch a directory or a file. Again is no harm. A path that is gone is left out.

        Raises:
            ResourceExhausted: too many watches of the user's.
        """
        number: int = self._libc.inotify_add_watch(
            self._fd, os.fsencode(path), ctypes.c_uint32(_MASK)
        )
        if number >= 0:
            self._names.setdefault(number, set()).add(name)
            return
        code = ctypes.get_errno()
        if code == 28:  # ENOSPC
            raise ResourceExhausted(f"inotify: {path}: raise fs.inotify.max_user_watches")

    def forget(self, name: str) -> None:
        """Stop watching everything that was added for `name` alone."""
        for number, names in list(self._names.items()):
            names.discard(name)
            if not names:
                self._libc.inotify_rm_watch(self._fd, number)
                del self._names[number]

    async def changed(self) -> set[str]:
        """Wait for changes; return the names they concern. Safe to cancel."""
        while True:
            await trio.lowlevel.wait_readable(self._fd)
            try:
                data = os.read(self._fd, _BUFFER)
            except BlockingIOError:
                continue
            if names := self._read(data):
                return names

    def close(self) -> None:
        """Idempotent."""
        if self._fd >= 0:
            trio.lowlevel.notify_closing(self._fd)
            os.close(self._fd)
            self._fd = -1

    def _read(self, data: bytes) -> set[str]:
        names: set[str] = set()
        at = 0
        while at + _EVENT_HEAD <= len(data):
            number = int.from_bytes(data[at : at + 4], "little", signed=True)
            mask = int.from_bytes(data[at + 4 : at + 8], "little")
            at += _EVENT_HEAD + int.from_bytes(data[at + 12 : at + 16], "little")
            if mask & _IN_Q_OVERFLOW:
                names.update(*self._names.values())
            elif mask & _IN_IGNORED:
                self._names.pop(number, None)
            else:
                names.update(self._names.get(number, ()))
        return names
