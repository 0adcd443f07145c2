"""What a virtual machine is made of, as plain values. Pure: no I/O, no VMM knowledge.

Built by the composition root from its configuration, read by the backends.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    from pathlib import Path

# The size that every x86-64 has, and that hosts reserve unless told otherwise.
HUGE_PAGE_MIB = 2

Accelerator: TypeAlias = Literal["auto", "kvm", "tcg"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockDevice:
    """A raw image file or block device. `serial` is at most 20 bytes (virtio-blk's limit)."""

    id: str
    path: Path
    read_only: bool
    serial: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class NetDevice:
    """A network interface over open tap descriptors, one a queue pair.

    The descriptors stay the caller's: the backend duplicates them into the VMM and never closes
    them. `vhost_fds`, when given, are as many open /dev/vhost-net descriptors.
    """

    id: str
    mac: str
    tap_fds: tuple[int, ...]
    mtu: int
    vhost_fds: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedDirectory:
    """A virtio-fs share under `tag`; `socket` is where the vhost-user daemon listens."""

    id: str
    tag: str
    socket: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class UnixVsock:
    """A vsock device of a vhost-user daemon that listens on `socket`.

    `uds_path` is where the host reaches the guest (`CONNECT <port>`), and `<uds_path>_<port>`
    where the guest reaches the host.
    """

    id: str
    socket: Path
    uds_path: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class HybridVsock:
    """A vsock device of the VMM itself, which needs neither a daemon nor the host's kernel.

    As with `UnixVsock` the host reaches the guest at `uds_path` (`CONNECT <port>`), and the guest
    the host at `<uds_path>_<port>`: such sockets as listen when the machine is launched. The
    backend puts `uds_path` there at the launch, wherever its VMM listens, and takes it away at the
    end. `cid` is the guest's own number, which nobody else has to know.
    """

    id: str
    uds_path: Path
    cid: int = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelVsock:
    """A vsock device of the host kernel: `vhost_fd` is an open /dev/vhost-vsock, the caller's."""

    id: str
    cid: int
    vhost_fd: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Rng:
    """An entropy source fed by the host's urandom."""

    id: str = "rng"


Vsock: TypeAlias = UnixVsock | HybridVsock | KernelVsock
Device: TypeAlias = BlockDevice | NetDevice | SharedDirectory | Vsock | Rng


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineSpec:
    """One virtual machine as it is at power-on.

    `cmdline` is what the caller wants on the kernel command line; the backend puts its own
    parameters (console, panic, accelerator tuning) in front. `hotplug_ports` is how many devices
    can be attached at the same time later. `run_dir` is a private directory for the
    backend.
    `huge_pages` takes the memory from the host's reserved huge pages, `prealloc` takes all of it at
    the launch.
    `unprivileged` runs the VMM under a user of its own where the launcher is root.
    `network_namespace` is an open descriptor, the caller's, of the network namespace that the VMM
    runs in; None gives it one of its own with nothing in it.
    """

    id: str
    kernel: Path
    initrd: Path | None
    cmdline: str
    vcpus: int
    max_vcpus: int
    memory_mib: int
    max_memory_mib: int
    huge_pages: bool = False
    prealloc: bool = False
    binary: Path
    run_dir: Path
    accelerator: Accelerator = "auto"
    machine_type: str = "q35"
    devices: tuple[Device, ...] = ()
    hotplug_ports: int = 0
    console_bytes: int = 262144
    unprivileged: bool = True
    network_namespace: int | None = None


class ExitKind(Enum):
    """How a virtual machine ended."""

    CLEAN = "clean"
    REBOOT = "reboot"
    PANIC = "panic"
    KILLED = "killed"
    CRASH = "crash"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class VmExit:
    """The one end of a virtual machine: `code` or `signal` of the VMM process, and why."""

    kind: ExitKind
    code: int | None
    signal: int | None
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestAddress:
    """Where the guest finds a device: by its place, or, without PCI, by the name it will have.

    `pci_path` is the chain of slots from the root bus, hexadecimal, "10/00" for a device behind the
    root port in slot 0x10. Source: agent.proto Storage.source and Device.id of driver "blk".
    `node` is the guest's node, "/dev/vdb". Source: the same of driver "mmioblk".
    """

    pci_path: str = ""
    node: str = ""


class VmEventKind(Enum):
    """What happened to a running virtual machine."""

    PAUSED = "paused"
    RESUMED = "resumed"
    PANICKED = "panicked"
    SHUTDOWN = "shutdown"
    DEVICE_REMOVED = "device_removed"
    EXITED = "exited"


@dataclass(frozen=True, slots=True, kw_only=True)
class VmEvent:
    """`detail` is the shutdown reason, the device id or the exit reason; "" where there is none."""

    kind: VmEventKind
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What a backend can do with one specification. A flag that is false is `Unsupported`.

    `panic_event`: a guest's panic is told from its reboot; `power_off`: a guest that switches
    itself off ends its VMM.

    Of the vsock flags one at least is true; a caller takes the first of hybrid, kernel, unix.
    `instead` is what an operator sets who needs what this machine never can. A disk that came while
    it ran can be taken out of it, if `block_unplug`.
    """

    shared_directory: bool
    block_hotplug: bool
    net_hotplug: bool
    vcpu_hotplug: bool
    vcpu_unplug: bool
    memory_hotplug: bool
    pause: bool
    panic_event: bool
    hybrid_vsock: bool
    kernel_vsock: bool
    unix_vsock: bool
    max_vcpus: int
    memory_step_mib: int
    power_off: bool = True
    instead: str = ""
    block_unplug: bool = True
    opens_taps: bool = False  # by name: each stays without a descriptor for a while
