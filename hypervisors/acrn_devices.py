"""Disks of a running acrn-dm: empty ones that are there from the start and are filled, once each.

Nothing else comes, and nothing goes: a slot keeps its file until the machine ends.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import trio

from . import acrn_argv
from .acrn_check import NAME, check_disk, refuse
from .disk_lease import lease
from .errors import CommandRejected, DetachRefused, PreconditionFailed
from .fixed_size import FixedSize
from .machine import BlockDevice

if TYPE_CHECKING:
    from .acrn_monitor import CommandMonitor
    from .disk_lease import Lease
    from .machine import Device, GuestAddress, MachineSpec


class AcrnDevices(FixedSize):
    """What is in the slots of one machine."""

    def __init__(self, spec: MachineSpec, monitor: CommandMonitor, leases: list[Lease]) -> None:
        super().__init__(NAME, spec.vcpus, acrn_argv.memory_mib(spec))
        self.addresses: dict[str, GuestAddress] = acrn_argv.addresses(spec)
        self._spec = spec
        self._monitor = monitor
        self._leases = leases
        self._filled: set[str] = set()
        self._empty = list(acrn_argv.empty_slots(spec))
        # Guards the slots across a command.
        self._lock = trio.Lock()

    def close(self) -> None:
        """Let other machines have the disks. Idempotent."""
        while self._leases:
            self._leases.pop().close()

    async def attach(self, device: Device) -> GuestAddress:
        """See `VirtualMachine.attach`."""
        self._refuse_the_dead(f"attach {device.id}")
        if not isinstance(device, BlockDevice):
            refuse(
                f"attach a {type(device).__name__} to a running machine",
                "its devices are those of the start, only empty disks are filled",
                "let the pod have it when it is created, or use another VMM ([hypervisor.qemu])",
            )
        check_disk(device)
        async with self._lock:
            if device.id in self.addresses:
                raise PreconditionFailed(
                    "device id", path=None, why=f"{device.id!r} is in use", fix="choose another"
                )
            if not self._empty:
                ports = self._spec.hotplug_ports
                refuse(
                    "attach another disk",
                    f"all {ports} hot-plug ports have had one, and they take one each",
                    "raise hotplug_ports in the configuration",
                )
            leased = lease(device)
            try:
                await self._fill(self._empty[0], device, leased)
            except CommandRejected:
                leased.close()
                raise
            except BaseException:
                # Whether acrn-dm has it is not known: then it is the machine's to its end.
                self._leases.append(leased)
                del self._empty[0]
                raise
            self._leases.append(leased)
            self._filled.add(device.id)
            self.addresses[device.id] = acrn_argv.address(self._empty.pop(0))
            return self.addresses[device.id]

    async def detach(self, device_id: str) -> None:
        """See `VirtualMachine.detach`: it is always refused."""
        await trio.lowlevel.checkpoint()
        if device_id not in self._filled:
            raise KeyError(device_id)
        self._refuse_the_dead(f"detach {device_id}")
        raise DetachRefused(device_id, "acrn-dm keeps a disk until the machine ends")

    async def _fill(self, slot: int, device: BlockDevice, leased: Lease) -> None:
        # By our descriptor: what was checked and locked is what it opens, and no name of the file
        # can be mistaken for an option.
        path = f"/proc/{os.getpid()}/fd/{leased.fd}"
        options = acrn_argv.disk_options(path, read_only=device.read_only)
        await self._monitor.command("blkrescan", f"{slot},{options}")
