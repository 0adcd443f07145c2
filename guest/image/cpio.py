"""The initrd's archive format: "newc" cpio, written so that equal input gives equal bytes.

Owns the byte layout and the normalisation (sorted names, owner 0:0, time 0, numbered inodes).
Knows nothing of what the files are for. Device nodes and owners are only header fields here, so
no root is needed.

Source: Linux Documentation/driver-api/early-userspace/buffer-format.rst
"""

from __future__ import annotations

import stat
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

MAGIC = b"070701"
TRAILER = "TRAILER!!!"
ALIGNMENT = 4


class ArchiveError(Exception):
    """The tree asked for cannot be written as an archive."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One name in the archive; `mode` holds the file type bits too."""

    name: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


@dataclass(slots=True)
class Tree:
    """A file tree in memory, keyed by path without a leading slash."""

    entries: dict[str, Entry] = field(default_factory=dict)

    def directory(self, path: str, mode: int = 0o755) -> None:
        """Add a directory and its parents; a directory that is there already is left as it is."""
        name = _clean(path)
        parent = name.rpartition("/")[0]
        if parent:
            self.directory(parent)
        present = self.entries.get(name)
        if present is None:
            self.entries[name] = Entry(name, stat.S_IFDIR | mode)
        elif not stat.S_ISDIR(present.mode):
            raise ArchiveError(f"/{name} is asked for as a directory and as a file")

    def file(self, path: str, data: bytes, mode: int = 0o644) -> None:
        """Add a regular file."""
        self._leaf(Entry(_clean(path), stat.S_IFREG | mode, data))

    def symlink(self, path: str, target: str) -> None:
        """Add a symbolic link to `target`."""
        self._leaf(Entry(_clean(path), stat.S_IFLNK | 0o777, target.encode()))

    def character_device(self, path: str, major: int, minor: int, mode: int = 0o600) -> None:
        """Add a character device node."""
        self._leaf(Entry(_clean(path), stat.S_IFCHR | mode, device=(major, minor)))

    def _leaf(self, entry: Entry) -> None:
        if entry.name in self.entries:
            raise ArchiveError(f"/{entry.name} is asked for twice")
        parent = entry.name.rpartition("/")[0]
        if parent:
            self.directory(parent)
        self.entries[entry.name] = entry


def archive(tree: Tree) -> bytes:
    """Serialise `tree`; parents come before what is in them because names are sorted."""
    return b"".join(_records(tree))


def _records(tree: Tree) -> Iterator[bytes]:
    size = 0
    names = sorted(tree.entries)
    for inode, name in enumerate(names, start=1):
        record = _record(tree.entries[name], inode)
        size += len(record)
        yield record
    trailer = _record(Entry(TRAILER, 0), 0)
    yield trailer
    # The kernel takes what follows an archive on a 4-byte border as the next archive; zeros are
    # skipped. A multiple of 512 is what cpio programs write.
    yield bytes(-(size + len(trailer)) % 512)


def _record(entry: Entry, inode: int) -> bytes:
    name = entry.name.encode() + b"\0"
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    major, minor = entry.device
    fields = (
        *(inode, entry.mode, 0, 0, links, 0, len(entry.data)),
        *(0, 0, major, minor, len(name), 0),
    )
    header = MAGIC + b"".join(b"%08X" % value for value in fields)
    return _padded(header + name) + _padded(entry.data)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % ALIGNMENT)


def _clean(path: str) -> str:
    name = path.strip("/")
    if not name or any(part in {"", ".", ".."} for part in name.split("/")):
        raise ArchiveError(f"{path!r} is not a plain absolute path")
    return name
