"""The Firecracker backend: checks a specification, launches the VMM and takes control of it.

    launch ── room ── spawn jailer ── version, configuration, InstanceStart ──> FcMachine.run
                                                                                 ├── log, metrics
                                                                                 ├── console
                                                                                 └── child: pidfd

Everything it is made of is said over its API before it starts. Its API socket has a name only until
we have a handle on it. Disks that come later take the place of empty ones (fc_devices.py).
"""

from __future__ import annotations

import contextlib
import socket
from typing import TYPE_CHECKING, Final

from . import accel, fc_config, fc_room, isolation, spec_check
from .child import spawn
from .empty_root import read_only_root
from .errors import LaunchFailed, PreconditionFailed, Unsupported
from .fc_devices import NAME, FcDevices
from .fc_exit import EndFacts
from .fc_machine import FcMachine, FcVoices
from .fc_start import Starting, start
from .lent_taps import LentTaps, check_tap
from .machine import (
    Capabilities,
    HybridVsock,
    KernelVsock,
    NetDevice,
    Rng,
    SharedDirectory,
    UnixVsock,
)
from .supervision import close_socket

if TYPE_CHECKING:
    from .child import Child, Recorder
    from .fc_room import Room
    from .machine import MachineSpec

FIX: Final = "install firecracker, or correct the hypervisor path"
ELF_MAGIC: Final = b"\x7fELF"


class Firecracker:
    """Machines of Firecracker, which needs KVM."""

    name = NAME

    def capabilities(self, spec: MachineSpec) -> Capabilities:
        """See `Hypervisor.capabilities`."""
        return Capabilities(
            shared_directory=False,
            block_hotplug=spec.hotplug_ports > 0,
            block_unplug=spec.hotplug_ports > 0,
            net_hotplug=False,
            vcpu_hotplug=False,
            vcpu_unplug=False,
            memory_hotplug=False,
            pause=True,
            panic_event=True,
            hybrid_vsock=True,
            kernel_vsock=False,
            unix_vsock=False,
            max_vcpus=fc_config.MAX_VCPUS,
            memory_step_mib=1,
            power_off=False,
            opens_taps=True,
            # Without slots it is the number of slots that an operator has to set.
            instead="another VMM ([hypervisor.qemu])" if spec.hotplug_ports > 0 else "",
        )

    def check(self, spec: MachineSpec) -> None:
        """See `Hypervisor.check`."""
        spec_check.check_program("Firecracker", spec.binary, FIX)
        accel.require_kvm(self.name, "Firecracker", spec.accelerator)
        self._check_layout(spec)
        spec_check.check_values(spec, fc_config.kernel_cmdline(spec))
        spec_check.check_kernel(spec.kernel)
        _check_elf(spec)
        if spec.initrd is not None:
            spec_check.check_initrd(spec.initrd)
        jailer = fc_room.find_jailer(spec)
        if jailer is not None:
            fc_room.check_jailed(spec)
        if fc_room.account_of(spec) is not None:
            if jailer is None:
                spec_check.check_executable_by_all("Firecracker", spec.binary.resolve())
            spec_check.check_readable_by_all("guest kernel", spec.kernel)
            if spec.initrd is not None:
                spec_check.check_readable_by_all("guest initrd", spec.initrd)

    async def launch(self, spec: MachineSpec, *, record: Recorder) -> FcMachine:
        """See `Hypervisor.launch`."""
        self.check(spec)
        async with contextlib.AsyncExitStack() as undo:
            room = fc_room.build(spec, undo)
            facts = EndFacts()
            voices = FcVoices(room, facts)
            undo.callback(voices.close)
            for device in spec.devices:
                if isinstance(device, HybridVsock):
                    room.directory.admit_listeners(device)
            taps = LentTaps("Firecracker", spec.network_namespace)
            undo.push_async_callback(taps.abandon)
            console, child = await _spawn(spec, room, record, undo)
            devices = FcDevices(spec, room)
            undo.callback(devices.close)
            api = await start(Starting(spec, room, child, voices, devices, taps), undo)
            if not room.is_jailed and isolation.hides_files():
                await read_only_root(NAME, child.pid)
            room.until_started.close()
            _publish(spec, room)
            machine = FcMachine(spec, child, api, console, devices, voices, facts)
            machine.keep(undo.pop_all())
            return machine

    def _check_layout(self, spec: MachineSpec) -> None:
        def refuse(operation: str, why: str, hint: str) -> None:
            raise Unsupported(self.name, operation, why, hint)

        slots = len(fc_config.slots(spec))
        if len(spec.devices) + slots > fc_config.MAX_DEVICES or spec.hotplug_ports < 0:
            refuse(
                f"have {len(spec.devices)} devices and {slots} slots for disks",
                f"there are interrupt lines for {fc_config.MAX_DEVICES} together",
                "lower hotplug_ports",
            )
        if spec.vcpus > fc_config.MAX_VCPUS:
            refuse(f"have {spec.vcpus} vCPUs", f"it ends at {fc_config.MAX_VCPUS}", "ask for fewer")
        if spec.prealloc:
            refuse(
                "take all of a machine's memory at its launch",
                "its API has no word for it",
                "set enable_mem_prealloc = false",
            )
        for kind, what in ((HybridVsock, "vsock devices"), (Rng, "entropy sources")):
            if (count := sum(isinstance(device, kind) for device in spec.devices)) > 1:
                refuse(f"have {count} {what}", "it has room for one", "leave the others out")
        for device in spec.devices:
            match device:
                case KernelVsock() | UnixVsock():
                    refuse(
                        f"use a {type(device).__name__}",
                        "its vsock device is its own",
                        "give it a HybridVsock",
                    )
                case SharedDirectory():
                    refuse(
                        f"share {device.socket}",
                        "it has no shared file system",
                        'give containers disks (shared_fs = "none", hotplug_ports above 0)',
                    )
                case NetDevice():
                    spec_check.check_net(device)
                    check_tap("Firecracker", device)


def _check_elf(spec: MachineSpec) -> None:
    if spec_check.read_head("guest kernel", spec.kernel, 4, FIX) != ELF_MAGIC:
        raise PreconditionFailed(
            "guest kernel",
            path=spec.kernel,
            why="a bzImage, which Firecracker does not unpack",
            fix="give its ELF vmlinux (make guest makes one)",
        )


async def _spawn(
    spec: MachineSpec, room: Room, record: Recorder, undo: contextlib.AsyncExitStack
) -> tuple[socket.socket, Child]:
    """Start the VMM, or the jailer that becomes it; its stdout is the guest's console."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    undo.callback(close_socket, ours)
    ours.setblocking(False)
    namespaces = isolation.machine_namespaces(spec.network_namespace)
    namespaces["unshare"] |= room.unshare
    with theirs:
        child = await spawn(
            NAME,
            room.argv,
            record=record,
            pass_fds=room.pass_fds,
            stdout=theirs.fileno(),
            user=room.account,
            no_new_privileges=True,
            **namespaces,
        )
    undo.push_async_callback(child.aclose)
    return ours, child


def _publish(spec: MachineSpec, room: Room) -> None:
    for device in spec.devices:
        if isinstance(device, HybridVsock):
            try:
                room.directory.publish(device)
            except OSError as error:
                ending = f"has no vsock for {device.uds_path} ({error.strerror})"
                raise LaunchFailed(NAME, ending, ()) from error
