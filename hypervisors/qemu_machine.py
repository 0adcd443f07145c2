"""A running QEMU: supervision, events, console, and the verbs of a virtual machine."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Final

import trio

from .console import ConsoleRing
from .errors import ControlError
from .machine import VmEvent, VmEventKind
from .qemu_devices import QemuDevices
from .qemu_exit import EndFacts, classify
from .qmp_client import QmpClient

if TYPE_CHECKING:
    import socket
    from collections.abc import Mapping

    from trio import TaskStatus

    from .child import Child
    from .machine import Device, GuestAddress, MachineSpec, VmExit
    from .qmp_protocol import Notification

# From the last event or the end of the control connection to the process's end. QEMU takes
# milliseconds; longer means that it hangs in its own exit.
EXIT_GRACE_S: Final = 3.0
# After the process has ended everything it sent is in our socket buffers; this is only a guard.
DRAIN_DEADLINE_S: Final = 0.5
QUIT_GRACE_S: Final = 1.0
EVENT_BACKLOG: Final = 64
CONSOLE_CHUNK_BYTES: Final = 65536
# QEMU hands over an emulated UART's bytes one by one; taking a guest's output in lots keeps a
# chatty guest from waking us for each. Far below what a reader notices.
CONSOLE_LOT_S: Final = 0.005


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
        self.dropped_events = 0
        self._child = child
        self._qmp = QmpClient(qmp, self._on_notification)
        self._console_socket = console
        self._devices = QemuDevices(spec, accelerator, self._qmp, addresses)
        self._facts = EndFacts()
        self._ending = trio.Event()
        self._exited = trio.Event()
        self._send_event, self.events = trio.open_memory_channel[VmEvent](EVENT_BACKLOG)

    def __repr__(self) -> str:
        return f"<QemuMachine pid={self.pid} exit={self.exit}>"

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
                await self._wait_process()
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
        if self._console_socket.fileno() >= 0:
            trio.lowlevel.notify_closing(self._console_socket)
            self._console_socket.close()
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

    async def _wait_process(self) -> None:
        """Return when the process has ended; end it when it outlives its own announcement."""
        async with trio.open_nursery() as nursery:

            async def enforce() -> None:
                await self._ending.wait()
                await trio.sleep(EXIT_GRACE_S)
                self.kill()

            nursery.start_soon(enforce)
            await self._child.wait()
            nursery.cancel_scope.cancel()

    async def _read_to_end(self, done: trio.Event) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._read_console)
            await self._qmp.run()
            self._devices.on_end()
            self._facts.protocol_failure = self._qmp.failure
            self._ending.set()
        done.set()

    async def _read_console(self) -> None:
        while True:
            try:
                data = self._console_socket.recv(CONSOLE_CHUNK_BYTES)
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self._console_socket)
                continue
            except OSError:
                return
            if not data:
                return
            self.console.feed(data)
            # Pacing, not waiting for anything: the socket buffer holds what comes meanwhile, and a
            # guest that fills it is slowed down by its own UART.
            if self._child.exit is None:
                await trio.sleep(CONSOLE_LOT_S)

    def _on_notification(self, notification: Notification) -> None:
        self._devices.on_notification(notification)
        match notification.name, notification.data:
            case "SHUTDOWN", {"reason": str(reason)}:
                self._facts.shutdown_reason = reason
                self._ending.set()
                self._emit(VmEventKind.SHUTDOWN, reason)
            case "GUEST_PANICKED", _:
                self._facts.panicked = True
                self._emit(VmEventKind.PANICKED)
            case "STOP", _ if not self._ending.is_set():
                self._emit(VmEventKind.PAUSED)
            case "RESUME", _:
                self._emit(VmEventKind.RESUMED)
            case "DEVICE_DELETED", {"device": str(device_id)}:
                self._emit(VmEventKind.DEVICE_REMOVED, device_id)

    def _emit(self, kind: VmEventKind, detail: str = "") -> None:
        event = VmEvent(kind=kind, detail=detail)
        try:
            self._send_event.send_nowait(event)
        except trio.WouldBlock:
            # The newest matters most: EXITED is the last one and must not be lost.
            self.events.receive_nowait()
            self.dropped_events += 1
            self._send_event.send_nowait(event)
        except trio.BrokenResourceError:
            # The reader has closed its end.
            self.dropped_events += 1

    def _conclude(self) -> None:
        if self.exit is not None or self._child.exit is None:
            return
        self.exit = classify(self._child.exit, self._facts, self._child.stderr_tail)
        self._exited.set()
        self._emit(VmEventKind.EXITED, self.exit.reason)
        self._send_event.close()
