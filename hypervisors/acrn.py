"""The ACRN backend: machines of acrn-dm beside the Service VM that this host is.

    launch ── spawn ── ready port connected ── monitor connected, registered ──> AcrnMachine.run
                                                                 ├── monitor reader  events, acks
                                                                 ├── console reader  ring
                                                                 └── child           pidfd, stderr

acrn-dm opens what it needs by path, and finds it below /proc/self/fd. It needs root: the device of
the hypervisor, the host's huge pages. It has never run here: everything about it was read in its
sources, and tests/fakes/fake_acrn.py speaks as they do.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import random
import socket
import struct
from typing import TYPE_CHECKING, Final

import trio

from . import accel, acrn_argv, acrn_check, isolation
from .acrn_check import NAME
from .acrn_machine import LAST_LINES, AcrnMachine
from .acrn_monitor import CommandMonitor
from .child import spawn
from .console import ConsoleRing
from .disk_lease import lease
from .errors import ControlError, LaunchFailed, PreconditionFailed
from .lent_taps import LentTaps
from .machine import BlockDevice, Capabilities, KernelVsock, NetDevice
from .supervision import CONSOLE_CHUNK_BYTES, close_socket
from .vmm_dir import VmmDirectory

if TYPE_CHECKING:
    from pathlib import Path

    from .child import Child, Recorder
    from .disk_lease import Lease
    from .machine import MachineSpec

# It compiles its ACPI tables at each start, and fills a machine's huge pages.
LAUNCH_DEADLINE_S: Final = 30.0
# Source: linux/vhost.h VHOST_VSOCK_SET_GUEST_CID; linux/vm_sockets.h.
SET_GUEST_CID: Final = 0x4008AF60
CIDS: Final = (1 << 31, (1 << 32) - 2)


class Acrn:
    """Machines of acrn-dm."""

    name = NAME

    def capabilities(self, spec: MachineSpec) -> Capabilities:
        """See `Hypervisor.capabilities`."""
        return Capabilities(
            shared_directory=False,
            block_hotplug=spec.hotplug_ports > 0,
            net_hotplug=False,
            vcpu_hotplug=False,
            vcpu_unplug=False,
            memory_hotplug=False,
            pause=False,
            panic_event=False,
            hybrid_vsock=False,
            kernel_vsock=True,
            unix_vsock=False,
            max_vcpus=acrn_check.MAX_VCPUS,
            memory_step_mib=acrn_argv.MEMORY_STEP_MIB,
            # Without ports it is them that have to be set.
            instead=acrn_check.INSTEAD if spec.hotplug_ports > 0 else "",
            block_unplug=False,
            opens_taps=True,
        )

    def check(self, spec: MachineSpec) -> None:
        """See `Hypervisor.check`."""
        acrn_check.check(spec)

    async def launch(self, spec: MachineSpec, *, record: Recorder) -> AcrnMachine:
        """See `Hypervisor.launch`."""
        self.check(spec)
        async with contextlib.AsyncExitStack() as undo:
            directory = VmmDirectory.create(spec.run_dir, NAME, None)
            undo.callback(directory.remove)
            leases: list[Lease] = []
            undo.callback(_give_back, leases)
            console, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            console.setblocking(False)
            undo.callback(close_socket, console)
            taps = LentTaps("acrn-dm", spec.network_namespace)
            undo.push_async_callback(taps.abandon)
            with theirs, contextlib.ExitStack() as passed, _listen(directory) as listener:
                table: dict[int, int] = {}
                host = _open_host_side(spec, directory, leases, taps, table, passed)
                _free_context_ids(spec)
                child = await spawn(
                    NAME,
                    acrn_argv.command_line(spec, vm_name(spec.id), host),
                    record=record,
                    pass_fds=table,
                    stdout=theirs.fileno(),
                    no_new_privileges=True,
                    **isolation.machine_namespaces(spec.network_namespace),
                )
                undo.push_async_callback(child.aclose)
                theirs.close()
                ready = await _made(child, listener, console, undo)
            try:
                # It has made all devices, and no guest runs yet.
                taps.take_back(child.pid)
                monitor = CommandMonitor.connect(directory.path / acrn_argv.MONITOR_SOCKET)
                undo.callback(monitor.close)
                machine = AcrnMachine(spec, child, monitor, console, ready, leases)
                await machine.register()
            except ControlError as error:
                ending = f"cannot be controlled: {error}"
                raise LaunchFailed(NAME, ending, _words(child, console)) from error
            machine.keep(undo.pop_all())
            return machine


def vm_name(machine_id: str) -> str:
    """What the hypervisor calls a machine: it takes 15 characters and wants each once."""
    return f"kata-{hashlib.sha256(machine_id.encode()).hexdigest()[:10]}"


def _give_back(leases: list[Lease]) -> None:
    for one in leases:
        one.close()


def _listen(directory: VmmDirectory) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.setblocking(False)
        listener.bind(str(directory.path / acrn_argv.READY_SOCKET))
        listener.listen(1)
    except BaseException:
        listener.close()
        raise
    return listener


def _open_host_side(
    spec: MachineSpec,
    directory: VmmDirectory,
    leases: list[Lease],
    taps: LentTaps,
    table: dict[int, int],
    passed: contextlib.ExitStack,
) -> acrn_argv.HostSide:
    """Open what acrn-dm needs, and number it in `table`."""

    def add(fd: int) -> str:
        number = 3 + len(table)
        table[number] = fd
        return f"/proc/self/fd/{number}"

    def opened(path: Path, flags: int) -> str:
        fd = os.open(path, flags | os.O_CLOEXEC)
        passed.callback(os.close, fd)
        return add(fd)

    images: dict[str, str] = {}
    for device in spec.devices:
        if isinstance(device, BlockDevice):
            leases.append(lease(device))
            images[device.id] = add(leases[-1].fd)
    return acrn_argv.HostSide(
        directory=opened(directory.path, os.O_RDONLY | os.O_DIRECTORY),
        kernel=opened(spec.kernel, os.O_RDONLY),
        initrd=opened(spec.initrd, os.O_RDONLY) if spec.initrd is not None else None,
        images=images,
        taps={one.id: taps.lend(one) for one in spec.devices if isinstance(one, NetDevice)},
        processors=acrn_check.processors(spec.id, spec.vcpus),
    )


def _free_context_ids(spec: MachineSpec) -> None:
    """Let acrn-dm have the guests' numbers, which it takes by a descriptor of its own.

    It would not say that one is taken. Ours get others: that nobody took the number before is why
    the caller holds one.
    """
    for device in spec.devices:
        if isinstance(device, KernelVsock):
            other = struct.pack("<Q", random.randint(*CIDS))
            try:
                fcntl.ioctl(device.vhost_fd, SET_GUEST_CID, other)
            except OSError as error:
                raise PreconditionFailed(
                    "vsock of the host's kernel", path=accel.VHOST_VSOCK_DEVICE,
                    why=f"does not let go of {device.cid}", errno=error.errno,
                    fix="create the pod again",
                ) from error  # fmt: skip


async def _made(
    child: Child,
    listener: socket.socket,
    console: socket.socket,
    undo: contextlib.AsyncExitStack,
) -> socket.socket:
    """Wait until acrn-dm has made the machine's devices; returns the ready port's connection.

    Raises:
        LaunchFailed: it ended, or took too long.
    """
    accepted: list[socket.socket] = []
    async with trio.open_nursery() as nursery:
        nursery.cancel_scope.deadline = trio.current_time() + LAUNCH_DEADLINE_S

        async def stop_at_exit() -> None:
            await child.wait()
            nursery.cancel_scope.cancel()

        nursery.start_soon(stop_at_exit)
        await trio.lowlevel.wait_readable(listener)
        accepted.append(listener.accept()[0])
        undo.callback(close_socket, accepted[0])
        accepted[0].setblocking(False)
        nursery.cancel_scope.cancel()
    if accepted:
        return accepted[0]
    ending = f"made no machine within {LAUNCH_DEADLINE_S:g} s"
    if child.exit is not None:
        ending = str(child.exit)
    raise LaunchFailed(NAME, ending, _words(child, console))


def _words(child: Child, console: socket.socket) -> list[str]:
    """What acrn-dm said last: most of it goes to stdout, where later the guest's console is."""
    ring = ConsoleRing(CONSOLE_CHUNK_BYTES)
    with contextlib.suppress(BlockingIOError):
        ring.feed(console.recv(CONSOLE_CHUNK_BYTES))
    return [*child.stderr_tail, *ring.tail(LAST_LINES)]
