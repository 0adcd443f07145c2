"""What every backend's running machine has in common: its supervision, its one exit, its end.

    run ── child           pidfd, stderr
        ├─ _read_to_end    what the VMM says: control, events, console
        └─ aclose          _release, then the exit is set

A backend derives from it and fills in the methods that raise NotImplementedError.
"""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Final, Generic, Protocol, TypeVar

import trio

from .console import ConsoleRing
from .supervision import VmEvents, wait_process

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trio import TaskStatus

    from .child import Child, ChildExit
    from .machine import Device, GuestAddress, MachineSpec, VmEvent, VmExit

# After the process has ended everything it sent is in our socket buffers; this is only a guard.
DRAIN_DEADLINE_S: Final = 0.5
QUIT_GRACE_S: Final = 1.0


class Devices(Protocol):
    """What a backend does about devices and sizes; each as `VirtualMachine` promises it."""

    @property
    def addresses(self) -> Mapping[str, GuestAddress]:
        """Where the guest finds each device."""

    async def attach(self, device: Device) -> GuestAddress:
        """Plug one."""

    async def detach(self, device_id: str) -> None:
        """Unplug one."""

    async def resize_vcpus(self, count: int) -> int:
        """Plug or unplug vCPUs."""

    async def resize_memory(self, mib: int) -> int:
        """Plug or unplug memory."""


DevicesT = TypeVar("DevicesT", bound=Devices)


class SupervisedMachine(Generic[DevicesT]):
    """The common part of a `VirtualMachine`, around the VMM's process and its devices."""

    def __init__(self, spec: MachineSpec, child: Child, devices: DevicesT) -> None:
        self.pid = child.pid
        self.console = ConsoleRing(spec.console_bytes)
        self.exit: VmExit | None = None
        self._child = child
        self._devices = devices
        # Set when the VMM has announced its end; what does not follow is enforced.
        self._ending = trio.Event()
        self._exited = trio.Event()
        self._events = VmEvents()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} pid={self.pid} exit={self.exit}>"

    @property
    def events(self) -> trio.MemoryReceiveChannel[VmEvent]:
        """See `VirtualMachine.events`."""
        return self._events.receive

    @property
    def addresses(self) -> Mapping[str, GuestAddress]:
        """See `VirtualMachine.addresses`."""
        return self._devices.addresses

    async def run(self, *, task_status: TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """See `VirtualMachine.run`."""
        try:
            async with trio.open_nursery() as nursery:
                read_to_end = trio.Event()
                nursery.start_soon(self._child.run)
                nursery.start_soon(self._read_and_tell, read_to_end)
                task_status.started()
                await wait_process(self._child, self._ending)
                self._on_process_end()
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
        if grace_s > 0 and await self._ask_guest_to_end():
            with trio.move_on_after(grace_s):
                return await self.wait_exited()
        # Not SIGKILL at once: the VMM may hold what its disks have not seen yet.
        if await self._ask_vmm_to_end():
            with trio.move_on_after(QUIT_GRACE_S):
                return await self.wait_exited()
        self.kill()
        return await self.wait_exited()

    def kill(self) -> None:
        """See `VirtualMachine.kill`."""
        self._child.send_signal(signal.SIGKILL)

    async def aclose(self) -> None:
        """See `VirtualMachine.aclose`. Idempotent; sets the exit when nothing else did."""
        try:
            await self._release()
        finally:
            # Whatever could not be released: those who wait for the exit must have it.
            if self.exit is None and self._child.exit is not None:
                self.exit = self._judge(self._child.exit)
                self._exited.set()
                self._events.end(self.exit.reason)

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

    async def _read_and_tell(self, done: trio.Event) -> None:
        await self._read_to_end()
        done.set()

    def _on_process_end(self) -> None:
        """The process has ended; what it said last may still have to be read."""

    async def _read_to_end(self) -> None:
        """Read everything that the VMM sends until it has closed it."""
        raise NotImplementedError

    async def _ask_guest_to_end(self) -> bool:
        """Have the guest switch itself off; tells whether it was asked."""
        raise NotImplementedError

    async def _ask_vmm_to_end(self) -> bool:
        """Have the VMM end; False where that is no use, and it is killed."""
        raise NotImplementedError

    async def _release(self) -> None:
        """Kill and reap the process, close everything. Idempotent."""
        raise NotImplementedError

    def _judge(self, ending: ChildExit) -> VmExit:
        """Join the process's end and what was seen before into the one exit. Never raises."""
        raise NotImplementedError
