"""What the composition root sees of a backend: two protocols, ten verbs.

    check ──> launch ──> run (supervises to the end) ──> exit, one VmExit
                          attach · detach · resize_* · pause · resume · shutdown · kill

A missing ability is a false flag in `Capabilities` and `Unsupported` when called anyway; never a
silent success.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import trio

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trio import TaskStatus

    from .child import Recorder
    from .console import ConsoleRing
    from .machine import (
        Capabilities,
        Device,
        GuestAddress,
        MachineSpec,
        VmEvent,
        VmExit,
    )


class VirtualMachine(Protocol):
    """A launched machine. Owned by whoever runs `run`."""

    @property
    def pid(self) -> int:
        """The VMM's process."""

    @property
    def accelerator(self) -> str:
        """What executes the guest: "kvm", "tcg", or the backend by its name."""

    @property
    def exit(self) -> VmExit | None:
        """How it ended, set once; None while it lives."""

    @property
    def console(self) -> ConsoleRing:
        """The guest's console output; filled while `run` runs and kept after the end."""

    @property
    def events(self) -> trio.MemoryReceiveChannel[VmEvent]:
        """What happens to the machine, EXITED last, then the channel closes.

        A reader that falls behind loses the oldest events, never the last.
        """

    @property
    def addresses(self) -> Mapping[str, GuestAddress]:
        """Where the guest finds each device, by id, hot-plugged ones included."""

    async def run(self, *, task_status: TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Supervise until the machine has ended; never raises on its death.

        Cancellation kills the VMM and reaps it. Must be started once, right after `launch`.
        """

    async def wait_exited(self) -> VmExit:
        """Return the one exit, the same to every caller. Safe to cancel."""

    async def shutdown(self, grace_s: float) -> VmExit:
        """Ask the guest to power off, after `grace_s` end the VMM; with 0 end it at once."""

    def kill(self) -> None:
        """End the VMM now. Idempotent; the exit arrives through `wait_exited`."""

    async def aclose(self) -> None:
        """Kill, reap and release everything; only needed where `run` was never started."""

    async def attach(self, device: Device) -> GuestAddress:
        """Plug a device into the running machine. Undone when cancelled or refused.

        Raises:
            Unsupported: no such hot-plug, or every port is taken.
            PreconditionFailed, ControlError.
        """

    async def detach(self, device_id: str) -> None:
        """Unplug a hot-plugged device; returns when the guest has released it.

        After DetachRefused the device is still there and `detach` may be tried again.

        Raises:
            KeyError: not hot-plugged.
            DetachRefused, ControlError.
        """

    async def resize_vcpus(self, count: int) -> int:
        """Plug or unplug vCPUs; returns how many there are now, which may be other than asked."""

    async def resize_memory(self, mib: int) -> int:
        """Plug or unplug memory; returns the MiB there are now, rounded as the backend must."""

    async def pause(self) -> None:
        """Stop the vCPUs."""

    async def resume(self) -> None:
        """Continue the vCPUs."""


class Hypervisor(Protocol):
    """A backend. Stateless: one object serves any number of machines."""

    @property
    def name(self) -> str:
        """How the configuration calls it."""

    def capabilities(self, spec: MachineSpec) -> Capabilities:
        """What a machine of this specification will be able to do."""

    def check(self, spec: MachineSpec) -> None:
        """Refuse what cannot work, before any resource is taken.

        Raises:
            PreconditionFailed: a file, device or value; path, errno and fix inside.
            Unsupported: this backend never can.
        """

    async def launch(self, spec: MachineSpec, *, record: Recorder) -> VirtualMachine:
        """Check, start the VMM and take control of it. On failure and cancel nothing is left.

        Raises:
            PreconditionFailed, Unsupported: as `check`.
            SpawnFailed, LaunchFailed: the VMM did not start; its last words inside.
        """
