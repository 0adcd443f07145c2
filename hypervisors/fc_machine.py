"""A running Firecracker: log, metrics, console, and what its API does for a machine's verbs."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Final, Literal

import trio

from .errors import ControlError
from .fc_devices import FcDevices
from .fc_exit import PANIC_LINES, EndFacts, classify, faults
from .fc_room import LOG, METRICS
from .fifo_lines import FifoLines
from .machine import ExitKind, VmEventKind
from .supervised import QUIT_GRACE_S, SupervisedMachine
from .supervision import close_socket, read_console

if TYPE_CHECKING:
    import socket

    from .child import Child, ChildExit
    from .fc_room import Room
    from .http_api import HttpApi
    from .machine import MachineSpec, VmExit

# Version 1.16's have 12 KiB with two drives and an interface, of which each adds half a KiB.
MAX_METRICS_BYTES: Final = 65536
_LAST_WORDS: Final = 6


class FcVoices:
    """What a Firecracker says besides its API: the log, the metrics; its stderr is the child's."""

    def __init__(self, room: Room, facts: EndFacts) -> None:
        self._facts = facts
        self.log = FifoLines(room.path(LOG))
        try:
            self.metrics = FifoLines(
                room.path(METRICS), self._on_metrics, max_line=MAX_METRICS_BYTES
            )
        except OSError:
            self.log.close()
            raise
        for name in (LOG, METRICS):
            room.directory.give(room.path(name))

    def last_words(self, child: Child) -> list[str]:
        """What it said last, on stderr and to its log."""
        self.log.drain()
        return [*child.stderr_tail[-_LAST_WORDS:], *self.log.tail(_LAST_WORDS)]

    def drain(self) -> None:
        """Take what is left when it has ended."""
        self.log.drain()
        self.metrics.drain()

    def close(self) -> None:
        """Idempotent."""
        self.log.close()
        self.metrics.close()

    def _on_metrics(self, line: bytes) -> None:
        # Each line counts from the one before. Source: docs/metrics.md of Firecracker v1.16.
        for words, count in faults(line).items():
            self._facts.faults[words] = self._facts.faults.get(words, 0) + count


class FcMachine(SupervisedMachine[FcDevices]):
    """Implements `VirtualMachine`. Made by `Firecracker.launch`."""

    accelerator: Literal["kvm"] = "kvm"

    def __init__(
        self,
        spec: MachineSpec,
        child: Child,
        api: HttpApi,
        console: socket.socket,
        devices: FcDevices,
        voices: FcVoices,
        facts: EndFacts,
    ) -> None:
        super().__init__(spec, child, devices)
        self._api = api
        self._console_socket = console
        self._voices = voices
        self._facts = facts
        self._resources = contextlib.AsyncExitStack()

    def keep(self, resources: contextlib.AsyncExitStack) -> None:
        """Take what the launch made, the process first of all; released by `aclose`."""
        self._resources = resources

    async def detach(self, device_id: str) -> None:
        """See `VirtualMachine.detach`."""
        await super().detach(device_id)
        self._events.emit(VmEventKind.DEVICE_REMOVED, device_id)

    async def pause(self) -> None:
        """See `VirtualMachine.pause`."""
        await self._api.request("PATCH", "/vm", {"state": "Paused"})
        self._events.emit(VmEventKind.PAUSED)

    async def resume(self) -> None:
        """See `VirtualMachine.resume`."""
        await self._api.request("PATCH", "/vm", {"state": "Resumed"})
        self._events.emit(VmEventKind.RESUMED)

    async def _ask_guest_to_end(self) -> bool:
        # The guest's kernel reboots at these keys, and its reboot is the VMM's end.
        self._facts.told_to_end = True
        body = {"action_type": "SendCtrlAltDel"}
        try:
            await self._api.request("PUT", "/actions", body, timeout_s=QUIT_GRACE_S)
        except ControlError:
            return False
        return True

    async def _ask_vmm_to_end(self) -> bool:
        # There is no such request. Its disks are files it writes to without a cache of its own.
        return False

    def _on_process_end(self) -> None:
        # Its end is no answer: those who wait for one must not wait for their deadline.
        self._api.close()
        self._devices.on_end()
        self._voices.drain()

    async def _read_to_end(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._voices.log.run)
            nursery.start_soon(self._voices.metrics.run)
            await read_console(self._console_socket, self.console, self._child)
            nursery.cancel_scope.cancel()

    async def _release(self) -> None:
        await self._resources.aclose()
        self._devices.on_end()
        self._devices.close()
        close_socket(self._console_socket)

    def _judge(self, ending: ChildExit) -> VmExit:
        found = classify(
            ending,
            self._facts,
            self.console.tail(PANIC_LINES),
            self._voices.last_words(self._child),
        )
        if found.kind is ExitKind.PANIC:
            self._events.emit(VmEventKind.PANICKED)
        return found
