"""The command line of acrn-dm for a machine, and where its guest finds things. Pure.

    slot 0   host bridge        slot 1   LPC bus with the UART that is the console
    slot 3   the devices of the specification, then empty disks to be filled while it runs
    slot 31  a console port that acrn-dm connects to us when it has made all the others

Source: ACRN's doc/user-guides/acrn-dm-parameters.rst and devicemodel/core/main.c.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from .machine import BlockDevice, GuestAddress, KernelVsock, NetDevice, Rng

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .machine import Device, MachineSpec

MONITOR_SOCKET: Final = "monitor.sock"
READY_SOCKET: Final = "ready.sock"
# Slot 2 was another device's in earlier versions, which passed it on by its number.
FIRST_SLOT: Final = 3
READY_SLOT: Final = 31
MAX_DEVICES: Final = READY_SLOT - FIRST_SLOT
# Its memory is of huge pages. Source: devicemodel/core/vmmapi.c vm_parse_memsize, hugetlb.c.
MEMORY_STEP_MIB: Final = 2
# A triple fault ends the machine; by any other way to reboot its guest would be booted again.
# Source: hypervisor/arch/x86/guest/vm_reset.c triple_fault_shutdown_vm.
BASE_CMDLINE: Final = (
    "console=ttyS0 reboot=t panic=-1 quiet tsc=reliable no_timer_check cryptomgr.notests"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class HostSide:
    """What the launcher prepared, as acrn-dm sees it.

    `directory` is its own one, `images` are the disks and `taps` the names of links, both by device
    id; `processors` are the local APIC ids of the host's processors that run the vCPUs.
    """

    directory: str
    kernel: str
    initrd: str | None
    images: Mapping[str, str]
    taps: Mapping[str, str]
    processors: tuple[int, ...]


def memory_mib(spec: MachineSpec) -> int:
    """What the guest gets: whole huge pages."""
    return -(-spec.memory_mib // MEMORY_STEP_MIB) * MEMORY_STEP_MIB


def kernel_cmdline(spec: MachineSpec) -> str:
    """The backend's parameters, then the caller's: the kernel takes the last of a repeated one."""
    return f"{BASE_CMDLINE} {spec.cmdline}".strip()


def addresses(spec: MachineSpec) -> dict[str, GuestAddress]:
    """Where the guest finds the devices of the specification."""
    return {device.id: address(slot) for slot, device in enumerate(spec.devices, start=FIRST_SLOT)}


def address(slot: int) -> GuestAddress:
    """Where the guest finds what is in a slot."""
    return GuestAddress(pci_path=f"{slot:02x}")


def empty_slots(spec: MachineSpec) -> range:
    """The slots of disks to be filled while it runs."""
    first = FIRST_SLOT + len(spec.devices)
    return range(first, first + spec.hotplug_ports)


def command_line(spec: MachineSpec, name: str, host: HostSide) -> list[str]:
    """Lay out the machine called `name`."""
    # fmt: off
    argv = [
        str(spec.binary),
        "-m", f"{memory_mib(spec)}M",
        "--cpu_affinity", ",".join(map(str, host.processors)),
        "--cmd_monitor", f"{host.directory}/{MONITOR_SOCKET}",
        # Its own words share stdout with the guest's console: errors alone.
        "--logger_setting", "console,level=1",
        "-k", host.kernel,
        "-B", kernel_cmdline(spec),
        "-s", "0:0,hostbridge",
        "-s", "1:0,lpc",
        "-l", "com1,stdio",
    ]
    # fmt: on
    if host.initrd is not None:
        argv += ["-r", host.initrd]
    for slot, device in enumerate(spec.devices, start=FIRST_SLOT):
        argv += ["-s", f"{slot},{_device(device, host)}"]
    for slot in empty_slots(spec):
        argv += ["-s", f"{slot},virtio-blk,nodisk"]
    ready = f"socket:ready={host.directory}/{READY_SOCKET}:client"
    return [*argv, "-s", f"{READY_SLOT},virtio-console,{ready}", name]


def disk_options(path: str, *, read_only: bool) -> str:
    """A disk's backing file and how it is used. The guest's flushes are obeyed."""
    return f"{path},ro" if read_only else f"{path},writeback"


def _device(device: Device, host: HostSide) -> str:
    match device:
        case Rng():
            return "virtio-rnd"
        case BlockDevice():
            options = disk_options(host.images[device.id], read_only=device.read_only)
            return f"virtio-blk,{options}"
        case NetDevice():
            return f"virtio-net,tap={host.taps[device.id]},mac={device.mac}"
        case KernelVsock():
            return f"vhost-vsock,cid={device.cid}"
        case _:
            raise TypeError(f"{type(device).__name__} passed the check")
