"""emptyDirs of a VM without a shared directory: a tmpfs of the guest's, or a disk.

One in memory is made by the guest, as with sharing (`volume_plan`). One on disk becomes an image in
kubelet's directory of it, so that what a pod writes counts as its own there; all containers of the
pod have the same one, and it goes with the pod.
"""

from __future__ import annotations

import base64
import os
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Final

import trio

from shimv2 import rootfs_image
from shimv2.block_rootfs import STORAGE_DIRECTORY, DiskMount
from shimv2.disks import Disk
from shimv2.errors import FailedPrecondition
from shimv2.volume_plan import VolumeKind, kubelet_volume, memory_volume
from shimv2.volume_source import mount_table, opened

if TYPE_CHECKING:
    from agent_proto.pb.agent_pb2 import Storage
    from shimv2.bundle import JsonObject
    from shimv2.guest_spec import SharedMount
    from shimv2.journal import Entry, Journal

_IMAGE: Final = ".kata-volume.img"


@dataclass(frozen=True, slots=True, kw_only=True)
class EmptyDir:
    """Where the guest has it, and what it mounts for it."""

    path: PurePosixPath
    storages: list[Storage] = field(default_factory=list)
    mounts: list[DiskMount] = field(default_factory=list)


class EmptyDirs:
    """The emptyDirs of one pod."""

    def __init__(self, state: Path, journal: Journal, size_mib: int) -> None:
        self._state = state
        self._journal = journal
        self._size_mib = size_mib
        self._made: dict[Path, EmptyDir] = {}
        self._making = trio.Lock()  # containers that are created side by side have the same ones
        self._tries = 0

    async def make(self, mount: SharedMount, spec: JsonObject) -> EmptyDir | None:
        """The emptyDir behind a mount of the spec, made at its first use; None if it is none.

        Raises:
            InvalidArgument: as `memory_volume`, or no source.
            FailedPrecondition: an image that is not this sandbox's lies there.
            ShimError: as `build_image`. Nothing of a failed attempt stays.
        """
        volume = kubelet_volume(PurePosixPath(mount.source))
        if volume is None or volume.kind not in (VolumeKind.EMPTY_DIR, VolumeKind.SUBPATH):
            return None
        with opened(mount) as source:
            in_memory = memory_volume(
                mount, volume, mount_table(), source.mount_id(), source.status, spec
            )
            if in_memory is not None:
                return EmptyDir(path=in_memory.path, storages=list(in_memory.storages))
            if volume.kind is not VolumeKind.EMPTY_DIR or not source.is_directory:
                return None
            async with self._making:
                if mount.source not in self._made:
                    self._made[mount.source] = await self._make_disk(mount, source.status)
                return self._made[mount.source]

    async def _make_disk(self, mount: SharedMount, status: os.stat_result) -> EmptyDir:
        what = f"mount {mount.destination}"
        self._tries += 1
        tree = self._state / f"volume-{self._tries}"
        top = tree / rootfs_image.ROOTFS
        image = mount.source / _IMAGE
        entries: list[Entry] = []
        try:
            for directory in (tree, top):
                entries.append(self._journal.take("directory", path=str(directory)))
                directory.mkdir(mode=0o700)
            # kubelet has set them as the pod's fsGroup wants them.
            os.chown(top, status.st_uid, status.st_gid)
            top.chmod(status.st_mode & 0o7777)
            await self._make_image(tree, image, what)
        finally:
            # What cannot be undone now stays in the journal; the sandbox's end names it.
            self._journal.undo_some(entries)
        name = base64.urlsafe_b64encode(os.fsencode(mount.source.name)).decode("ascii")
        place = STORAGE_DIRECTORY / f"empty-dir-{name[-200:]}"
        disk = Disk(path=image, read_only=False, what=what, is_lasting=False)
        mounted = DiskMount(disk=disk, fstype="ext4", options=(), mount_point=place)
        return EmptyDir(path=place / rootfs_image.ROOTFS, mounts=[mounted])

    async def _make_image(self, tree: Path, image: Path, what: str) -> None:
        entry = self._journal.take("file", path=str(image))
        try:
            await rootfs_image.build_image(tree, image, self._size_mib, self._journal, what=what)
        except FileExistsError as error:
            self._journal.release(entry)  # whose it is, it isn't ours to delete
            raise FailedPrecondition(
                f"{what}: {image} is there already and not this sandbox's; remove it"
            ) from error
        except BaseException:
            self._journal.undo_some([entry])
            raise
