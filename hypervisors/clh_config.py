"""MachineSpec → the bodies of Cloud Hypervisor's requests. Pure.

Source: Cloud Hypervisor v53, vmm/src/api/openapi/cloud-hypervisor.yaml; checked in
tests/hypervisors/test_clh_config.py. Hot-plugged devices are described by the same functions as
cold ones.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from .machine import (
    HUGE_PAGE_MIB,
    BlockDevice,
    GuestAddress,
    HybridVsock,
    NetDevice,
    Rng,
    SharedDirectory,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .bounded_json import JsonValue
    from .machine import MachineSpec

    Body = dict[str, JsonValue]

MIB: Final = 1 << 20
# Where disks are shown to the VMM, in its own directory.
DISKS_NAME: Final = "disks"
# Linux adds memory in blocks of this size, and Cloud Hypervisor takes nothing else.
MEMORY_STEP_MIB: Final = 128
# As with QEMU; what is there for its PCI bridges has no use here.
BASE_CMDLINE: Final = (
    "console=ttyS0 panic=-1 quiet tsc=reliable no_timer_check noreplace-smp cryptomgr.notests"
    " swiotlb=noforce"
)
# Segment 0 has 32 slots; the host bridge and the panic device take one each.
MAX_DEVICES: Final = 30
_BDF: Final = re.compile(r"0000:00:([0-9a-fA-F]{2})\.0")


@dataclass(frozen=True, slots=True, kw_only=True)
class HostSide:
    """What the launcher opened, as paths the VMM's process can use.

    `directory` is the VMM's own, `vsock` where it is to listen. `shares` and `images` are by
    device id.
    """

    kernel: str
    initrd: str | None
    directory: str
    vsock: str
    shares: Mapping[str, str]
    images: Mapping[str, str]
    has_landlock: bool


def kernel_cmdline(spec: MachineSpec) -> str:
    """The backend's parameters, then the caller's: the kernel takes the last of a repeated one."""
    return f"{BASE_CMDLINE} {spec.cmdline.strip()}".strip()


def vm_config(spec: MachineSpec, host: HostSide) -> Body:
    """The body of vm.create, without interfaces: their descriptors need requests of their own.

    The serial port writes to the VMM's stdout, a panic becomes an event, and the guest's memory is
    shared when a daemon must map it.
    """
    payload: Body = {"kernel": host.kernel, "cmdline": kernel_cmdline(spec)}
    if host.initrd is not None:
        payload["initramfs"] = host.initrd
    config: Body = {
        "payload": payload,
        "cpus": {"boot_vcpus": spec.vcpus, "max_vcpus": spec.max_vcpus},
        "memory": _memory(spec),
        "serial": {"mode": "Tty"},
        "console": {"mode": "Off"},
        "pvpanic": True,
        "landlock_enable": host.has_landlock,
    }
    if host.has_landlock and spec.hotplug_ports > 0:
        # What comes later is shown there; all else the VMM derives from this configuration.
        config["landlock_rules"] = [{"path": host.directory, "access": "rw"}]
    disks: list[JsonValue] = []
    shares: list[JsonValue] = []
    for device in spec.devices:
        match device:
            case BlockDevice():
                disks.append(disk_config(device, host.images[device.id]))
            case SharedDirectory():
                shares.append(_share(device, host.shares[device.id]))
            case HybridVsock():
                config["vsock"] = {"id": device.id, "cid": device.cid, "socket": host.vsock}
            case Rng():
                config["rng"] = {"id": device.id, "src": "/dev/urandom"}
    return config | ({"disks": disks} if disks else {}) | ({"fs": shares} if shares else {})


def disk_config(device: BlockDevice, path: str) -> Body:
    """A disk. Always raw: a guest that writes a header must not choose how its disk is read."""
    body: Body = {
        "id": device.id,
        "path": path,
        "readonly": device.read_only,
        "image_type": "Raw",
        "backing_files": False,
    }
    return body | ({"serial": device.serial} if device.serial else {})


def net_config(device: NetDevice) -> Body:
    """An interface over descriptors that come with the request: a pair of queues for each.

    Without an MTU: the VMM would set it on the tap, which lies in a namespace it cannot reach. The
    guest is told by the agent.
    """
    return {"id": device.id, "mac": device.mac, "num_queues": 2 * len(device.tap_fds)}


def guest_address(bdf: JsonValue) -> GuestAddress | None:
    """Where the guest finds a device of this PCI address; None for one we do not place."""
    found = _BDF.fullmatch(bdf) if isinstance(bdf, str) else None
    return GuestAddress(pci_path=found[1].lower()) if found else None


def device_addresses(info: JsonValue) -> dict[str, GuestAddress]:
    """The addresses in an answer to vm.info: a PCI node's, for the virtio device below it."""
    tree = info.get("device_tree") if isinstance(info, dict) else None
    addresses: dict[str, GuestAddress] = {}
    for node in tree.values() if isinstance(tree, dict) else ():
        match node:
            case {"pci_bdf": bdf, "children": [str(child), *_]}:
                if (address := guest_address(bdf)) is not None:
                    addresses[child] = address
    return addresses


def _memory(spec: MachineSpec) -> Body:
    memory: Body = {
        "size": spec.memory_mib * MIB,
        "shared": any(isinstance(device, SharedDirectory) for device in spec.devices),
    }
    if spec.huge_pages:
        memory |= {"hugepages": True, "hugepage_size": HUGE_PAGE_MIB * MIB}
    if spec.prealloc:
        memory |= {"prefault": True}
    room = spec.max_memory_mib - spec.memory_mib
    if room >= MEMORY_STEP_MIB:
        # A step more: the first one begins at the next whole step above the machine's own memory.
        steps = room // MEMORY_STEP_MIB + 1
        memory |= {"hotplug_method": "Acpi", "hotplug_size": steps * MEMORY_STEP_MIB * MIB}
    return memory


def _share(device: SharedDirectory, socket: str) -> Body:
    return {
        "id": device.id,
        "tag": device.tag,
        "socket": socket,
        "num_queues": 1,
        "queue_size": 1024,
    }
