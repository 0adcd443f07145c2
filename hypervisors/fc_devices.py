"""Disks of a running Firecracker: slots that are there from the start, filled and emptied.

A slot is a drive of the machine over a placeholder; another file takes its place without the guest
having a say, and the guest sees the size change. That is all: nothing else comes or goes.
"""

from __future__ import annotations

import os
from collections import deque
from typing import TYPE_CHECKING, Final, NoReturn

import trio

from . import fc_config, spec_check
from .disk_lease import lease
from .errors import ControlError, HttpRejected, PreconditionFailed, Unsupported
from .fixed_size import FixedSize
from .http_api import REQUEST_TIMEOUT_S
from .machine import BlockDevice, GuestAddress

if TYPE_CHECKING:
    from .disk_lease import Lease
    from .fc_config import Slot
    from .fc_room import Room
    from .http_api import HttpApi
    from .machine import Device, MachineSpec

NAME: Final = "firecracker"
UNDO_DEADLINE_S: Final = 2.0


class FcDevices(FixedSize):
    """What is in the slots of one machine."""

    def __init__(self, spec: MachineSpec, room: Room) -> None:
        super().__init__(NAME, spec.vcpus, spec.memory_mib)
        self.addresses: dict[str, GuestAddress] = fc_config.addresses(spec)
        self._spec = spec
        self._api: HttpApi | None = None
        self._room = room
        self._leases: dict[str, Lease] = {}
        # Of disks that the VMM may have, or not: then they are the machine's to its end.
        self._lost: list[Lease] = []
        self._plugged: dict[str, Slot] = {}
        # The one that is empty for longest is filled first: the guest may still be learning that
        # another was emptied.
        self._free = deque(fc_config.slots(spec))
        # Guards the slots across the requests of one change.
        self._lock = trio.Lock()

    def use(self, api: HttpApi) -> None:
        """Take the machine's API, which is there when its process is."""
        self._api = api

    def keep(self, device_id: str, leased: Lease) -> None:
        """Take the lease of a disk of the specification."""
        self._leases[device_id] = leased

    def close(self) -> None:
        """Let other machines have the disks. Idempotent."""
        while self._leases:
            self._leases.popitem()[1].close()
        while self._lost:
            self._lost.pop().close()

    async def attach(self, device: Device) -> GuestAddress:
        """See `VirtualMachine.attach`."""
        self._refuse_the_dead(f"attach {device.id}")
        if not isinstance(device, BlockDevice):
            self._refuse(
                f"attach a {type(device).__name__} to a running machine",
                "its devices are those of the start, only disks are exchanged",
                "let the pod have it when it is created, or use another VMM ([hypervisor.qemu])",
            )
        self._check(device)
        async with self._lock:
            if device.id in self.addresses:
                raise PreconditionFailed(
                    "device id", path=None, why=f"{device.id!r} is in use", fix="choose another"
                )
            slot = self._free_slot(device)
            leased = lease(device)
            try:
                _check_size(device, leased)
                await self._fill(slot, device, leased)
            except BaseException:
                if slot in self._free:
                    leased.close()
                else:
                    self._lost.append(leased)
                raise
            self._free.remove(slot)
            self._leases[device.id] = leased
            self._plugged[device.id] = slot
            self.addresses[device.id] = GuestAddress(node=slot.node)
            return self.addresses[device.id]

    async def detach(self, device_id: str) -> None:
        """See `VirtualMachine.detach`. The guest is not asked: it must have let go of the disk."""
        async with self._lock:
            slot = self._plugged.get(device_id)
            if slot is None:
                raise KeyError(device_id)
            await self._patch(slot, self._room.placeholder)
            del self._plugged[device_id], self.addresses[device_id]
            self._free.append(slot)
            self._leases.pop(device_id).close()

    def _refuse(self, operation: str, why: str, hint: str) -> NoReturn:
        raise Unsupported(NAME, operation, why, hint)

    def _check(self, device: BlockDevice) -> None:
        if not spec_check.DEVICE_ID.fullmatch(device.id):
            raise PreconditionFailed(
                "device id", path=None, why=f"{device.id!r}", fix="use letters, digits, - and _"
            )

    def _free_slot(self, device: BlockDevice) -> Slot:
        for slot in self._free:
            if slot.read_only is device.read_only:
                return slot
        ports = self._spec.hotplug_ports
        if not device.read_only or ports <= fc_config.READ_ONLY_SLOTS:
            why, hint = f"all {ports} hot-plug ports are taken", "raise hotplug_ports"
            self._refuse("attach another device", why, f"{hint} in the configuration")
        self._refuse(
            "attach another read-only disk",
            f"all {fc_config.READ_ONLY_SLOTS} slots of that kind are taken",
            "use fewer, or another VMM ([hypervisor.qemu])",
        )

    async def _fill(self, slot: Slot, device: BlockDevice, leased: Lease) -> None:
        try:
            if self._room.nodes is None:
                await self._patch(slot, str(device.path))
                return
            with self._room.nodes.exposed(device, leased) as name:
                await self._patch(slot, f"{self._room.disks_inside}/{name}")
        except HttpRejected:
            raise
        except BaseException:
            # Whether it took its place is not known.
            with trio.CancelScope(shield=True):
                if not await self._take_back(slot):
                    self._free.remove(slot)
            raise

    async def _take_back(self, slot: Slot) -> bool:
        """Have the placeholder in a slot again; False when the VMM doesn't say so. Bounded."""
        try:
            await self._patch(slot, self._room.placeholder, timeout_s=UNDO_DEADLINE_S)
        except ControlError:
            return False  # the caller's error says why
        return True

    async def _patch(self, slot: Slot, path: str, timeout_s: float = REQUEST_TIMEOUT_S) -> None:
        body: fc_config.Body = {"drive_id": slot.drive_id, "path_on_host": path}
        assert self._api is not None
        await self._api.request("PATCH", f"/drives/{slot.drive_id}", body, timeout_s=timeout_s)


def _check_size(device: BlockDevice, leased: Lease) -> None:
    size = os.lseek(leased.fd, 0, os.SEEK_END)
    if size < 2 * fc_config.PLACEHOLDER_BYTES:
        raise PreconditionFailed(
            f"block device {device.id}", path=device.path,
            why=f"it has {size} bytes, which the guest cannot tell from an empty slot",
            fix=f"give one of {2 * fc_config.PLACEHOLDER_BYTES} bytes or more",
        )  # fmt: skip
