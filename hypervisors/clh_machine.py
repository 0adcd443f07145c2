"""A running Cloud Hypervisor: supervision, events, console, and the verbs of a virtual machine."""

from __future__ import annotations

import contextlib
import signal
from typing import TYPE_CHECKING, Final, Literal

import trio

from .clh_devices import API, ClhDevices
from .clh_events import EndFacts, EventStream, classify
from .console import ConsoleRing
from .errors import ControlError
from .machine import VmEventKind
from .supervision import VmEvents, read_console, wait_process

if TYPE_CHECKING:
    import socket
    from collections.abc import Mapping

    from trio import TaskStatus

    from .child import Child
    from .clh_events import MonitorEvent
    from .disk_nodes import DiskNodes
    from .http_api import HttpApi
    from .machine import Device, GuestAddress, MachineSpec, VmEvent, VmExit

# After the process has ended everything it sent is in our socket buffers; this is only a guard.
DRAIN_DEADLINE_S: Final = 0.5
QUIT_GRACE_S: Final = 1.0
EVENT_CHUNK_BYTES: Final = 65536


class ClhMachine:
    """Implements `VirtualMachine`. Made by `CloudHypervisor.launch`."""

    accelerator: Literal["kvm"] = "kvm"

    def __init__(
        self,
        spec: MachineSpec,
        child: Child,
        api: HttpApi,
        monitor: socket.socket,
        console: socket.socket,
        *,
        nodes: DiskNodes | None,
        directory: str,
    ) -> None:
        self.pid = child.pid
        self.console = ConsoleRing(spec.console_bytes)
        self.exit: VmExit | None = None
        self.dropped_monitor_events = 0
        self._child = child
        self._api = api
        self._monitor = monitor
        self._console_socket = console
        self._resources = contextlib.AsyncExitStack()
        self._devices = ClhDevices(spec, api, child.pid, nodes, directory)
        self._facts = EndFacts()
        self._ending = trio.Event()
        self._exited = trio.Event()
        self._events = VmEvents()

    def __repr__(self) -> str:
        return f"<ClhMachine pid={self.pid} exit={self.exit}>"

    @property
    def events(self) -> trio.MemoryReceiveChannel[VmEvent]:
        """See `VirtualMachine.events`."""
        return self._events.receive

    @property
    def addresses(self) -> Mapping[str, GuestAddress]:
        """See `VirtualMachine.addresses`."""
        return self._devices.addresses

    def place(self, addresses: Mapping[str, GuestAddress]) -> None:
        """Take where the guest finds the devices of the specification; part of the launch."""
        self._devices.addresses.update(addresses)

    def keep(self, resources: contextlib.AsyncExitStack) -> None:
        """Take what the launch made, the process first of all; released by `aclose`."""
        self._resources = resources

    async def run(self, *, task_status: TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """See `VirtualMachine.run`."""
        try:
            async with trio.open_nursery() as nursery:
                read_to_end = trio.Event()
                nursery.start_soon(self._child.run)
                nursery.start_soon(self._read_to_end, read_to_end)
                task_status.started()
                await wait_process(self._child, self._ending)
                # Its end is no answer: those who wait for one must not wait for their deadline.
                self._api.close()
                self._devices.on_end()
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
        if grace_s > 0 and await self._ask("vm.power-button"):
            with trio.move_on_after(grace_s):
                return await self.wait_exited()
        # Not SIGKILL at once: this flushes what block devices still hold.
        self._facts.told_to_quit = True
        await self._ask("vmm.shutdown")
        with trio.move_on_after(QUIT_GRACE_S):
            return await self.wait_exited()
        self.kill()
        return await self.wait_exited()

    def kill(self) -> None:
        """See `VirtualMachine.kill`."""
        self._child.send_signal(signal.SIGKILL)

    async def aclose(self) -> None:
        """See `VirtualMachine.aclose`. Idempotent; sets the exit when nothing else did."""
        await self._resources.aclose()
        self._devices.close()
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
        await self._api.request("PUT", f"{API}/vm.pause")

    async def resume(self) -> None:
        """See `VirtualMachine.resume`."""
        await self._api.request("PUT", f"{API}/vm.resume")

    async def _ask(self, action: str) -> bool:
        try:
            await self._api.request("PUT", f"{API}/{action}", timeout_s=QUIT_GRACE_S)
        except ControlError:
            return False
        return True

    async def _read_to_end(self, done: trio.Event) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read_console, self._console_socket, self.console, self._child)
            await self._read_monitor()
            self._ending.set()
        done.set()

    async def _read_monitor(self) -> None:
        stream = EventStream()
        while True:
            try:
                data = self._monitor.recv(EVENT_CHUNK_BYTES)
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self._monitor)
                continue
            except OSError:
                return
            if not data:
                return
            for event in stream.feed(data):
                self._on_event(event)
            self.dropped_monitor_events = stream.dropped
            # A flood of events must not keep the loop from everybody else.
            await trio.lowlevel.checkpoint()

    def _on_event(self, event: MonitorEvent) -> None:
        match event.source, event.name:
            case "vm", "paused":
                self._events.emit(VmEventKind.PAUSED)
            case "vm", "resumed":
                self._events.emit(VmEventKind.RESUMED)
            case "vm", "device-removed":
                device_id = event.properties.get("id", "")
                self._devices.on_removed(device_id)
                self._events.emit(VmEventKind.DEVICE_REMOVED, device_id)
            case "vm", "shutdown" if not self._ending.is_set():
                self._events.emit(VmEventKind.SHUTDOWN, event.name)
            case "vm", "rebooting":
                # Left alone it would start the guest's kernel again, with nobody's containers.
                self._facts.rebooted = True
                self._end_now(VmEventKind.SHUTDOWN, "guest-reset")
            case "guest", "panic":
                self._facts.panicked = True
                self._end_now(VmEventKind.PANICKED)

    def _end_now(self, kind: VmEventKind, detail: str = "") -> None:
        if not self._ending.is_set():
            self._events.emit(kind, detail)
        self._ending.set()
        self.kill()

    def _conclude(self) -> None:
        if self.exit is not None or self._child.exit is None:
            return
        self.exit = classify(self._child.exit, self._facts, self._child.stderr_tail)
        self._exited.set()
        self._events.end(self.exit.reason)
