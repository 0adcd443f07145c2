"""The host's side of a volume: what a mount's source is, held open so that it stays that.

Read from the host's file system, and from its list of mounts where kubelet's layout says that more
than a plain directory may be behind a path. What follows from it is planned by `volume_plan`.
"""

from __future__ import annotations

import os
import stat
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, NamedTuple

from shimv2 import mounts
from shimv2.errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shimv2.guest_spec import SharedMount

MOUNTINFO: Final = "/proc/self/mountinfo"
_AT_FDCWD: Final = -100
_SEPARATOR: Final = " - "


class MountedAt(NamedTuple):
    """A line of mountinfo. Source: proc(5)."""

    id: int
    device: str  # major:minor
    root: str  # of the mount, within its file system
    place: str
    fstype: str
    super_options: tuple[str, ...]

    def option(self, name: str) -> str:
        """The value of a `name=value` option of the file system; empty if there is none."""
        for option in self.super_options:
            key, _, value = option.partition("=")
            if key == name:
                return value
        return ""


class Source(NamedTuple):
    """A mount's source while it is open. `descriptor` is O_PATH: it names, and gives no access."""

    descriptor: int
    status: os.stat_result

    @property
    def is_directory(self) -> bool:
        return stat.S_ISDIR(self.status.st_mode)

    def mount_id(self) -> int:
        """The mount that it lies on. Source: proc(5), fdinfo."""
        with open(f"/proc/self/fdinfo/{self.descriptor}", encoding="ascii") as lines:
            for line in lines:
                key, _, value = line.partition(":")
                if key == "mnt_id":
                    return int(value)
        return 0

    def path(self) -> str:
        """Where it is, as the list of mounts would call it."""
        return os.readlink(f"/proc/self/fd/{self.descriptor}")

    def is_read_only(self) -> bool:
        """Whether its mount lets nobody write, whoever binds it."""
        return bool(os.fstatvfs(self.descriptor).f_flag & os.ST_RDONLY)


@contextmanager
def opened(mount: SharedMount) -> Iterator[Source]:
    """Open the source once: what is looked at is what is bound, whatever its path leads to later.

    Raises:
        InvalidArgument: there is none, or it is nothing that a VM can be given.
    """
    path = str(mount.source)
    if not mount.source.is_absolute() or "\0" in path:
        raise InvalidArgument(f"mount {mount.destination}: source {path!r} is not an absolute path")
    try:
        descriptor = mounts.open_beneath(
            _AT_FDCWD, path, os.O_PATH, resolve=mounts.RESOLVE_NO_MAGICLINKS
        )
    except UnicodeEncodeError as exc:
        raise InvalidArgument(
            f"mount {mount.destination}: source {path!r} is no name of a file"
        ) from exc
    except OSError as exc:
        raise InvalidArgument(
            f"mount {mount.destination}: source {mount.source}: {exc.strerror}"
        ) from exc
    try:
        source = Source(descriptor=descriptor, status=os.fstat(descriptor))
        _check_kind(mount, source.status.st_mode)
        yield source
    finally:
        os.close(descriptor)


def mount_table(path: str = MOUNTINFO) -> list[MountedAt]:
    """The mounts of this mount namespace, oldest first. A few milliseconds on a busy node."""
    with open(path, "rb") as stream:
        lines = stream.read().decode("utf-8", "surrogateescape").splitlines()
    return [_parse(line) for line in lines if _SEPARATOR in line]


def shm_bytes(path: str) -> int:
    """The size of the tmpfs at `path`, a pod's /dev/shm; 0 if there is none."""
    for line in reversed(mount_table()):
        if line.place == path:
            if line.fstype != "tmpfs":
                return 0
            size = os.statvfs(path)
            return size.f_blocks * size.f_frsize
    return 0


def _parse(line: str) -> MountedAt:
    before, _, after = line.partition(_SEPARATOR)
    first, second = before.split(" "), after.split(" ")
    return MountedAt(
        id=int(first[0]),
        device=first[2],
        root=_unescape(first[3]),
        place=_unescape(first[4]),
        fstype=second[0],
        super_options=tuple(second[2].split(",")) if len(second) > 2 else (),
    )


def _unescape(text: str) -> str:
    # Space, tab, newline and backslash are written as three octal digits. Source: proc(5).
    head, *parts = text.split("\\")
    return head + "".join(chr(int(part[:3], 8)) + part[3:] for part in parts)


def _check_kind(mount: SharedMount, mode: int) -> None:
    if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
        raise InvalidArgument(
            f"mount {mount.destination}: {mount.source} is {_kind_name(mode)} of the host, which a "
            "VM cannot reach; remove the mount"
        )


def _kind_name(mode: int) -> str:
    if stat.S_ISSOCK(mode):
        return "a unix socket"
    if stat.S_ISFIFO(mode):
        return "a fifo"
    if stat.S_ISBLK(mode):
        return "a block device"
    return "a character device"
