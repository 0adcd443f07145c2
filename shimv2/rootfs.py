"""Puts a container's filesystems into the directory that virtio-fs shows to the guest.

Layout, of which the guest sees the right-hand side, read-only at its top:

    <state>/mounts/<cid>/rootfs            share/<cid>/rootfs              the root filesystem
    <state>/mounts/<cid>-<n>-<name>        share/<cid>-<n>-<name>          a bind mount of the spec

`mounts` is a mount of its own, shared; `share` is its read-only peer. So a mount made later on the
left appears on the right, and the guest can neither remove nor replace a mount's target: paths on
the left are ours alone. Each step is journalled before it is taken; `Journal.undo` takes it back.

virtiofsd sees mounts that are made after its start only when the share was made shared before it.
Source: Kata virtcontainers/fs_share_linux.go.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Final, Protocol

from shimv2 import mounts
from shimv2.errors import InvalidArgument
from shimv2.guest_spec import SHARED_DIRECTORY, SharedMount, shared_mounts

if TYPE_CHECKING:
    from shimv2.bundle import Bundle
    from shimv2.journal import Journal

SHARE_TAG: Final = "kataShared"  # Source: Kata: the tag that agents mount
_MAX_NAME: Final = 40


class MountCalls(Protocol):
    """The host's mount operations; `shimv2.mounts` is the real one."""

    def mount_rootfs(self, mounts: Sequence[mounts.RootfsMount], target: str) -> list[str]: ...
    def bind(
        self, source: str, target: str, *, read_only: bool = ..., recursive: bool = ...
    ) -> None: ...
    def make_shared(self, path: str) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestPaths:
    """Where the guest finds a container's filesystems."""

    root: PurePosixPath
    sources: dict[int, PurePosixPath] = field(default_factory=dict)  # by index of the spec's mount


class Share:
    """The shared directory of one sandbox."""

    def __init__(self, state: Path, journal: Journal, calls: MountCalls) -> None:
        self._mounts = state / "mounts"
        self.path = state / "share"
        self._journal = journal
        self._calls = calls

    def prepare(self) -> None:
        """Make both views; must be done before virtiofsd starts.

        Raises:
            ShimError: a mount failed; what was done is in the journal.
        """
        for directory in (self._mounts, self.path):
            self._journal.take("directory", path=str(directory))
            directory.mkdir(mode=0o700)
        self._journal.take("mount", target=str(self._mounts))
        self._calls.make_shared(str(self._mounts))
        self._journal.take("mount", target=str(self.path))
        self._calls.bind(str(self._mounts), str(self.path), read_only=True, recursive=False)

    def add(self, bundle: Bundle, rootfs: Sequence[mounts.RootfsMount]) -> GuestPaths:
        """Mount a container's root filesystem and bind its volumes.

        On failure the caller undoes the container's journal entries.

        Raises:
            InvalidArgument: a mount that can't be given to a VM, named with its reason.
            ShimError: the host refused a mount.
        """
        container_id = bundle.container_id
        self._add_rootfs(bundle, rootfs)
        sources: dict[int, PurePosixPath] = {}
        for mount in shared_mounts(bundle.spec):
            name = f"{container_id}-{mount.index}-{mount.source.name[-_MAX_NAME:] or 'root'}"
            self._bind_volume(container_id, mount, self._mounts / name)
            sources[mount.index] = SHARED_DIRECTORY / name
        return GuestPaths(root=SHARED_DIRECTORY / container_id / "rootfs", sources=sources)

    def remove(self, container_id: str) -> list[str]:
        """Take back what `add` did; return what could not be."""
        return self._journal.undo(container=container_id)

    def _add_rootfs(self, bundle: Bundle, rootfs: Sequence[mounts.RootfsMount]) -> None:
        container_id = bundle.container_id
        target = self._mounts / container_id / "rootfs"
        # Before the journal: what stands there is unmounted by whoever replays it.
        places = [_place_of(mount, target) for mount in rootfs]
        for directory in (target.parent, target):
            self._journal.take("directory", path=str(directory), container=container_id)
            directory.mkdir(mode=0o755)
        if not rootfs:
            source = _root_directory(bundle)
            self._journal.take("mount", target=str(target), container=container_id)
            self._calls.bind(str(source), str(target))
            return
        for place in places:
            self._journal.take("mount", target=place, container=container_id)
        try:
            self._calls.mount_rootfs(rootfs, str(target))
        except mounts.MountFailed as exc:
            if exc.errno != errno.ENODEV:
                raise
            types = ", ".join(sorted({repr(mount.type) for mount in rootfs}))
            raise InvalidArgument(
                f"rootfs of container {container_id}: the host's kernel knows no filesystem type "
                f"among {types}; use a snapshotter that mounts overlay or bind"
            ) from exc

    def _bind_volume(self, container_id: str, mount: SharedMount, target: Path) -> None:
        is_directory = _is_directory(mount)
        kind = "directory" if is_directory else "file"
        self._journal.take(kind, path=str(target), container=container_id)
        if is_directory:
            target.mkdir(mode=0o755)
        else:
            os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o644))
        self._journal.take("mount", target=str(target), container=container_id)
        self._calls.bind(
            str(mount.source),
            str(target),
            read_only=mount.read_only,
            recursive=mount.is_recursive,
        )


def sandbox_dns(bundle: Bundle) -> list[str]:
    """The lines of the pod's resolv.conf, as far as the spec brings one."""
    for mount in shared_mounts(bundle.spec):
        if str(mount.destination) == "/etc/resolv.conf":
            try:
                with mount.source.open("rb") as file:
                    text = file.read(64 << 10)
            except OSError:
                return []  # the mount itself reports it
            return text.decode("utf-8", "replace").splitlines()
    return []


def _place_of(mount: mounts.RootfsMount, root: Path) -> str:
    try:
        return mounts.inside(str(root), mount.target)
    except mounts.MountFailed as exc:
        raise InvalidArgument(
            f"rootfs mount target {mount.target!r} leaves the container's root; remove the '..'"
        ) from exc


def _root_directory(bundle: Bundle) -> Path:
    source = bundle.path / str(bundle.spec["root"]["path"])
    if not source.is_dir():
        raise InvalidArgument(
            f"rootfs of container {bundle.container_id}: {source} is not a directory"
        )
    return source


def _is_directory(mount: SharedMount) -> bool:
    try:
        mode = os.stat(mount.source).st_mode
    except OSError as exc:
        raise InvalidArgument(
            f"mount {mount.destination}: source {mount.source}: {exc.strerror}"
        ) from exc
    if stat.S_ISDIR(mode):
        return True
    if stat.S_ISREG(mode):
        return False
    raise InvalidArgument(
        f"mount {mount.destination}: {mount.source} is {_kind_name(mode)} of the host, which a VM "
        "cannot reach; remove the mount"
    )


def _kind_name(mode: int) -> str:
    if stat.S_ISSOCK(mode):
        return "a unix socket"
    if stat.S_ISFIFO(mode):
        return "a fifo"
    if stat.S_ISBLK(mode):
        return "a block device"
    return "a character device"
