"""A running Cloud Hypervisor: events, console, and what its API does for a machine's verbs."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Final, Literal

import trio

from .clh_devices import API, ClhDevices
from .clh_events import EndFacts, EventStream, classify
from .errors import ControlError
from .machine import VmEventKind
from .supervised import QUIT_GRACE_S, SupervisedMachine
from .supervision import read_console

if TYPE_CHECKING:
    import socket
    from collections.abc import Mapping

    from .child import Child, ChildExit
    from .clh_events import MonitorEvent
    from .disk_nodes import DiskNodes
    from .http_api import HttpApi
    from .machine import GuestAddress, MachineSpec, VmExit

EVENT_CHUNK_BYTES: Final = 65536


class ClhMachine(SupervisedMachine[ClhDevices]):
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
        super().__init__(spec, child, ClhDevices(spec, api, child.pid, nodes, directory))
        self.dropped_monitor_events = 0
        self._api = api
        self._monitor = monitor
        self._console_socket = console
        self._resources = contextlib.AsyncExitStack()
        self._facts = EndFacts()

    def place(self, addresses: Mapping[str, GuestAddress]) -> None:
        """Take where the guest finds the devices of the specification; part of the launch."""
        self._devices.addresses.update(addresses)

    def keep(self, resources: contextlib.AsyncExitStack) -> None:
        """Take what the launch made, the process first of all; released by `aclose`."""
        self._resources = resources

    async def pause(self) -> None:
        """See `VirtualMachine.pause`."""
        await self._api.request("PUT", f"{API}/vm.pause")

    async def resume(self) -> None:
        """See `VirtualMachine.resume`."""
        await self._api.request("PUT", f"{API}/vm.resume")

    async def _ask_guest_to_end(self) -> bool:
        return await self._ask("vm.power-button")

    async def _ask_vmm_to_end(self) -> bool:
        self._facts.told_to_quit = True
        await self._ask("vmm.shutdown")
        return True

    async def _ask(self, action: str) -> bool:
        try:
            await self._api.request("PUT", f"{API}/{action}", timeout_s=QUIT_GRACE_S)
        except ControlError:
            return False
        return True

    def _on_process_end(self) -> None:
        # Its end is no answer: those who wait for one must not wait for their deadline.
        self._api.close()
        self._devices.on_end()

    async def _read_to_end(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read_console, self._console_socket, self.console, self._child)
            await self._read_monitor()
            self._ending.set()

    async def _release(self) -> None:
        await self._resources.aclose()
        self._devices.close()

    def _judge(self, ending: ChildExit) -> VmExit:
        return classify(ending, self._facts, self._child.stderr_tail)

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
