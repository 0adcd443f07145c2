"""The host's directories and files that a sandbox's containers see over virtio-fs, each once.

Containers of a pod that mount the same directory get the same entry of the share, so that they have
one file system of the guest's in common: locks, shared memory maps, unix sockets, fifos and inotify
work between them. An entry goes with the last container that uses it.

An entry is a bind of the source, in the sandbox's own mount namespace, and read-only there if those
who use it asked for that; nobody on the host runs programs or opens devices through it.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final, NamedTuple

from shimv2 import mounts
from shimv2.errors import ShimError

if TYPE_CHECKING:
    from pathlib import Path

    from shimv2.guest_spec import SharedMount
    from shimv2.journal import Journal
    from shimv2.rootfs import MountCalls
    from shimv2.volume_source import Source

_MAX_NAME: Final = 40
_INERT: Final = mounts.MOUNT_ATTR_NOSUID | mounts.MOUNT_ATTR_NODEV


class _Key(NamedTuple):
    """What makes two mounts the same entry."""

    device: int
    inode: int
    mount_id: int  # 0 where other mounts of the same directory show the same
    read_only: bool
    follows_host: bool
    is_recursive: bool
    is_read_only_below: bool


class SharedVolumes:
    """The volumes of one sandbox's share. `directory` is ours alone: no guest can change it."""

    def __init__(self, directory: Path, journal: Journal, calls: MountCalls) -> None:
        self._directory = directory
        self._journal = journal
        self._calls = calls
        self._entries: dict[_Key, str] = {}
        self._users: dict[str, set[str]] = {}  # by entry
        self._made = 0

    def use(
        self,
        container_id: str,
        mount: SharedMount,
        source: Source,
        *,
        read_only: bool,
        is_kubelets: bool,
    ) -> str:
        """Give a container the entry for a source; return its name.

        Raises:
            ShimError: the host refused the mount; nothing is left of it.
        """
        key = _Key(
            source.status.st_dev,
            source.status.st_ino,
            0 if is_kubelets else source.mount_id(),
            read_only or source.is_read_only(),
            mount.follows_host,
            mount.is_recursive,
            mount.is_read_only_below,
        )
        name = self._entries.get(key)
        if name is None:
            name = self._make(mount, source, read_only=read_only)
            self._entries[key] = name
            self._users[name] = set()
        self._users[name].add(container_id)
        return name

    def release(self, container_id: str) -> list[str]:
        """End a container's use of its entries; return what could not be taken back."""
        problems: list[str] = []
        for key, name in list(self._entries.items()):
            users = self._users[name]
            users.discard(container_id)
            if not users:
                del self._entries[key], self._users[name]
                problems += self._journal.undo(container=_owner(name))
        return problems

    def keep(self, name: str, mount: SharedMount, source: Source) -> None:
        """Share something for as long as the sandbox lives, by this name.

        Raises:
            ShimError: the host refused the mount; the journal has what was done.
        """
        self._bind(name, "", mount, source, read_only=mount.read_only)

    def _make(self, mount: SharedMount, source: Source, *, read_only: bool) -> str:
        # A colon is in no container's id, and a number is used once: the guest remembers names.
        self._made += 1
        name = f"volume:{self._made}-{mount.source.name[-_MAX_NAME:] or 'root'}"
        try:
            self._bind(name, _owner(name), mount, source, read_only=read_only)
        except BaseException:
            self._journal.undo(container=_owner(name))
            raise
        return name

    def _bind(
        self, name: str, owner: str, mount: SharedMount, source: Source, *, read_only: bool
    ) -> None:
        path = str(self._directory / name)
        share = os.open(self._directory, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if source.is_directory:
                self._journal.take("directory", path=path, container=owner)
                os.mkdir(name, 0o755, dir_fd=share)
            else:
                self._journal.take("file", path=path, container=owner)
                flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC
                os.close(os.open(name, flags, 0o644, dir_fd=share))
            self._journal.take("mount", target=path, container=owner)
            target = mounts.open_beneath(share, name, os.O_PATH)
            try:
                self._calls.bind(
                    source.descriptor,
                    target,
                    read_only=read_only,
                    recursive=mount.is_recursive,
                    writable_below=not mount.is_read_only_below,
                    propagation=mounts.MS_SLAVE if mount.follows_host else mounts.MS_PRIVATE,
                    attributes=_INERT,
                )
            except mounts.MountFailed as exc:
                raise ShimError(
                    f"mount {mount.destination}: binding {mount.source} for the VM: "
                    f"{os.strerror(exc.errno)}"
                ) from exc
            finally:
                os.close(target)
        finally:
            os.close(share)


def _owner(name: str) -> str:
    """Whose journal entries they are: the volume's own, `volume:<number>`."""
    return name.partition("-")[0]
