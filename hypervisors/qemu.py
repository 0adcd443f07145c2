"""The QEMU backend: checks a specification, launches QEMU and supervises it to its end.

    launch ── spawn ── negotiate ──> QemuMachine.run
                                      ├── QMP reader      events, replies
                                      ├── console reader  ring
                                      └── child           pidfd, stderr
Three sources tell of the end (pidfd, events, end of file) in any order; `run` joins them into one
VmExit, set once.
"""

from __future__ import annotations

import contextlib
import os
import socket
from typing import TYPE_CHECKING, Final

import trio

from . import accel, isolation, qemu_argv, spec_check
from .child import spawn
from .disk_lease import lease
from .empty_root import CLONE_NEWNS, empty_root
from .errors import ControlLost, LaunchFailed, PreconditionFailed, Unsupported
from .machine import (
    BlockDevice,
    Capabilities,
    HybridVsock,
    KernelVsock,
    SharedDirectory,
    UnixVsock,
)
from .qemu_board import BOARDS, INSTEAD, MICROVM, Q35, find_board
from .qemu_machine import QemuMachine
from .qmp_client import socket_pair

if TYPE_CHECKING:
    from pathlib import Path

    from .child import Child, Recorder
    from .child_exec import Account
    from .machine import MachineSpec
    from .qemu_board import Board

# To its first answer QEMU takes 0.05 s alone, and as long as the slowest daemon behind a device.
LAUNCH_DEADLINE_S: Final = 30.0
# A daemon binds and listens in two steps, with nothing to wait for in between.
CONNECT_DEADLINE_S: Final = 2.0
CONNECT_RETRY_S: Final = 0.005
# Source: QEMU q35, KVM's limit without an interrupt-remapping IOMMU.
MAX_VCPUS: Final = 255
QEMU_FIX: Final = "install qemu-system-x86, or correct the hypervisor path"


class Qemu:
    """Machines of types q35 and microvm, on KVM where it works and emulated elsewhere."""

    name = "qemu"

    def capabilities(self, spec: MachineSpec) -> Capabilities:
        """See `Hypervisor.capabilities`."""
        # Of a machine type that there is not, `check` tells.
        takes_devices = BOARDS.get(spec.machine_type, Q35).takes_devices
        ports = takes_devices and spec.hotplug_ports > 0
        return Capabilities(
            shared_directory=True,
            block_hotplug=ports,
            block_unplug=ports,
            net_hotplug=ports,
            vcpu_hotplug=takes_devices and spec.max_vcpus > spec.vcpus,
            vcpu_unplug=takes_devices and spec.accelerator != "tcg" and accel.kvm_problem() is None,
            memory_hotplug=takes_devices and spec.max_memory_mib > spec.memory_mib,
            pause=True,
            panic_event=True,
            hybrid_vsock=False,
            kernel_vsock=accel.kernel_vsock_usable(),
            unix_vsock=True,
            max_vcpus=MAX_VCPUS,
            memory_step_mib=qemu_argv.MEMORY_STEP_MIB,
            instead="" if takes_devices else INSTEAD,
        )

    def check(self, spec: MachineSpec) -> None:
        """See `Hypervisor.check`."""
        board = find_board(spec.machine_type)
        self._check_layout(spec, board)
        spec_check.check_program("QEMU", spec.binary, QEMU_FIX)
        accelerator = accel.choose_accelerator(spec.accelerator)
        if board is MICROVM and accelerator == "tcg":
            _check_clock()
        spec_check.check_values(spec, qemu_argv.kernel_cmdline(spec, accelerator))
        spec_check.check_kernel(spec.kernel)
        if spec.initrd is not None:
            spec_check.check_initrd(spec.initrd)
        if _account(spec, accelerator) is not None:
            spec_check.check_executable_by_all("QEMU", spec.binary.resolve())
            spec_check.check_readable_by_all("guest kernel", spec.kernel)
            if spec.initrd is not None:
                spec_check.check_readable_by_all("guest initrd", spec.initrd)

    async def launch(self, spec: MachineSpec, *, record: Recorder) -> QemuMachine:
        """See `Hypervisor.launch`."""
        self.check(spec)
        accelerator = accel.choose_accelerator(spec.accelerator)
        async with contextlib.AsyncExitStack() as undo:
            with contextlib.ExitStack() as theirs:
                qmp, qmp_peer = socket_pair()
                console, console_peer = socket_pair()
                undo.callback(qmp.close)
                undo.callback(console.close)
                theirs.callback(qmp_peer.close)
                theirs.callback(console_peer.close)
                host = qemu_argv.HostSide(
                    accelerator=accelerator,
                    tsc_khz=accel.tsc_khz() if accelerator == "tcg" else None,
                    qmp_fd=qmp_peer.fileno(),
                    console_fd=console_peer.fileno(),
                    kernel_fd=_open(spec.kernel, theirs),
                    initrd_fd=_open(spec.initrd, theirs) if spec.initrd is not None else None,
                    vhost_user_fds=await _connect_daemons(spec, theirs),
                    blocks=_open_blocks(spec, theirs),
                )
                command = qemu_argv.build_command(spec, host)
                namespaces = isolation.machine_namespaces(spec.network_namespace)
                if isolation.hides_files():
                    namespaces["unshare"] |= CLONE_NEWNS
                child = await spawn(
                    "qemu",
                    command.argv,
                    record=record,
                    pass_fds=command.pass_fds,
                    user=_account(spec, accelerator),
                    no_new_privileges=True,
                    **namespaces,
                )
                undo.push_async_callback(child.aclose)
            machine = QemuMachine(spec, accelerator, child, qmp, console, command.addresses)
            await _negotiate(machine, child)
            if isolation.hides_files():
                # Nothing is opened by name from here on: what is plugged comes as descriptors.
                await empty_root("qemu", child.pid)
            undo.pop_all()
            return machine

    def _check_layout(self, spec: MachineSpec, board: Board) -> None:
        if len(spec.devices) > board.max_devices:
            raise Unsupported(
                self.name,
                f"start with {len(spec.devices)} devices",
                f"a machine of type {board.name} has {board.max_devices} slots for them",
                "attach the others after the start"
                if board.takes_devices
                else "ask for fewer of them",
            )
        if not 0 <= spec.hotplug_ports <= board.max_ports and board.takes_devices:
            raise Unsupported(
                self.name,
                f"have {spec.hotplug_ports} hot-plug ports",
                f"the root bus has {board.max_ports} slots for them",
                f"ask for 0 to {board.max_ports}",
            )
        if spec.max_vcpus > MAX_VCPUS:
            raise Unsupported(
                self.name,
                f"have {spec.max_vcpus} vCPUs",
                f"a machine ends at {MAX_VCPUS}",
                "lower the maximum",
            )
        for device in spec.devices:
            if isinstance(device, HybridVsock):
                raise Unsupported(
                    self.name,
                    "have a vsock device of its own",
                    "it takes the host kernel's or a daemon's",
                    "use one of those",
                )
            if isinstance(device, KernelVsock) and not accel.kernel_vsock_usable():
                raise Unsupported(
                    self.name,
                    "use the host kernel's vsock",
                    f"{accel.VHOST_VSOCK_DEVICE} does not open",
                    "load vhost_vsock, or use the unix vsock daemon",
                )


def _check_clock() -> None:
    """Refuse to emulate a microvm on a host that does not say how fast its counter runs.

    Observed, QEMU 7.2.22 and Linux 6.1: under load every such guest stood still in the calibration
    of its delay loop, waiting for a tick of the old timer, which reduced ACPI leaves off.
    """
    if accel.tsc_khz() is None:
        raise PreconditionFailed(
            "the clock of an emulated microvm",
            path=accel.CPUINFO,
            why="it does not tell the frequency of this host's time stamp counter for sure",
            fix='set machine_type = "q35", or use a host with KVM',
        )


def _account(spec: MachineSpec, accelerator: str) -> Account | None:
    return isolation.machine_account(spec.id, accelerator) if spec.unprivileged else None


def _open(path: Path, stack: contextlib.ExitStack) -> int:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    stack.callback(os.close, fd)
    return fd


def _open_blocks(spec: MachineSpec, stack: contextlib.ExitStack) -> dict[str, qemu_argv.OpenBlock]:
    blocks: dict[str, qemu_argv.OpenBlock] = {}
    for device in spec.devices:
        if isinstance(device, BlockDevice):
            leased = lease(device)
            stack.callback(leased.close)
            blocks[device.id] = qemu_argv.OpenBlock(leased.fd, leased.driver)
    return blocks


async def _connect_daemons(spec: MachineSpec, stack: contextlib.ExitStack) -> dict[str, int]:
    """Connect to every vhost-user daemon; QEMU gets the connections and needs no path.

    Raises:
        LaunchFailed: a daemon is not there.
    """
    connections: dict[str, int] = {}
    for device in spec.devices:
        if isinstance(device, SharedDirectory | UnixVsock):
            sock = await connect_daemon(device.id, device.socket)
            stack.callback(sock.close)
            connections[device.id] = sock.fileno()
    return connections


async def connect_daemon(device_id: str, path: Path) -> socket.socket:
    """Connect to a daemon that is about to listen, within `CONNECT_DEADLINE_S`."""
    deadline = trio.current_time() + CONNECT_DEADLINE_S
    while True:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            # Blocking is no risk: a unix socket connects at once or fails, and its backlog is ours.
            sock.setblocking(False)
            sock.connect(str(path))
        except OSError as error:
            sock.close()
            retriable = isinstance(error, ConnectionRefusedError | BlockingIOError)
            if not retriable or trio.current_time() > deadline:
                raise LaunchFailed(
                    f"the daemon of {device_id}", f"refused {path} ({error.strerror})", ()
                ) from error
        else:
            return sock
        # The file is there since bind(2); that listen(2) came as well, no event tells.
        await trio.sleep(CONNECT_RETRY_S)


async def _negotiate(machine: QemuMachine, child: Child) -> None:
    ending = f"gave no answer within {LAUNCH_DEADLINE_S:g} s"
    with trio.move_on_after(LAUNCH_DEADLINE_S):
        try:
            await machine.negotiate()
        except ControlLost:
            ending = str(await child.wait())
        else:
            return
    raise LaunchFailed("qemu", ending, child.stderr_tail)
