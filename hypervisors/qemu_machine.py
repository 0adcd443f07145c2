"""A running QEMU: control, events, console, and what QMP does for the verbs of a machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from .errors import ControlError
from .machine import VmEventKind
from .qemu_devices import QemuDevices
from .qemu_exit import EndFacts, classify
from .qmp_client import QmpClient
from .supervised import QUIT_GRACE_S, SupervisedMachine
from .supervision import close_socket, read_console

if TYPE_CHECKING:
    import socket
    from collections.abc import Mapping

    from .child import Child, ChildExit
    from .machine import GuestAddress, MachineSpec, VmExit
    from .qmp_protocol import Notification


class QemuMachine(SupervisedMachine[QemuDevices]):
    """Implements `VirtualMachine`. Made by `Qemu.launch`."""

    def __init__(
        self,
        spec: MachineSpec,
        accelerator: str,
        child: Child,
        qmp: socket.socket,
        console: socket.socket,
        addresses: Mapping[str, GuestAddress],
    ) -> None:
        self._qmp = QmpClient(qmp, self._on_notification)
        super().__init__(spec, child, QemuDevices(spec, accelerator, self._qmp, addresses))
        self.accelerator = accelerator
        self._console_socket = console
        self._facts = EndFacts()

    async def negotiate(self) -> None:
        """Take control of QEMU; part of the launch."""
        await self._qmp.negotiate()

    async def pause(self) -> None:
        """See `VirtualMachine.pause`."""
        await self._qmp.execute("stop")

    async def resume(self) -> None:
        """See `VirtualMachine.resume`."""
        await self._qmp.execute("cont")

    async def _ask_guest_to_end(self) -> bool:
        return await self._ask("system_powerdown")

    async def _ask_vmm_to_end(self) -> bool:
        await self._ask("quit")
        return True

    async def _ask(self, command: str) -> bool:
        try:
            await self._qmp.execute(command, timeout_s=QUIT_GRACE_S)
        except ControlError:
            return False
        return True

    async def _read_to_end(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read_console, self._console_socket, self.console, self._child)
            await self._qmp.run()
            self._devices.on_end()
            self._facts.protocol_failure = self._qmp.failure
            self._ending.set()

    async def _release(self) -> None:
        await self._child.aclose()
        self._qmp.close()
        close_socket(self._console_socket)

    def _judge(self, ending: ChildExit) -> VmExit:
        return classify(ending, self._facts, self._child.stderr_tail)

    def _on_notification(self, notification: Notification) -> None:
        self._devices.on_notification(notification)
        match notification.name, notification.data:
            case "SHUTDOWN", {"reason": str(reason)}:
                self._facts.shutdown_reason = reason
                self._ending.set()
                self._events.emit(VmEventKind.SHUTDOWN, reason)
            case "GUEST_PANICKED", _:
                self._facts.panicked = True
                self._events.emit(VmEventKind.PANICKED)
            case "STOP", _ if not self._ending.is_set():
                self._events.emit(VmEventKind.PAUSED)
            case "RESUME", _:
                self._events.emit(VmEventKind.RESUMED)
            case "DEVICE_DELETED", {"device": str(device_id)}:
                self._events.emit(VmEventKind.DEVICE_REMOVED, device_id)
