"""MachineSpec → QEMU's command line and descriptors. Pure.

The recipe is the fastest measured way to a running agent: qboot firmware, an uncompressed PVH
kernel, no device the guest does not use. Hot-plugged devices are described by the same functions,
so that a device looks the same whichever way it arrived. What differs by machine type is
`qemu_board`'s.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal

from .machine import (
    HUGE_PAGE_MIB,
    BlockDevice,
    GuestAddress,
    KernelVsock,
    NetDevice,
    Rng,
    SharedDirectory,
    UnixVsock,
)
from .qemu_board import FIRST_PORT_SLOT, Q35, find_board, root_place
from .qmp_client import quote_json

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .machine import MachineSpec
    from .qemu_board import Board
    from .qmp_protocol import JsonValue

MIB: Final = 1 << 20
# Linux adds memory in blocks of this size. Source: x86-64 SECTION_SIZE_BITS 27.
MEMORY_STEP_MIB: Final = 128
# vhost-user daemons map at most 8 regions; low, high and one spare are taken before any DIMM.
MEMORY_SLOTS: Final = 4

SANDBOX: Final = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
# x86-64-v2, what distributions expect of a container's CPU, on the model TCG is fastest with.
TCG_CPU: Final = "qemu64,+ssse3,+sse4.1,+sse4.2,+popcnt"
KVM_CPU: Final = "host,pmu=off"

# swiotlb: room for memory hot-plug above 4 GiB makes Linux set 64 MiB of bounce buffers aside,
# which no device here uses; that costs a tenth of a second under emulation.
BASE_CMDLINE: Final = (
    "console=ttyS0 panic=-1 quiet tsc=reliable no_timer_check noreplace-smp cryptomgr.notests"
    " swiotlb=noforce"
)
# An emulated CPU has neither the leaks these protect from nor a secret layout.
TCG_CMDLINE: Final = "nokaslr mitigations=off"


@dataclass(slots=True)
class FdTable:
    """Numbers descriptors for the child from 3 up; `pass_fds` is what `child.spawn` takes."""

    pass_fds: dict[int, int] = field(default_factory=dict)

    def add(self, our_fd: int) -> int:
        number = 3 + len(self.pass_fds)
        self.pass_fds[number] = our_fd
        return number


@dataclass(frozen=True, slots=True)
class OpenBlock:
    """An opened image: its descriptor, and "file" or "host_device"."""

    fd: int
    driver: str


@dataclass(frozen=True, slots=True, kw_only=True)
class HostSide:
    """What the launcher opened for QEMU, in our own descriptor numbers.

    `vhost_user_fds` are connections to the daemons, `blocks` open images, both by device id.
    `tsc_khz` is the frequency of the host's time stamp counter, if known.
    """

    accelerator: Literal["kvm", "tcg"]
    qmp_fd: int
    console_fd: int
    kernel_fd: int
    initrd_fd: int | None
    vhost_user_fds: Mapping[str, int]
    blocks: Mapping[str, OpenBlock]
    tsc_khz: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class QemuCommand:
    argv: tuple[str, ...]
    pass_fds: Mapping[int, int]
    addresses: Mapping[str, GuestAddress]


def kernel_cmdline(spec: MachineSpec, accelerator: str, tsc_khz: int | None = None) -> str:
    """The backend's parameters, then the caller's: the kernel takes the last of a repeated one."""
    parts = [BASE_CMDLINE, find_board(spec.machine_type).cmdline]
    if accelerator == "tcg":
        parts.append(TCG_CMDLINE)
        if tsc_khz is not None:
            # The guest measures the counter against a timer. On a busy host that went wrong in a
            # quarter of the boots, by up to 66 times, and so did all of the guest's time. A microvm
            # has no timer that it could go on with then: it stands still before it says a word.
            parts.append(f"tsc_early_khz={tsc_khz}")
    parts.append(spec.cmdline.strip())
    return " ".join(part for part in parts if part)


def build_command(spec: MachineSpec, host: HostSide) -> QemuCommand:
    """Lay out the machine; every descriptor named in `host` and in the devices is passed."""
    table = FdTable()
    board = find_board(spec.machine_type)
    argv = [str(spec.binary), *_machine_arguments(spec, host, board)]
    # By descriptor: the VMM's own user need not be able to walk there.
    argv += ["-kernel", f"/proc/self/fd/{table.add(host.kernel_fd)}"]
    if host.initrd_fd is not None:
        argv += ["-initrd", f"/proc/self/fd/{table.add(host.initrd_fd)}"]
    # fmt: off
    argv += [
        "-chardev", f"socket,id=qmp,fd={table.add(host.qmp_fd)}",
        "-mon", "chardev=qmp,mode=control",
        "-chardev", f"socket,id=console,fd={table.add(host.console_fd)}",
        "-serial", "chardev:console",
        "-device", quote_json(board.panic_device()),
    ]
    # fmt: on
    addresses: dict[str, GuestAddress] = {}
    for index, device in enumerate(spec.devices):
        place = board.place(index)
        addresses[device.id] = board.address(index, spec.devices)
        match device:
            case BlockDevice():
                block = host.blocks[device.id]
                argv += ["-add-fd", f"fd={table.add(block.fd)},set={index}"]
                argv += ["-blockdev", quote_json(blockdev_node(device, block.driver, index))]
                argv += ["-device", quote_json(block_device(device, board) | place)]
            case NetDevice():
                argv += ["-netdev", _tap_argument(device, table)]
                argv += ["-device", quote_json(net_device(device, board) | place)]
            case SharedDirectory() | UnixVsock():
                number = table.add(host.vhost_user_fds[device.id])
                argv += ["-chardev", f"socket,id=c-{device.id},fd={number}"]
                argv += ["-device", quote_json(vhost_user_device(device, board) | place)]
            case KernelVsock():
                argv += ["-device", quote_json(_kernel_vsock_device(device, table, board) | place)]
            case Rng():
                source: dict[str, JsonValue] = {"qom-type": "rng-random", "id": f"s-{device.id}"}
                argv += ["-object", quote_json(source | {"filename": "/dev/urandom"})]
                properties: dict[str, JsonValue] = {"rng": f"s-{device.id}"}
                argv += [
                    "-device",
                    _device(board.driver("virtio-rng"), device.id, properties | place),
                ]
    for port in range(min(spec.hotplug_ports, board.max_ports)):
        argv += ["-device", _root_port(port)]
    return QemuCommand(argv=tuple(argv), pass_fds=table.pass_fds, addresses=addresses)


def possible_vcpus(count: int, accelerator: str) -> int:
    """How many vCPUs QEMU is to make room for, if the guest may have so many.

    For an emulated guest never one: QEMU then leaves memory barriers and locked instructions out
    of what it makes of the guest's code, though the daemons work on its rings at the same time.
    Source: QEMU accel/tcg/tcg-accel-ops-mttcg.c, `max_cpus > 1`; tcg/tcg-op.c `tcg_gen_mb`.
    """
    return count if accelerator == "kvm" else max(2, count)


def _machine_arguments(spec: MachineSpec, host: HostSide, board: Board) -> list[str]:
    memory = f"size={spec.memory_mib}M"
    if board.takes_devices and spec.max_memory_mib > spec.memory_mib:
        memory += f",slots={MEMORY_SLOTS},maxmem={spec.max_memory_mib}M"
    max_vcpus = spec.max_vcpus if board.takes_devices else spec.vcpus
    backend = memory_backend("mem", spec.memory_mib, spec)
    # fmt: off
    argv = [
        "-name", f"guest={spec.id},debug-threads=on",
        "-no-user-config", "-nodefaults", "-no-reboot",
        "-display", "none",
        "-sandbox", SANDBOX,
        "-machine", f"{board.name},accel={host.accelerator},memory-backend=mem,{board.flags}",
        "-cpu", KVM_CPU if host.accelerator == "kvm" else TCG_CPU,
        "-smp", f"cpus={spec.vcpus},maxcpus={possible_vcpus(max_vcpus, host.accelerator)}",
        "-m", memory,
        "-object", quote_json(backend),
        "-bios", "qboot.rom",
        "-append", kernel_cmdline(spec, host.accelerator, host.tsc_khz),
        *board.arguments,
    ]
    # fmt: on
    return argv


def port_place(port: int) -> dict[str, JsonValue]:
    """Behind root port `port`; such a bus has slot 0 only."""
    return {"bus": f"rp{port}", "addr": "0x00"}


def port_address(port: int) -> GuestAddress:
    """How the guest finds what is plugged into root port `port`."""
    return GuestAddress(pci_path=f"{FIRST_PORT_SLOT + port:02x}/00")


def port_fd_set(port: int) -> int:
    """The set of descriptors of an image behind a root port; cold-plugged ones come before."""
    return Q35.max_devices + port


def memory_backend(object_id: str, size_mib: int, spec: MachineSpec) -> dict[str, JsonValue]:
    """Shared memory: vhost-user daemons map it."""
    backend: dict[str, JsonValue] = {
        "qom-type": "memory-backend-memfd",
        "id": object_id,
        "size": size_mib * MIB,
        "share": True,
    }
    if spec.huge_pages:
        backend |= {"hugetlb": True, "hugetlbsize": HUGE_PAGE_MIB * MIB}
    return backend | ({"prealloc": True} if spec.prealloc else {})


def blockdev_node(device: BlockDevice, driver: str, fd_set: int) -> dict[str, JsonValue]:
    """The host side of a block device, opened and locked by us.

    Node names have at most 31 characters.
    """
    return {
        "driver": driver,
        "node-name": f"b-{device.id}",
        "filename": f"/dev/fdset/{fd_set}",
        "read-only": device.read_only,
        "discard": "unmap",
        "locking": "off",
    }


def block_device(device: BlockDevice, board: Board = Q35) -> dict[str, JsonValue]:
    """The guest side of a block device."""
    properties: dict[str, JsonValue] = {
        "driver": board.driver("virtio-blk"),
        "id": device.id,
        "drive": f"b-{device.id}",
    }
    return properties | ({"serial": device.serial} if device.serial else {})


def net_device(device: NetDevice, board: Board = Q35) -> dict[str, JsonValue]:
    """The guest side of an interface. An empty romfile: no boot ROM is needed to be installed."""
    properties: dict[str, JsonValue] = {
        "driver": board.driver("virtio-net"),
        "id": device.id,
        "netdev": f"n-{device.id}",
        "mac": device.mac,
        "host_mtu": device.mtu,
    }
    queues = len(device.tap_fds)
    if queues > 1:
        properties |= {"mq": True}
    if board.bus == "pci":
        properties |= {"romfile": ""}
        if queues > 1:
            # One for each direction of each queue, one for configuration, one for control.
            properties |= {"vectors": 2 * queues + 2}
    return properties


def vhost_user_device(
    device: SharedDirectory | UnixVsock, board: Board = Q35
) -> dict[str, JsonValue]:
    """A device whose other half is a daemon behind character device `c-<id>`."""
    properties: dict[str, JsonValue] = {"id": device.id, "chardev": f"c-{device.id}"}
    match device:
        case SharedDirectory():
            return {
                "driver": board.driver("vhost-user-fs"),
                **properties,
                "tag": device.tag,
                "queue-size": 1024,
            }
        case UnixVsock():
            return {"driver": board.driver("vhost-user-vsock"), **properties}


def _kernel_vsock_device(device: KernelVsock, table: FdTable, board: Board) -> dict[str, JsonValue]:
    return {
        "driver": board.driver("vhost-vsock"),
        "id": device.id,
        "guest-cid": device.cid,
        "vhostfd": str(table.add(device.vhost_fd)),
    }


def _tap_argument(device: NetDevice, table: FdTable) -> str:
    taps = ":".join(str(table.add(fd)) for fd in device.tap_fds)
    argument = f"tap,id=n-{device.id},fds={taps}"
    if device.vhost_fds:
        vhosts = ":".join(str(table.add(fd)) for fd in device.vhost_fds)
        return f"{argument},vhost=on,vhostfds={vhosts}"
    return argument


def _root_port(port: int) -> str:
    # Both must be unique and non-zero: the guest names its slots by them.
    numbers: dict[str, JsonValue] = {"chassis": port + 1, "slot": port + 1}
    return _device("pcie-root-port", f"rp{port}", numbers | root_place(FIRST_PORT_SLOT + port))


def _device(driver: str, device_id: str, properties: Mapping[str, JsonValue]) -> str:
    return quote_json({"driver": driver, "id": device_id, **properties})
