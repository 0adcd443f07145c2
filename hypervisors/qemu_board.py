"""What QEMU's machine types differ in. Pure.

q35 has a PCI Express bus, with ports for what comes later. microvm is the least that boots: slots
for virtio devices at fixed addresses (virtio-mmio) that its ACPI tables describe, and a serial
port. Nothing comes later: no device, no vCPU, no memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from .errors import Unsupported
from .machine import BlockDevice, GuestAddress

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .machine import Device
    from .qmp_protocol import JsonValue

# Root bus slots of q35. 0 is the host bridge and 0x1f the ICH9; everything between is ours.
FIRST_DEVICE_SLOT: Final = 0x01
FIRST_PORT_SLOT: Final = 0x10
PVPANIC_SLOT: Final = 0x1E
# Source: QEMU hw/i386/microvm.c: 24 with ACPI and so with a second I/O APIC. The guest finds them
# from the last to the first. The first is left out: its interrupt arrives at the third, because
# pin 0 of either controller is taken for the old timer's (hw/intc/ioapic.c, observed with 7.2.22).
LAST_MMIO_SLOT: Final = 23


@dataclass(frozen=True, slots=True, kw_only=True)
class Board:
    """One machine type. `flags` are those of `-machine`, `cmdline` is for the guest's kernel."""

    name: str
    flags: str
    cmdline: str
    bus: Literal["pci", "mmio"]
    max_devices: int
    max_ports: int
    arguments: tuple[str, ...] = ()

    @property
    def takes_devices(self) -> bool:
        """Whether anything can be plugged while the machine runs."""
        return self.bus == "pci"

    def driver(self, kind: str) -> str:
        """The name of a virtio or vhost device as this board's bus takes it."""
        return f"{kind}-pci" if self.bus == "pci" else f"{kind}-device"

    def place(self, index: int) -> dict[str, JsonValue]:
        """Where the machine's `index`th device lies."""
        if self.bus == "pci":
            return root_place(FIRST_DEVICE_SLOT + index)
        return {"bus": f"virtio-mmio-bus.{LAST_MMIO_SLOT - index}"}

    def address(self, index: int, devices: Sequence[Device]) -> GuestAddress:
        """How the guest finds the `index`th of the machine's devices."""
        if self.bus == "pci":
            return GuestAddress(pci_path=f"{FIRST_DEVICE_SLOT + index:02x}")
        if not isinstance(devices[index], BlockDevice):
            return GuestAddress()
        # The guest names disks in the order in which it finds them.
        disks = sum(isinstance(device, BlockDevice) for device in devices[:index])
        return GuestAddress(node=f"/dev/vd{chr(ord('a') + disks)}")

    def panic_device(self) -> dict[str, JsonValue]:
        """What tells a guest's panic from a reboot."""
        if self.bus == "pci":
            return {"driver": "pvpanic-pci", "id": "pvpanic", **root_place(PVPANIC_SLOT)}
        return {"driver": "pvpanic", "id": "pvpanic"}


def root_place(slot: int) -> dict[str, JsonValue]:
    """A slot of the root bus."""
    return {"bus": "pcie.0", "addr": f"{slot:#04x}"}


# pcie_ports: ACPI does the hot-plug of q35's root ports; their own services cost nearly a tenth of
# a second with 8 ports. pci: all buses are behind the bridges of bus 0; without the hint Linux
# looks for more of them in 16,000 port accesses, each of which leaves KVM for QEMU.
Q35: Final = Board(
    name="q35",
    flags="sata=off,usb=off,smbus=off,hpet=off,i8042=off,vmport=off",
    cmdline="pcie_ports=compat pci=lastbus=0",
    bus="pci",
    max_devices=FIRST_PORT_SLOT - FIRST_DEVICE_SLOT,
    max_ports=PVPANIC_SLOT - FIRST_PORT_SLOT,
)
# Its ACPI is the reduced one, with which Linux uses neither of the old timer and interrupt
# controller. The clock stays: an emulated guest has its time from there.
MICROVM: Final = Board(
    name="microvm",
    flags="pit=off,pic=off,rtc=on,acpi=on",
    cmdline="pci=off",
    bus="mmio",
    max_devices=LAST_MMIO_SLOT,
    max_ports=0,
    # vsock and virtio-fs exist in virtio 1 alone.
    arguments=("-global", "virtio-mmio.force-legacy=false"),
)
# The way out where a microvm can't.
INSTEAD: Final = 'machine_type = "q35"'
BOARDS: Final = {board.name: board for board in (Q35, MICROVM)}


def find_board(machine_type: str) -> Board:
    """Return the board of a machine type.

    Raises:
        Unsupported: there is none.
    """
    if machine_type in BOARDS:
        return BOARDS[machine_type]
    raise Unsupported(
        "qemu",
        f"build a machine of type {machine_type!r}",
        "only q35 takes devices while it runs, and only microvm goes without PCI",
        'set machine_type = "q35" or "microvm"',
    )
