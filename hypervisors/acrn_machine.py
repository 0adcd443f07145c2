"""A running acrn-dm: its events, its console, and what can be asked of it."""

from __future__ import annotations

import contextlib
import signal
from typing import TYPE_CHECKING, Final, NoReturn

import trio

from . import acrn_messages
from .acrn_check import NAME, OTHER_VMM, refuse
from .acrn_devices import AcrnDevices
from .acrn_exit import EndFacts, classify
from .errors import ControlError, ControlLost
from .machine import VmEventKind
from .supervised import QUIT_GRACE_S, SupervisedMachine
from .supervision import EXIT_GRACE_S, read_console

if TYPE_CHECKING:
    import socket

    from .acrn_monitor import CommandMonitor
    from .child import Child, ChildExit
    from .disk_lease import Lease
    from .machine import MachineSpec, VmExit

LAST_LINES: Final = 4


class AcrnMachine(SupervisedMachine[AcrnDevices]):
    """Implements `VirtualMachine`. Made by `Acrn.launch`."""

    accelerator: Final = NAME

    def __init__(
        self,
        spec: MachineSpec,
        child: Child,
        monitor: CommandMonitor,
        console: socket.socket,
        ready: socket.socket,
        leases: list[Lease],
    ) -> None:
        super().__init__(spec, child, AcrnDevices(spec, monitor, leases))
        self._monitor = monitor
        self._console_socket = console
        self._ready = ready
        self._facts = EndFacts()
        self._resources = contextlib.AsyncExitStack()
        monitor.on_event = self._on_event

    def keep(self, resources: contextlib.AsyncExitStack) -> None:
        """Take what the launch made, the process first of all; released by `aclose`."""
        self._resources = resources

    async def register(self) -> None:
        """Ask for events; part of the launch.

        Raises:
            ControlError: there will be none.
        """
        problem: ControlError | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._monitor.run)
            try:
                await self._monitor.command("register_vm_event_client")
            except ControlError as error:
                problem = error
            nursery.cancel_scope.cancel()
        if problem is not None:
            raise problem

    async def pause(self) -> None:
        """See `VirtualMachine.pause`."""
        await self._refuse("pause a machine", "pause")

    async def resume(self) -> None:
        """See `VirtualMachine.resume`."""
        await self._refuse("resume a machine", "resume")

    def _on_event(self, number: int) -> None:
        if number == acrn_messages.TRIPLE_FAULT:
            self._facts.triple_fault = True
        elif number == acrn_messages.POWERED_OFF:
            self._facts.powered_off = True
            reason = "guest-reset" if self._facts.triple_fault else "guest-shutdown"
            self._events.emit(VmEventKind.SHUTDOWN, reason)
            self._ending.set()

    async def _refuse(self, operation: str, command: str) -> NoReturn:
        await trio.lowlevel.checkpoint()
        if self._child.exit is not None:
            raise ControlLost(command)
        refuse(operation, "acrn-dm has no command for it", OTHER_VMM)

    async def _ask_guest_to_end(self) -> bool:
        # The monitor has no power button.
        return False

    async def _ask_vmm_to_end(self) -> bool:
        self._facts.told_to_quit = True
        try:
            await self._monitor.command("destroy", timeout_s=QUIT_GRACE_S)
        except ControlError:
            return False
        # It looks at what it was told when an event wakes it, which the command alone is not.
        # Source: devicemodel/core/mevent.c mevent_dispatch.
        return self._child.send_signal(signal.SIGINT)

    def _on_process_end(self) -> None:
        self._devices.on_end()

    async def _read_to_end(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read_console, self._console_socket, self.console, self._child)
            nursery.start_soon(self._watch_for_reset)
            await self._monitor.run()
            self._ending.set()

    async def _watch_for_reset(self) -> None:
        """End a machine whose guest was reset by its VMM, which runs it again without its pod.

        All devices are made anew then, and the connection of this one ends.
        """
        await read_to_end(self._ready)
        if self._facts.is_announced:
            return
        with trio.move_on_after(EXIT_GRACE_S):
            await self._child.wait()
            return
        self._facts.was_reset = True
        self._events.emit(VmEventKind.SHUTDOWN, "guest-reset")
        self.kill()

    async def _release(self) -> None:
        await self._resources.aclose()
        self._monitor.close()
        self._devices.close()

    def _judge(self, ending: ChildExit) -> VmExit:
        words = self._child.stderr_tail or self.console.tail(LAST_LINES)
        return classify(ending, self._facts, words)


async def read_to_end(sock: socket.socket) -> None:
    """Return at the connection's end; what comes before is dropped."""
    while True:
        try:
            if not sock.recv(4096):
                return
        except BlockingIOError:
            await trio.lowlevel.wait_readable(sock)
        except OSError:
            return
        else:
            await trio.lowlevel.checkpoint()
