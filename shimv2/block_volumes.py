"""Volumes that come as disks: raw block devices of the spec, direct volumes, emptyDirs of a guest.

Of the host's block devices only those that the spec lists are ever given: a container that may use
all devices (privileged) gets those that a rule of its own names.
"""

from __future__ import annotations

import base64
import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Final

from shimv2 import direct_volume
from shimv2.block_rootfs import STORAGE_DIRECTORY, DiskMount
from shimv2.disks import Disk
from shimv2.errors import InvalidArgument
from shimv2.guest_spec import BlockDevice, block_devices

if TYPE_CHECKING:
    from shimv2.bundle import JsonObject
    from shimv2.guest_spec import SharedMount
    from shimv2.journal import Journal

_SYS_BLOCK: Final = Path("/sys/dev/block")
_HOSTS_OPTIONS: Final = frozenset({"rw", "loop", "bind", "rbind"})


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceDisk:
    """A disk that a container sees as a device node."""

    disk: Disk
    container_path: str


def device_disks(spec: JsonObject, container_id: str) -> list[DeviceDisk]:
    """The host's disks that a spec lists among its devices.

    Raises:
        InvalidArgument: the host has no such device.
    """
    return [
        DeviceDisk(
            disk=Disk(
                path=_node_of(device),
                read_only=device.read_only,
                what=f"device {device.path} of container {container_id}",
            ),
            container_path=device.path,
        )
        for device in block_devices(spec)
    ]


def _node_of(device: BlockDevice, sys_block: Path = _SYS_BLOCK) -> Path:
    """The host's node of a device, whose spec has only the numbers."""
    number = f"{device.major}:{device.minor}"
    node = Path(f"/dev/block/{number}")
    try:
        for line in (sys_block / number / "uevent").read_text().splitlines():
            key, _, value = line.partition("=")
            if key == "DEVNAME":
                node = Path("/dev", value)
        found = os.stat(node)
    except OSError as error:
        raise InvalidArgument(
            f"device {device.path} (b {number}): the host has none: {error.strerror}"
        ) from error
    if found.st_rdev != os.makedev(device.major, device.minor):
        raise InvalidArgument(f"device {device.path} (b {number}): {node} is another device")
    return node


class DirectVolumes:
    """The direct volumes of one sandbox."""

    def __init__(self, journal: Journal, sandbox_id: str, root: Path = direct_volume.ROOT) -> None:
        self._journal = journal
        self._sandbox_id = sandbox_id
        self._root = root

    def find(self, mount: SharedMount) -> DiskMount | None:
        """A mount of the spec as a disk, if it is a direct volume; marks the volume as in use.

        Raises:
            ShimError: as `direct_volume.find`.
        """
        volume = direct_volume.find(mount, self._root)
        if volume is None:
            return None
        self._mark_used(volume)
        read_only = mount.read_only or "ro" in volume.options
        options = [one for one in volume.options if one not in _HOSTS_OPTIONS and one != "ro"]
        return DiskMount(
            disk=Disk(path=volume.device, read_only=read_only, what=f"mount {mount.destination}"),
            fstype=volume.fstype,
            options=(*options, *(("ro",) if read_only else ())),
            mount_point=_place(str(volume.device)),
            fs_group=None if read_only else volume.fs_group,
        )

    def _mark_used(self, volume: direct_volume.DirectVolume) -> None:
        # Tools find the sandbox of a volume by it. Source: Kata direct-volume RecordSandboxID.
        mark = volume.directory / self._sandbox_id
        if not os.path.lexists(mark):
            self._journal.take("file", path=str(mark))
            os.close(os.open(mark, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600))


def _place(source: str) -> PurePosixPath:
    # Source: Kata virtcontainers/kata_agent.go: volumes are mounted below their source's name.
    name = base64.urlsafe_b64encode(os.fsencode(source)).decode("ascii")
    return STORAGE_DIRECTORY / name[-200:]
