"""The toy backend: everything that a distribution has to bring for a VMM of its own.

It is found by the entry point `toy` of the group `kata.hypervisors` and imports nothing but
`hypervisors`. Its VMM (toy_vmm.py) takes its machine as one JSON argument, and QMP by descriptor.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from typing import TYPE_CHECKING, Any, Final, NoReturn

import trio

from hypervisors import isolation, spec_check
from hypervisors.child import spawn
from hypervisors.disk_lease import lease
from hypervisors.empty_root import CLONE_NEWNS
from hypervisors.errors import (
    ControlError,
    ControlLost,
    LaunchFailed,
    PreconditionFailed,
    Unsupported,
)
from hypervisors.machine import (
    BlockDevice,
    Capabilities,
    ExitKind,
    GuestAddress,
    HybridVsock,
    NetDevice,
    Rng,
    VmEventKind,
    VmExit,
)
from hypervisors.process_end import judge_process
from hypervisors.qmp_client import QmpClient, socket_pair
from hypervisors.supervised import QUIT_GRACE_S, SupervisedMachine
from hypervisors.supervision import close_socket, read_console
from hypervisors.vmm_dir import SOCKET_NAME, VmmDirectory

if TYPE_CHECKING:
    from hypervisors.child import Child, ChildExit, Recorder
    from hypervisors.disk_lease import Lease
    from hypervisors.machine import Device, MachineSpec
    from hypervisors.qmp_protocol import Notification

NAME: Final = "toy"
QMP_FD: Final = 3
DIRECTORY_FD: Final = 4
LAUNCH_DEADLINE_S: Final = 15.0
HINT: Final = "use another VMM ([hypervisor.qemu])"
ENDS: Final = {
    "guest-shutdown": (ExitKind.CLEAN, "the guest powered off"),
    "guest-reset": (ExitKind.REBOOT, "the guest rebooted"),
    "guest-panic": (ExitKind.PANIC, "the guest kernel panicked"),
    "host-qmp-quit": (ExitKind.KILLED, "the VMM was told to quit"),
}


class Toy:
    """Implements `Hypervisor`."""

    name = NAME

    def capabilities(self, spec: MachineSpec) -> Capabilities:
        """See `Hypervisor.capabilities`."""
        return Capabilities(
            shared_directory=False, block_hotplug=spec.hotplug_ports > 0, net_hotplug=False,
            vcpu_hotplug=False, vcpu_unplug=False, memory_hotplug=False, pause=True,
            panic_event=True, hybrid_vsock=True, kernel_vsock=False, unix_vsock=False,
            max_vcpus=1, memory_step_mib=1,
        )  # fmt: skip

    def check(self, spec: MachineSpec) -> None:
        """See `Hypervisor.check`."""
        spec_check.check_program("toy VMM", spec.binary, "install it")
        spec_check.check_values(spec, spec.cmdline)
        spec_check.check_kernel(spec.kernel)
        if spec.initrd is not None:
            spec_check.check_initrd(spec.initrd)
        for device in spec.devices:
            if not isinstance(device, Rng | BlockDevice | NetDevice | HybridVsock):
                where = getattr(device, "socket", device.id)
                _refuse(f"have the {type(device).__name__} {where}", "it is a toy", HINT)

    async def launch(self, spec: MachineSpec, *, record: Recorder) -> ToyMachine:
        """See `Hypervisor.launch`."""
        self.check(spec)
        account = isolation.machine_account(spec.id, NAME) if spec.unprivileged else None
        async with contextlib.AsyncExitStack() as undo:
            directory = VmmDirectory.create(spec.run_dir, NAME, account)
            undo.callback(directory.remove)
            qmp, qmp_theirs = socket_pair()
            console, console_theirs = socket_pair()
            for sock in (qmp, console):
                undo.callback(close_socket, sock)
            devices = ToyDevices(spec, undo)
            with qmp_theirs, console_theirs, _opened(directory) as own:
                for device in spec.devices:
                    if isinstance(device, HybridVsock):
                        directory.admit_listeners(device)
                namespaces = isolation.machine_namespaces(spec.network_namespace)
                namespaces["unshare"] |= CLONE_NEWNS if isolation.hides_files() else 0
                child = await spawn(
                    NAME,
                    [str(spec.binary), json.dumps(_description(spec, devices))],
                    record=record,
                    pass_fds={QMP_FD: qmp_theirs.fileno(), DIRECTORY_FD: own},
                    stdout=console_theirs.fileno(),
                    user=account,
                    no_new_privileges=True,
                    **namespaces,
                )
                undo.push_async_callback(child.aclose)
            machine = ToyMachine(spec, child, devices, qmp, console)
            await machine.negotiate()
            for device in spec.devices:
                if isinstance(device, HybridVsock):
                    directory.publish(device)
            machine.keep(undo.pop_all())
            return machine


@contextlib.contextmanager
def _opened(directory: VmmDirectory) -> Any:
    fd = os.open(directory.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _description(spec: MachineSpec, devices: ToyDevices) -> dict[str, Any]:
    has_vsock = any(isinstance(one, HybridVsock) for one in spec.devices)
    return {
        "cmdline": spec.cmdline,
        "memory_mib": spec.memory_mib,
        "disks": [devices.addresses[one.id].node for one in _disks(spec)],
        "macs": [one.mac for one in spec.devices if isinstance(one, NetDevice)],
        "vsock": f"/proc/self/fd/{DIRECTORY_FD}/{SOCKET_NAME}" if has_vsock else "",
    }


def _disks(spec: MachineSpec) -> list[BlockDevice]:
    return [one for one in spec.devices if isinstance(one, BlockDevice)]


class ToyDevices:
    """The disks of one machine; what is behind them the toy never reads."""

    def __init__(self, spec: MachineSpec, undo: contextlib.AsyncExitStack) -> None:
        self.qmp: QmpClient | None = None
        self._spec = spec
        self._nodes = [f"/dev/vd{letter}" for letter in "abcdefghijklmnop"]
        self._leases: dict[str, Lease] = {}
        undo.callback(self.close)
        self.addresses = {
            one.id: GuestAddress() for one in spec.devices if not isinstance(one, BlockDevice)
        }
        for disk in _disks(spec):
            self._leases[disk.id] = lease(disk)
            self.addresses[disk.id] = GuestAddress(node=self._nodes.pop(0))
        self._cold = frozenset(self.addresses)

    def close(self) -> None:
        """Let other machines have the disks. Idempotent."""
        while self._leases:
            self._leases.popitem()[1].close()

    async def attach(self, device: Device) -> GuestAddress:
        """See `VirtualMachine.attach`."""
        if not isinstance(device, BlockDevice):
            _refuse(f"attach a {type(device).__name__}", "it plugs disks alone", HINT)
        if device.id in self.addresses:
            raise PreconditionFailed(
                "device id", path=None, why=f"{device.id!r} is in use", fix="choose another"
            )
        if len(self.addresses) - len(self._cold) >= self._spec.hotplug_ports:
            _refuse("attach another disk", "all ports are taken", "raise hotplug_ports")
        leased = lease(device)
        try:
            await self._execute("plug", {"node": self._nodes[0]})
        except BaseException:
            leased.close()
            raise
        self._leases[device.id] = leased
        self.addresses[device.id] = GuestAddress(node=self._nodes.pop(0))
        return self.addresses[device.id]

    async def detach(self, device_id: str) -> None:
        """See `VirtualMachine.detach`."""
        if device_id not in self.addresses or device_id in self._cold:
            raise KeyError(device_id)
        await self._execute("unplug", {"node": self.addresses[device_id].node})
        self._nodes.insert(0, self.addresses.pop(device_id).node)
        self._leases.pop(device_id).close()

    async def resize_vcpus(self, count: int) -> int:
        """See `VirtualMachine.resize_vcpus`."""
        await self._execute("query-status")
        if count != self._spec.vcpus:
            _refuse(f"run with {count} vCPUs", "it has those of the start", "raise default_vcpus")
        return count

    async def resize_memory(self, mib: int) -> int:
        """See `VirtualMachine.resize_memory`."""
        await self._execute("query-status")
        if mib > self._spec.memory_mib:
            _refuse(f"have {mib} MiB", "it has those of the start", "raise default_memory")
        return self._spec.memory_mib

    async def _execute(self, command: str, arguments: dict[str, str] | None = None) -> None:
        assert self.qmp is not None
        await self.qmp.execute(command, arguments)


class ToyMachine(SupervisedMachine[ToyDevices]):
    """Implements `VirtualMachine`."""

    accelerator = NAME

    def __init__(
        self,
        spec: MachineSpec,
        child: Child,
        devices: ToyDevices,
        qmp: socket.socket,
        console: socket.socket,
    ) -> None:
        super().__init__(spec, child, devices)
        self._qmp = devices.qmp = QmpClient(qmp, self._on_notification)
        self._console_socket = console
        self._resources = contextlib.AsyncExitStack()
        self._reason = ""

    def keep(self, resources: contextlib.AsyncExitStack) -> None:
        """Take what the launch made."""
        self._resources = resources

    async def negotiate(self) -> None:
        """Take control; raises LaunchFailed."""
        ending = f"gave no answer within {LAUNCH_DEADLINE_S:g} s"
        with trio.move_on_after(LAUNCH_DEADLINE_S):
            try:
                await self._qmp.negotiate()
            except ControlLost:
                ending = str(await self._child.wait())
            else:
                return
        raise LaunchFailed(NAME, ending, self._child.stderr_tail)

    async def pause(self) -> None:
        """See `VirtualMachine.pause`."""
        await self._qmp.execute("stop")

    async def resume(self) -> None:
        """See `VirtualMachine.resume`."""
        await self._qmp.execute("cont")

    async def _ask_guest_to_end(self) -> bool:
        return False

    async def _ask_vmm_to_end(self) -> bool:
        try:
            await self._qmp.execute("quit", timeout_s=QUIT_GRACE_S)
        except ControlError:
            return False
        return True

    async def _read_to_end(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read_console, self._console_socket, self.console, self._child)
            await self._qmp.run()
            self._ending.set()

    async def _release(self) -> None:
        await self._child.aclose()
        await self._resources.aclose()
        self._qmp.close()

    def _judge(self, ending: ChildExit) -> VmExit:
        kind, reason = (
            ENDS.get(self._reason)
            or judge_process(ending)
            or (ExitKind.UNKNOWN, "the VMM exited with 0")
        )
        return VmExit(kind=kind, code=ending.code, signal=ending.signal, reason=reason)

    def _on_notification(self, notification: Notification) -> None:
        match notification.name, notification.data:
            case "SHUTDOWN", {"reason": str(reason)}:
                self._reason = reason
                kind = VmEventKind.SHUTDOWN
                if reason == "guest-panic":
                    kind = VmEventKind.PANICKED
                self._events.emit(kind, reason)
                self._ending.set()
            case "STOP", _:
                self._events.emit(VmEventKind.PAUSED)
            case "RESUME", _:
                self._events.emit(VmEventKind.RESUMED)
            case "DEVICE_DELETED", {"node": str(node)}:
                self._events.emit(VmEventKind.DEVICE_REMOVED, node)


def _refuse(operation: str, why: str, hint: str) -> NoReturn:
    raise Unsupported(NAME, operation, why, hint)
