"""Hot-plug in a running QEMU: block, network, vCPUs, memory.

Devices go into root ports that were laid out at launch, one each. Unplugging is the guest's
decision: it is asked, and its answer arrives as an event.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import trio

from . import qemu_argv, spec_check
from .disk_lease import lease
from .errors import ControlError, PreconditionFailed, Unsupported
from .machine import BlockDevice, NetDevice
from .qemu_board import INSTEAD, find_board
from .qemu_removal import Removals
from .qemu_resize import QemuResize

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from .machine import Device, GuestAddress, MachineSpec
    from .qmp_client import QmpClient
    from .qmp_protocol import JsonValue, Notification

UNDO_DEADLINE_S: Final = 2.0


@dataclass(slots=True)
class _Plugged:
    port: int
    # Commands that release the host side, in order.
    release: list[tuple[str, dict[str, JsonValue]]] = field(default_factory=list)


class QemuDevices:
    """What is plugged into one machine, and how to change it."""

    def __init__(
        self,
        spec: MachineSpec,
        accelerator: str,
        qmp: QmpClient,
        addresses: Mapping[str, GuestAddress],
    ) -> None:
        self.addresses: dict[str, GuestAddress] = dict(addresses)
        self._qmp = qmp
        self._board = find_board(spec.machine_type)
        self._ports = spec.hotplug_ports
        self._plugged: dict[str, _Plugged] = {}
        self._removals = Removals(qmp)
        self._resize = QemuResize(spec, accelerator, qmp, self._removals)
        # Guards `_plugged` and the ports across the commands of one change.
        self._lock = trio.Lock()

    def on_notification(self, notification: Notification) -> None:
        """Take an event of the machine."""
        self._removals.on_notification(notification)

    def on_end(self) -> None:
        """The machine has ended; wakes those who wait for it."""
        self._removals.on_end()

    async def attach(self, device: Device) -> GuestAddress:
        """See `VirtualMachine.attach`."""
        self._refuse_unpluggable(device)
        async with self._lock:
            if device.id in self.addresses:
                raise PreconditionFailed(
                    "device id", path=None, why=f"{device.id!r} is in use", fix="choose another"
                )
            plugged = _Plugged(port=self._free_port())
            try:
                await self._plug(device, plugged)
            except BaseException:
                # What was made for the device is useless without it. If the deadline fires, the
                # host side stays open in QEMU until the machine ends.
                with trio.move_on_after(UNDO_DEADLINE_S, shield=True):
                    await self._release(plugged)
                raise
            self._plugged[device.id] = plugged
            address = self.addresses[device.id] = qemu_argv.port_address(plugged.port)
            return address

    async def detach(self, device_id: str) -> None:
        """See `VirtualMachine.detach`."""
        async with self._lock:
            plugged = self._plugged[device_id]
            await self._removals.remove(device_id)
            del self._plugged[device_id], self.addresses[device_id]
            await self._release(plugged)

    async def resize_vcpus(self, count: int) -> int:
        """See `VirtualMachine.resize_vcpus`."""
        async with self._lock:
            return await self._resize.vcpus(count)

    async def resize_memory(self, mib: int) -> int:
        """See `VirtualMachine.resize_memory`."""
        async with self._lock:
            return await self._resize.memory(mib)

    def _refuse_unpluggable(self, device: Device) -> None:
        if not self._board.takes_devices:
            raise Unsupported(
                "qemu",
                f"attach {device.id} to a running {self._board.name}",
                "it has no bus for devices that come later",
                f"set {INSTEAD}",
            )
        match device:
            case NetDevice():
                spec_check.check_net(device)
            case BlockDevice():
                os.close(spec_check.open_block(device)[0])
            case _:
                raise Unsupported(
                    "qemu",
                    f"attach a {type(device).__name__} to a running machine",
                    "only block and network devices are hot-plugged",
                    "put it into the specification",
                )
        if not spec_check.DEVICE_ID.fullmatch(device.id):
            raise PreconditionFailed(
                "device id", path=None, why=f"{device.id!r}", fix="use letters, digits, - and _"
            )

    def _free_port(self) -> int:
        taken = {plugged.port for plugged in self._plugged.values()}
        for port in range(self._ports):
            if port not in taken:
                return port
        raise Unsupported(
            "qemu",
            "attach another device",
            f"all {self._ports} hot-plug ports are taken",
            "raise hotplug_ports in the configuration",
        )

    async def _plug(self, device: Device, plugged: _Plugged) -> None:
        match device:
            case BlockDevice():
                await self._add_image(device, plugged)
                properties = qemu_argv.block_device(device)
            case NetDevice():
                await self._add_tap(device, plugged)
                properties = qemu_argv.net_device(device)
            case _:
                raise AssertionError(device)
        self._removals.forget(device.id)
        await self._qmp.execute("device_add", properties | qemu_argv.port_place(plugged.port))

    async def _add_image(self, device: BlockDevice, plugged: _Plugged) -> None:
        """Open the image here: the VMM's user need not be able to."""
        fd_set = qemu_argv.port_fd_set(plugged.port)
        leased = lease(device)
        try:
            await self._qmp.execute("add-fd", {"fdset-id": fd_set}, fds=[leased.fd])
        finally:
            leased.close()
        plugged.release.append(("remove-fd", {"fdset-id": fd_set}))
        node = qemu_argv.blockdev_node(device, leased.driver, fd_set)
        await self._qmp.execute("blockdev-add", node)
        # Released first: the descriptors of a set that is in use stay.
        plugged.release.insert(0, ("blockdev-del", {"node-name": node["node-name"]}))

    async def _add_tap(self, device: NetDevice, plugged: _Plugged) -> None:
        taps = await self._give_fds(f"t-{device.id}", device.tap_fds)
        backend: dict[str, JsonValue] = {"type": "tap", "id": f"n-{device.id}", "fds": taps}
        if device.vhost_fds:
            vhosts = await self._give_fds(f"v-{device.id}", device.vhost_fds)
            backend |= {"vhost": True, "vhostfds": vhosts}
        await self._qmp.execute("netdev_add", backend)
        plugged.release.append(("netdev_del", {"id": f"n-{device.id}"}))

    async def _give_fds(self, prefix: str, fds: Sequence[int]) -> str:
        """Hand descriptors to QEMU under names; a name given again replaces its descriptor."""
        names = [f"{prefix}-{index}" for index in range(len(fds))]
        for name, fd in zip(names, fds, strict=True):
            await self._qmp.execute("getfd", {"fdname": name}, fds=[fd])
        return ":".join(names)

    async def _release(self, plugged: _Plugged) -> None:
        """Release the host side; a machine that is dying has released it already."""
        for command, arguments in plugged.release:
            with contextlib.suppress(ControlError):
                await self._qmp.execute(command, arguments)
