"""What ACRN can't do, and what it needs of its host, looked at before anything is taken."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Final, NoReturn

from . import accel, acrn_argv, spec_check
from .errors import PreconditionFailed, Unsupported
from .lent_taps import check_tap
from .machine import BlockDevice, KernelVsock, NetDevice, Rng, SharedDirectory

if TYPE_CHECKING:
    from .machine import Device, MachineSpec

NAME: Final = "acrn"
# Source: devicemodel/core/main.c VM_MAXCPU.
MAX_VCPUS: Final = 16
# Source: devicemodel/core/vmmapi.c vm_parse_memsize.
MIN_MEMORY_MIB: Final = 128
CPUINFO: Final = Path("/proc/cpuinfo")
FIX: Final = "install acrn-dm, or correct the hypervisor path"
INSTEAD: Final = "another VMM ([hypervisor.qemu])"
OTHER_VMM: Final = f"use {INSTEAD}"


def check(spec: MachineSpec) -> None:
    """See `Hypervisor.check`."""
    spec_check.check_program("acrn-dm", spec.binary, FIX)
    _check_host(spec)
    _check_layout(spec)
    spec_check.check_values(spec, acrn_argv.kernel_cmdline(spec))
    spec_check.check_kernel(spec.kernel)
    _check_bzimage(spec.kernel)
    if spec.initrd is not None:
        spec_check.check_initrd(spec.initrd)


def processors(machine_id: str, count: int, cpuinfo: Path = CPUINFO) -> tuple[int, ...]:
    """The local APIC ids of processors for a machine's vCPUs, other ones for other machines.

    Raises:
        PreconditionFailed: the host has not as many.
    """
    with open(cpuinfo, encoding="ascii", errors="replace") as stream:
        known = [int(line.partition(":")[2]) for line in stream if line.startswith("apicid")]
    if len(known) < count:
        raise PreconditionFailed(
            "vCPUs", path=None,
            why=f"{count} were asked for, and ACRN gives each a processor of the {len(known)} here",
            fix="lower default_vcpus, or the pod's limits",
        )  # fmt: skip
    first = zlib.crc32(machine_id.encode()) % len(known)
    return tuple(sorted((known[first:] + known[:first])[:count]))


def check_disk(device: BlockDevice) -> None:
    """Refuse a disk that acrn-dm can't have.

    Raises:
        PreconditionFailed, Unsupported.
    """
    if not spec_check.DEVICE_ID.fullmatch(device.id):
        raise PreconditionFailed(
            "device id", path=None, why=f"{device.id!r}", fix="use letters, digits, - and _"
        )
    if device.serial:
        refuse("give a disk a serial number", "acrn-dm makes its own of the path", "leave it out")


def refuse(operation: str, why: str, hint: str) -> NoReturn:
    """Raise Unsupported."""
    raise Unsupported(NAME, operation, why, hint)


def _check_host(spec: MachineSpec) -> None:
    if spec.accelerator != "auto":
        refuse(
            f"run guests on {spec.accelerator!r}",
            "it is the hypervisor below this host",
            f'set accelerator = "auto", or {OTHER_VMM}',
        )
    if spec.unprivileged:
        refuse(
            "run acrn-dm as a user of its own",
            "the hypervisor's device and the host's huge pages are root's",
            f"set rootless = false, or {OTHER_VMM}",
        )
    problem = accel.acrn_problem()
    if problem is not None:
        raise PreconditionFailed(
            "ACRN", path=None, why=problem, fix=f"boot this host as its Service VM, or {OTHER_VMM}"
        )
    processors(spec.id, spec.vcpus)


def _check_layout(spec: MachineSpec) -> None:
    if len(spec.devices) + spec.hotplug_ports > acrn_argv.MAX_DEVICES or spec.hotplug_ports < 0:
        refuse(
            f"have {len(spec.devices)} devices and {spec.hotplug_ports} hot-plug ports",
            f"the bus has {acrn_argv.MAX_DEVICES} slots for them",
            "lower hotplug_ports",
        )
    if spec.vcpus > MAX_VCPUS:
        refuse(f"have {spec.vcpus} vCPUs", f"it ends at {MAX_VCPUS}", "ask for fewer")
    if spec.memory_mib < MIN_MEMORY_MIB:
        refuse(
            f"have {spec.memory_mib} MiB", f"it begins at {MIN_MEMORY_MIB}", "raise default_memory"
        )
    for device in spec.devices:
        _check_device(device)


def _check_device(device: Device) -> None:
    match device:
        case Rng():
            return
        case BlockDevice():
            check_disk(device)
        case KernelVsock() if accel.kernel_vsock_usable():
            return
        case KernelVsock():
            raise PreconditionFailed(
                "vsock of the host's kernel",
                path=accel.VHOST_VSOCK_DEVICE,
                why="does not open",
                fix=f"load vhost_vsock, or {OTHER_VMM}",
            )
        case NetDevice():
            check_tap("acrn-dm", device)
        case SharedDirectory():
            refuse(
                f"share {device.socket}",
                "it has no shared file system",
                'give containers disks (shared_fs = "none", hotplug_ports above 0)',
            )
        case _:
            refuse(
                f"have the {type(device).__name__} {device.id}",
                "acrn-dm has no such device",
                OTHER_VMM,
            )


def _check_bzimage(kernel: Path) -> None:
    head = spec_check.read_head("guest kernel", kernel, 0x206, FIX)
    if head[0x202:] != b"HdrS":
        raise PreconditionFailed(
            "guest kernel",
            path=kernel,
            why="no bzImage, and acrn-dm loads nothing else",
            fix="set kernel to the bzImage beside it (make guest makes one)",
        )
