"""Reads a small directory of the host, such as a ConfigMap's, entry by entry and within bounds.

The host's kubelet writes it, the pod's author may have chosen what is in it: no link is followed,
nothing but directories, regular files and links that stay inside is taken.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from shimv2.errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# A ConfigMap or Secret has at most 1 MiB; a projected volume brings a few of them together. While
# one replaces the other, both are there. Source: Kubernetes, "ConfigMaps", "Motivation".
MAX_BYTES: Final = 8 << 20
MAX_ENTRIES: Final = 512
_MAX_DEPTH: Final = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A directory, file or link. `stamp` is another one when its content is."""

    path: str  # below the tree; "" for the tree itself
    mode: int
    uid: int
    gid: int
    size: int
    stamp: tuple[int, int, int]
    link: bytes = b""

    @property
    def is_directory(self) -> bool:
        return stat.S_ISDIR(self.mode)

    @property
    def is_link(self) -> bool:
        return stat.S_ISLNK(self.mode)


def read_tree(source: Path, what: str) -> list[Entry]:
    """List what is at `source`, parents before their content, links last.

    What vanishes meanwhile is left out: whoever takes it away is not done yet.

    Raises:
        InvalidArgument: missing, too large, or something in it that cannot be copied; the text
            names `what`.
        OSError: the host's disk.
    """
    try:
        entries = [_entry("", os.stat(source), what)]
        if entries[0].is_directory:
            root = os.open(source, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                for entry in _below(root, "", what, _MAX_DEPTH):
                    entries.append(entry)
                    _check_bounds(entries, source, what)
            finally:
                os.close(root)
    except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
        raise InvalidArgument(f"{what}: source {source}: {error.strerror}") from error
    _check_bounds(entries, source, what)
    return [*(e for e in entries if not e.is_link), *(e for e in entries if e.is_link)]


def open_entry(source: Path, entry: Entry) -> int:
    """Open a file of the tree for reading; no link on the way below `source` is followed.

    Raises:
        OSError: it is gone, or something else by now.
    """
    from shimv2 import mounts

    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
    if not entry.path:
        return os.open(source, flags)
    root = os.open(source, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return mounts.open_beneath(root, entry.path, flags)
    finally:
        os.close(root)


def _below(directory: int, path: str, what: str, depth: int) -> Iterator[Entry]:
    if depth == 0:
        raise InvalidArgument(f"{what}: {path} is nested too deeply to be copied into the VM")
    for name in sorted(os.listdir(directory)):
        below = f"{path}/{name}" if path else name
        try:
            found = os.stat(name, dir_fd=directory, follow_symlinks=False)
            link = os.readlink(os.fsencode(name), dir_fd=directory) if _is_link(found) else b""
        except OSError:
            continue
        yield _entry(below, found, what, link)
        if stat.S_ISDIR(found.st_mode):
            try:
                inner = os.open(
                    name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC,
                    dir_fd=directory,
                )  # fmt: skip
            except OSError:
                continue
            try:
                yield from _below(inner, below, what, depth - 1)
            finally:
                os.close(inner)


def _is_link(found: os.stat_result) -> bool:
    return stat.S_ISLNK(found.st_mode)


def _entry(path: str, found: os.stat_result, what: str, link: bytes = b"") -> Entry:
    kind = stat.S_IFMT(found.st_mode)
    if path.encode(errors="replace") != os.fsencode(path):
        raise InvalidArgument(f"{what}: the name {path!r} is not UTF-8; rename it")
    if kind not in (stat.S_IFDIR, stat.S_IFREG, stat.S_IFLNK):
        raise InvalidArgument(
            f"{what}: {path or 'it'} is a socket, fifo or device of the host, which cannot be "
            "copied into the VM; remove it"
        )
    if link and _leaves(path, link):
        raise InvalidArgument(
            f"{what}: the link {path} leads out of the volume, which is copied into the VM alone; "
            "let it lead to something inside"
        )
    return Entry(
        path=path, mode=found.st_mode, uid=found.st_uid, gid=found.st_gid,
        size=found.st_size if kind == stat.S_IFREG else 0,
        stamp=(found.st_ino, found.st_mtime_ns, found.st_ctime_ns), link=link,
    )  # fmt: skip


def _leaves(path: str, link: bytes) -> bool:
    target = os.fsdecode(link)
    where = os.path.normpath(os.path.join(os.path.dirname(path) or ".", target))
    return target.startswith("/") or where == ".." or where.startswith("../")


def _check_bounds(entries: list[Entry], source: Path, what: str) -> None:
    size = sum(entry.size for entry in entries)
    if len(entries) > MAX_ENTRIES or size > MAX_BYTES:
        raise InvalidArgument(
            f"{what}: {source} is larger than the {MAX_BYTES >> 20} MiB or {MAX_ENTRIES} files "
            "that can be copied into a VM without a shared directory; use a block volume, or "
            'shared_fs = "virtio-fs"'
        )
