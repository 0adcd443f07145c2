"""A hypervisor inside of the test process: machines without a guest, helpers without a daemon.

    hypervisor = FakeHypervisor()
    hypervisor.on_launch = announce          # what the guest does once it has power
    machinery = hypervisor.machinery()       # what shimv2.boot takes

A machine ends when the test or the shim says so; then `on_exit` runs: cut the wire there.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from hypervisors.child import ChildExit, ChildRecord
from hypervisors.console import ConsoleRing
from hypervisors.machine import (
    Capabilities,
    Device,
    ExitKind,
    GuestAddress,
    MachineSpec,
    NetDevice,
    VmExit,
)
from shimv2.boot import Machinery

FAKE_PID = 0x3FFFFF  # above pid_max's default: no process of the host has it


class FakeMachine:
    """A VirtualMachine that is nothing but its exit."""

    accelerator = "fake"

    def __init__(self, spec: MachineSpec, on_exit: Callable[[], None]) -> None:
        self.spec = spec
        self.pid = FAKE_PID
        self.exit: VmExit | None = None
        self.console = ConsoleRing(65536)
        self.addresses: dict[str, GuestAddress] = {}
        self.ignores_kill = False
        self.attached: list[Device] = []
        self.detached: list[str] = []
        self.attach_error: Exception | None = None
        self.detach_error: Exception | None = None
        self.resized: list[tuple[str, int]] = []
        self.resize_error: Exception | None = None
        self._exited = trio.Event()
        self._on_exit = on_exit
        # As a VMM's: the taps are there for as long as it lives.
        self._taps: list[int] = []
        for device in spec.devices:
            self._hold(device)

    def die(self, reason: str = "was killed by SIGKILL", kind: ExitKind = ExitKind.KILLED) -> None:
        """End the machine, as the host or the guest might."""
        if self.exit is None:
            self.exit = VmExit(kind=kind, code=None, signal=9, reason=reason)
            while self._taps:
                os.close(self._taps.pop())
            self._exited.set()
            self._on_exit()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        task_status.started()
        try:
            await self._exited.wait()
        finally:
            self.die("was stopped")

    async def wait_exited(self) -> VmExit:
        await self._exited.wait()
        assert self.exit is not None
        return self.exit

    async def attach(self, device: Device) -> GuestAddress:
        await trio.lowlevel.checkpoint()
        if self.attach_error is not None:
            raise self.attach_error
        self._hold(device)
        self.attached.append(device)
        self.addresses[device.id] = GuestAddress(pci_path=f"{0x0F + len(self.attached):02x}/00")
        return self.addresses[device.id]

    async def detach(self, device_id: str) -> None:
        await trio.lowlevel.checkpoint()
        if self.detach_error is not None:
            raise self.detach_error
        del self.addresses[device_id]
        self.detached.append(device_id)

    async def resize_vcpus(self, count: int) -> int:
        await trio.lowlevel.checkpoint()
        self.resized.append(("vcpus", count))
        if self.resize_error is not None:
            raise self.resize_error
        return count

    async def resize_memory(self, mib: int) -> int:
        await trio.lowlevel.checkpoint()
        self.resized.append(("memory", mib))
        if self.resize_error is not None:
            raise self.resize_error
        return mib

    def _hold(self, device: Device) -> None:
        if isinstance(device, NetDevice):
            self._taps += [os.dup(fd) for fd in device.tap_fds]

    def kill(self) -> None:
        if not self.ignores_kill:
            self.die("was killed by the shim")

    async def aclose(self) -> None:
        self.kill()


class FakeHelper:
    """A daemon that lives until it is told to end."""

    def __init__(self, name: str, sockets: tuple[Path, ...]) -> None:
        self.name = name
        self.stderr_tail: list[str] = []
        self.is_closed = False
        self._exit = ChildExit(code=None, signal=9)
        self._ended = trio.Event()
        self._sockets = sockets

    def die(self, code: int | None = None) -> None:
        self._exit = ChildExit(code=code, signal=9 if code is None else None)
        self._ended.set()

    async def run(
        self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> ChildExit:
        task_status.started()
        await self._ended.wait()
        return self._exit

    async def aclose(self) -> None:
        self.is_closed = True
        self._ended.set()
        await trio.lowlevel.checkpoint()


@dataclass
class FakeHypervisor:
    """A Hypervisor that counts what it made, and fails on demand."""

    name: str = "fake"
    on_launch: Callable[[FakeMachine], Awaitable[None]] | None = None
    on_exit: Callable[[], None] = lambda: None
    check_error: Exception | None = None
    launch_error: Exception | None = None
    max_vcpus: int = 255
    hybrid_vsock: bool = False
    shared_directory: bool = True
    block_hotplug: bool = False
    instead: str = ""
    machines: list[FakeMachine] = field(default_factory=list)
    namespaces: list[int] = field(default_factory=list)  # inodes, of those given one
    helpers: list[FakeHelper] = field(default_factory=list)

    def capabilities(self, spec: MachineSpec) -> Capabilities:
        return Capabilities(
            shared_directory=self.shared_directory,
            block_hotplug=self.block_hotplug,
            net_hotplug=False,
            vcpu_hotplug=False,
            vcpu_unplug=False,
            memory_hotplug=False,
            pause=False,
            panic_event=False,
            hybrid_vsock=self.hybrid_vsock,
            kernel_vsock=False,
            unix_vsock=True,
            max_vcpus=self.max_vcpus,
            memory_step_mib=1,
            instead=self.instead,
        )

    def check(self, spec: MachineSpec) -> None:
        if self.check_error is not None:
            raise self.check_error

    async def launch(
        self, spec: MachineSpec, *, record: Callable[[ChildRecord], None]
    ) -> FakeMachine:
        await trio.lowlevel.checkpoint()
        if self.launch_error is not None:
            raise self.launch_error
        record(ChildRecord(name="fake-vmm", pid=FAKE_PID, start_time=1))
        if spec.network_namespace is not None:
            self.namespaces.append(os.fstat(spec.network_namespace).st_ino)
        machine = FakeMachine(spec, self.on_exit)
        self.machines.append(machine)
        if self.on_launch is not None:
            await self.on_launch(machine)
        return machine

    def machinery(self) -> Machinery:
        """The parts of a machine, all fake; no kernel vsock."""

        async def start_virtiofsd(
            binary: Path, shared: Path, socket: Path, **options: Any
        ) -> FakeHelper:
            return self._helper("virtiofsd", socket)

        async def start_vsock_device(
            binary: Path, socket: Path, uds_path: Path, **options: Any
        ) -> FakeHelper:
            return self._helper("vhost-device-vsock", socket)

        return Machinery(
            hypervisor=self,  # type: ignore[arg-type]
            start_virtiofsd=start_virtiofsd,  # type: ignore[arg-type]
            start_vsock_device=start_vsock_device,  # type: ignore[arg-type]
            open_kernel_vsock=lambda: None,
        )

    def helper(self, name: str) -> FakeHelper:
        return next(helper for helper in self.helpers if helper.name == name)

    def _helper(self, name: str, socket: Path) -> FakeHelper:
        assert os.path.isdir(socket.parent)
        helper = FakeHelper(name, (socket,))
        self.helpers.append(helper)
        return helper
