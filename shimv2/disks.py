"""The block devices that containers of one machine have, plugged in while it runs.

A disk is known by what it is on the host (device number, or file): containers that name the same
one share it, and the last user's going unplugs it. Nothing of a disk outlives the VMM, whose
process is in the journal, so plugging needs no entry of its own; a file made for one does.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from hypervisors.errors import HypervisorError
from hypervisors.machine import BlockDevice
from shimv2.errors import InvalidArgument

if TYPE_CHECKING:
    from hypervisors.base import VirtualMachine
    from hypervisors.machine import GuestAddress

Identity = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """A disk that a container asks for: an image file or a block device of the host."""

    path: Path
    read_only: bool
    what: str  # for refusals: "rootfs", "device /dev/xvda", …
    is_lasting: bool = True  # what is written to it is wanted after the container's end


@dataclass(slots=True)
class _Plugged:
    id: str
    path: Path
    read_only: bool
    is_lasting: bool
    address: GuestAddress
    users: set[str] = field(default_factory=set)


class Disks:
    """What is plugged into one machine."""

    def __init__(self) -> None:
        self._plugged: dict[Identity, _Plugged] = {}
        self._unmounted: set[str] = set()
        self._count = 0
        # One change at a time: two containers may ask for the same disk.
        self._lock = trio.Lock()

    async def attach(self, vm: VirtualMachine, disk: Disk, container_id: str) -> GuestAddress:
        """Plug a disk in for a container, unless another has it already. Undone when cancelled.

        Raises:
            InvalidArgument: no disk, or there already for reading only.
            HypervisorError: as `VirtualMachine.attach`.
        """
        identity = identify(disk)
        async with self._lock:
            plugged = self._plugged.get(identity)
            if plugged is None:
                self._count += 1
                device = BlockDevice(
                    id=f"disk{self._count}", path=disk.path, read_only=disk.read_only
                )
                address = await vm.attach(device)
                plugged = _Plugged(device.id, disk.path, disk.read_only, disk.is_lasting, address)
                self._plugged[identity] = plugged
            elif plugged.read_only and not disk.read_only:
                raise InvalidArgument(
                    f"{disk.what}: {disk.path} is in this pod's VM already, for reading only; "
                    "let all containers of the pod mount it the same way"
                )
            plugged.users.add(container_id)
            self._unmounted.discard(container_id)
            return plugged.address

    async def release(self, vm: VirtualMachine | None, container_id: str) -> list[str]:
        """Unplug what nobody else uses; return what stayed in, and why.

        The guest has unmounted it by then. Without a machine there is nothing to unplug.
        """
        problems = []
        async with self._lock:
            for identity, plugged in list(self._plugged.items()):
                plugged.users.discard(container_id)
                if plugged.users:
                    continue
                try:
                    if vm is not None and vm.exit is None:
                        await vm.detach(plugged.id)
                except (HypervisorError, KeyError) as error:
                    # It keeps its port; a container that asks for it again gets it.
                    problems.append(f"{plugged.path}: {error}")
                else:
                    del self._plugged[identity]
        return problems

    def writers(self) -> set[str]:
        """The containers with a disk that the guest may still hold unwritten data of."""
        return {
            user
            for plugged in self._plugged.values()
            if plugged.is_lasting and not plugged.read_only
            for user in plugged.users
        } - self._unmounted

    def unmounted(self, container_id: str) -> None:
        """The guest has let go of a container's disks."""
        self._unmounted.add(container_id)


def identify(disk: Disk) -> Identity:
    """What a path is, links followed, and which one of them.

    Raises:
        InvalidArgument: neither a regular file nor a block device.
    """
    try:
        found = os.stat(disk.path)
    except OSError as error:
        raise InvalidArgument(f"{disk.what}: {disk.path}: {error.strerror}") from error
    if stat.S_ISBLK(found.st_mode):
        return (-1, found.st_rdev)
    if stat.S_ISREG(found.st_mode):
        return (found.st_dev, found.st_ino)
    raise InvalidArgument(
        f"{disk.what}: {disk.path} is neither a block device nor an image file; give one of them"
    )
