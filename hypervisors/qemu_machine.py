"""A running QEMU: supervision, events, console, and the verbs of a virtual machine."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Final

import trio

from .console import ConsoleRing
from .errors import ControlError
from .machine import VmEventKind
from .qemu_devices import QemuDevices
from .qemu_exit import EndFacts, classify
from .qmp_client import QmpClient
from .supervision import VmEvents, close_socket, read_console, wait_process

if TYPE_CHECKING:
    import socket
    from collections.abc import Mapping

    from trio import TaskStatus

    from .child import Child
    from .machine import Device, GuestAddress, MachineSpec, VmEvent, VmExit
    from .qmp_protocol import Notification

# After the process has ended everything it sent is in our socket buffers; this is only a guard.
DRAIN_DEADLINE_S: Final = 0.5
QUIT_GRACE_S: Final = 1.0


class QemuMachine:
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
        self.accelerator = accelerator
        self.pid = child.pid
        self.console = ConsoleRing(spec.console_bytes)
        self.exit: VmExit | None = None
        self._child = child
        self._qmp = QmpClient(qmp, self._on_notification)
        self._console_socket = console
        self._devices = QemuDevices(spec, accelerator, self._qmp, addresses)
        self._facts = EndFacts()
        self._ending = trio.Event()
        self._exited = trio.Event()
        self._events = VmEvents()

    def __repr__(self) -> str:
        return f"<QemuMachine pid={self.pid} exit={self.exit}>"

    @property
    def events(self) -> trio.MemoryReceiveChannel[VmEvent]:
        """See `VirtualMachine.events`."""
        return self._events.receive

    @property
    def addresses(self) -> Mapping[str, GuestAddress]:
        """See `VirtualMachine.addresses`."""
        return self._devices.addresses

    async def negotiate(self) -> None:
        """Take control of QEMU; part of the launch."""
        await self._qmp.negotiate()

    async def run(self, *, task_status: TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """See `VirtualMachine.run`."""
        try:
            async with trio.open_nursery() as nursery:
                read_to_end = trio.Event()
                nursery.start_soon(self._child.run)
                nursery.start_soon(self._read_to_end, read_to_end)
                task_status.started()
                await wait_process(self._child, self._ending)
                with trio.move_on_after(DRAIN_DEADLINE_S):
                    await read_to_end.wait()
                nursery.cancel_scope.cancel()
        finally:
            await self.aclose()

    async def wait_exited(self) -> VmExit:
        """See `VirtualMachine.wait_exited`."""
        await self._exited.wait()
        assert self.exit is not None
        return self.exit

    async def shutdown(self, grace_s: float) -> VmExit:
        """See `VirtualMachine.shutdown`. Cancelled halfway, the VMM may live on."""
        if grace_s > 0 and await self._ask("system_powerdown"):
            with trio.move_on_after(grace_s):
                return await self.wait_exited()
        # Not SIGKILL at once: `quit` flushes what block devices still hold.
        await self._ask("quit")
        with trio.move_on_after(QUIT_GRACE_S):
            return await self.wait_exited()
        self.kill()
        return await self.wait_exited()

    def kill(self) -> None:
        """See `VirtualMachine.kill`."""
        self._child.send_signal(signal.SIGKILL)

    async def aclose(self) -> None:
        """See `VirtualMachine.aclose`. Idempotent; sets the exit when nothing else did."""
        await self._child.aclose()
        self._qmp.close()
        close_socket(self._console_socket)
        self._conclude()

    async def attach(self, device: Device) -> GuestAddress:
        """See `VirtualMachine.attach`."""
        return await self._devices.attach(device)

    async def detach(self, device_id: str) -> None:
        """See `VirtualMachine.detach`."""
        await self._devices.detach(device_id)

    async def resize_vcpus(self, count: int) -> int:
        """See `VirtualMachine.resize_vcpus`."""
        return await self._devices.resize_vcpus(count)

    async def resize_memory(self, mib: int) -> int:
        """See `VirtualMachine.resize_memory`."""
        return await self._devices.resize_memory(mib)

    async def pause(self) -> None:
        """See `VirtualMachine.pause`."""
        await self._qmp.execute("stop")

    async def resume(self) -> None:
        """See `VirtualMachine.resume`."""
        await self._qmp.execute("cont")

    async def _ask(self, command: str) -> bool:
        try:
            await self._qmp.execute(command, timeout_s=QUIT_GRACE_S)
        except ControlError:
            return False
        return True

    async def _read_to_end(self, done: trio.Event) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read_console, self._console_socket, self.console, self._child)
            await self._qmp.run()
            self._devices.on_end()
            self._facts.protocol_failure = self._qmp.failure
            self._ending.set()
        done.set()

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

    def _conclude(self) -> None:
        if self.exit is not None or self._child.exit is None:
            return
        self.exit = classify(self._child.exit, self._facts, self._child.stderr_tail)
        self._exited.set()
        self._events.end(self.exit.reason)
