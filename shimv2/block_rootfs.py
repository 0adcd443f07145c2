"""A container's root file system as a disk of its virtual machine.

Three ways, the first that can be is taken: the snapshot is a disk already (a block device, or a
file system in a file) and is plugged in as it is; the snapshot is shared as a directory (`rootfs`);
or, without sharing, an image is made of it (`rootfs_image`).

Only what a mount of a disk file system names as its source is ever taken for a disk, by what it is:
never a directory's device, of which a disk of the host might come out. Source: CVE-2026-24054.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Final

from shimv2 import rootfs_image
from shimv2.disks import Disk
from shimv2.rootfs import mount_root

if TYPE_CHECKING:
    from agent_proto.pb import agent_pb2
    from shimv2.bundle import Bundle
    from shimv2.journal import Journal
    from shimv2.mounts import RootfsMount
    from shimv2.rootfs import MountCalls

# What the guest's kernel mounts without modules.
GUEST_FILESYSTEMS: Final = frozenset({"ext2", "ext3", "ext4"})
# Where disks are mounted in the guest. Source: Kata virtcontainers/kata_agent.go,
# kataGuestSandboxStorageDir.
STORAGE_DIRECTORY: Final = PurePosixPath("/run/kata-containers/sandbox/storage")
# Options that mean something to whoever mounts on the host alone.
_HOSTS_OPTIONS: Final = frozenset({"loop", "rw", "bind", "rbind"})


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskMount:
    """A disk with a file system, and where the guest mounts it."""

    disk: Disk
    fstype: str
    options: tuple[str, ...]
    mount_point: PurePosixPath
    fs_group: agent_pb2.FSGroup | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskRoot:
    """A root file system on a disk: `root` is the container's root below the mount point."""

    mount: DiskMount
    root: PurePosixPath


def mount_point(container_id: str, name: str) -> PurePosixPath:
    """Where the guest mounts a disk of a container's."""
    return STORAGE_DIRECTORY / container_id / name


def snapshot_disk(container_id: str, rootfs: Sequence[RootfsMount]) -> DiskRoot | None:
    """The snapshot as a disk, if it is one that the guest can mount."""
    if len(rootfs) != 1:
        return None
    (mount,) = rootfs
    if mount.type not in GUEST_FILESYSTEMS or mount.target.strip("/") or not _is_disk(mount.source):
        return None
    place = mount_point(container_id, "rootfs")
    disk = Disk(
        path=Path(mount.source),
        read_only="ro" in mount.options,
        what=f"rootfs of container {container_id}",
    )
    options = tuple(option for option in mount.options if option not in _HOSTS_OPTIONS)
    return DiskRoot(
        mount=DiskMount(disk=disk, fstype=mount.type, options=options, mount_point=place),
        root=place,
    )


def _is_disk(source: str) -> bool:
    try:
        mode = os.stat(source).st_mode
    except OSError:
        return False  # whoever mounts it says so
    return stat.S_ISBLK(mode) or stat.S_ISREG(mode)


class RootImages:
    """Makes images of snapshots that are directories."""

    def __init__(self, state: Path, journal: Journal, calls: MountCalls, size_mib: int) -> None:
        self._state = state
        self._journal = journal
        self._calls = calls
        self._size_mib = size_mib

    async def make(self, bundle: Bundle, rootfs: Sequence[RootfsMount]) -> DiskRoot:
        """Make the image of a container's root, beside its bundle's work directory if it has one.

        On failure the caller undoes the container's journal entries.

        Raises:
            ShimError: as `mount_root` and `rootfs_image.build_image`.
        """
        container_id = bundle.container_id
        image = self._place(bundle) / f"{container_id}.rootfs.img"
        self._journal.take("file", path=str(image), container=container_id)
        tree = self._state / f"image-{container_id}"
        entries = mount_root(self._journal, self._calls, bundle, rootfs, tree / rootfs_image.ROOTFS)
        what = f"rootfs of container {container_id}"
        await rootfs_image.build_image(tree, image, self._size_mib, self._journal, what=what)
        # What cannot be undone now stays in the journal; the container's removal names it.
        self._journal.undo_some(entries)
        place = mount_point(container_id, "rootfs")
        disk = Disk(path=image, read_only=False, what=what, is_lasting=False)
        return DiskRoot(
            mount=DiskMount(disk=disk, fstype="ext4", options=(), mount_point=place),
            root=place / rootfs_image.ROOTFS,
        )

    def _place(self, bundle: Bundle) -> Path:
        # The state directory is memory; the work directory lies on containerd's disk.
        work = bundle.path / "work"
        return work.resolve() if work.is_dir() else self._state
