"""MachineSpec → the bodies of Firecracker's requests, and the slots of its disks. Pure.

Source: Firecracker v1.16, src/firecracker/swagger/firecracker.yaml; checked in
tests/hypervisors/test_fc_config.py. Fields that came after version 1.12 are not sent: a Firecracker
refuses what it does not know.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from .machine import BlockDevice, GuestAddress, HybridVsock, NetDevice, Rng

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from .bounded_json import JsonValue
    from .machine import MachineSpec

    Body = dict[str, JsonValue]

# As with QEMU; `reboot=k` because the VMM ends when the guest resets by the keyboard controller, of
# which the rest spares the guest what is not there. There is no PCI bus.
BASE_CMDLINE: Final = (
    "console=ttyS0 reboot=k panic=-1 quiet tsc=reliable no_timer_check noreplace-smp"
    " cryptomgr.notests swiotlb=noforce pci=off i8042.noaux i8042.nomux i8042.dumbkbd"
)
MAX_VCPUS: Final = 32
# Each device has an interrupt line of its own. Lines 5 to 23 are free for them; the generation id,
# and from version 1.15 on the clock page, take one each.
# Source: Firecracker v1.16, src/vmm/src/arch/x86_64/layout.rs
MAX_DEVICES: Final = 16
# A drive is writable or not for as long as the machine lives, so there are slots of both kinds.
# Containers write to most of their disks.
READ_ONLY_SLOTS: Final = 2
# What an empty slot shows, which the agent takes for nothing. The guest's kernel tells of a change
# of size only between sizes other than 0. Source: Linux v6.1, block/genhd.c
PLACEHOLDER_BYTES: Final = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class HostSide:
    """What the launcher has laid out, as paths that the VMM's process can use.

    `vsock` is where it is to listen, `placeholder` what fills an empty slot, `metrics` a fifo.
    `images` are by device id, `taps` names of links by device id.
    """

    kernel: str
    initrd: str | None
    vsock: str
    metrics: str
    placeholder: str
    images: Mapping[str, str]
    taps: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """A drive that is there from the start: `drive_id` for the VMM, `node` in the guest."""

    drive_id: str
    node: str
    read_only: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A PUT to `target`; of one device if `device_id` names it."""

    target: str
    body: Body
    device_id: str = ""


def kernel_cmdline(spec: MachineSpec) -> str:
    """The backend's parameters, then the caller's: the kernel takes the last of a repeated one."""
    return f"{BASE_CMDLINE} {spec.cmdline.strip()}".strip()


def slots(spec: MachineSpec) -> tuple[Slot, ...]:
    """The slots for disks that come later, after the drives of the specification."""
    cold = sum(isinstance(device, BlockDevice) for device in spec.devices)
    ports = max(0, spec.hotplug_ports)
    kinds = [False] * ports + [True] * min(ports, READ_ONLY_SLOTS)
    return tuple(
        Slot(drive_id=f"slot{number}", node=_node(cold + number), read_only=read_only)
        for number, read_only in enumerate(kinds)
    )


def addresses(spec: MachineSpec) -> dict[str, GuestAddress]:
    """Where the guest finds the devices of the specification: disks are named in their order."""
    disks = [device.id for device in spec.devices if isinstance(device, BlockDevice)]
    found = {device.id: GuestAddress() for device in spec.devices}
    return found | {name: GuestAddress(node=_node(n)) for n, name in enumerate(disks)}


def requests(spec: MachineSpec, host: HostSide) -> list[Request]:
    """Everything that must be said before the start, in order; the drives' gives their names."""
    found = [
        Request(target="/metrics", body={"metrics_path": host.metrics}),
        Request(target="/machine-config", body=_machine(spec)),
        Request(target="/boot-source", body=_boot_source(spec, host)),
    ]
    disks = [device for device in spec.devices if isinstance(device, BlockDevice)]
    for number, disk in enumerate(disks):
        body = drive(f"disk{number}", host.images[disk.id], read_only=disk.read_only)
        found.append(Request(target=f"/drives/disk{number}", body=body, device_id=disk.id))
    for slot in slots(spec):
        body = drive(slot.drive_id, host.placeholder, read_only=slot.read_only)
        found.append(Request(target=f"/drives/{slot.drive_id}", body=body))
    nets = [device for device in spec.devices if isinstance(device, NetDevice)]
    for number, net in enumerate(nets):
        body = {
            "iface_id": f"net{number}",
            "host_dev_name": host.taps[net.id],
            "guest_mac": net.mac,
        }
        target = f"/network-interfaces/net{number}"
        found.append(Request(target=target, body=body, device_id=net.id))
    for device in spec.devices:
        if isinstance(device, HybridVsock):
            body = {"guest_cid": device.cid, "uds_path": host.vsock}
            found.append(Request(target="/vsock", body=body, device_id=device.id))
        elif isinstance(device, Rng):
            found.append(Request(target="/entropy", body={}, device_id=device.id))
    return found


def drive(drive_id: str, path: str, *, read_only: bool) -> Body:
    """A drive of the machine, whose flushes reach the host's disk."""
    return {
        "drive_id": drive_id,
        "path_on_host": path,
        "is_root_device": False,
        "is_read_only": read_only,
        "cache_type": "Writeback",
    }


def version(answer: JsonValue) -> tuple[int, int] | None:
    """Major and minor number of what GET /version has answered; None if it is something else."""
    text = answer.get("firecracker_version") if isinstance(answer, dict) else None
    if not isinstance(text, str):
        return None
    numbers: Sequence[str] = text.lstrip("v").split(".")[:2]
    if len(numbers) < 2 or not all(number.isdecimal() for number in numbers):
        return None
    return int(numbers[0]), int(numbers[1])


def _machine(spec: MachineSpec) -> Body:
    body: Body = {"vcpu_count": spec.vcpus, "mem_size_mib": spec.memory_mib, "smt": False}
    return body | ({"huge_pages": "2M"} if spec.huge_pages else {})


def _boot_source(spec: MachineSpec, host: HostSide) -> Body:
    body: Body = {"kernel_image_path": host.kernel, "boot_args": kernel_cmdline(spec)}
    return body | ({"initrd_path": host.initrd} if host.initrd is not None else {})


def _node(number: int) -> str:
    """Name a disk as the guest's kernel does; there are fewer than letters."""
    return f"/dev/vd{chr(ord('a') + number)}"
