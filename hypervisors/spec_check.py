"""Looks at a machine specification and at the host before anything is taken.

What every backend needs: values in range, names that cannot be mistaken for syntax, files that are
there and are what they should be. Each refusal names the path, the errno and the fix.
"""

from __future__ import annotations

import os
import re
import stat
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Final

from .errors import PreconditionFailed
from .machine import HUGE_PAGE_MIB, BlockDevice, NetDevice, SharedDirectory

if TYPE_CHECKING:
    from .machine import MachineSpec

# Short enough for QEMU's node names (31) with our prefix, and free of its syntax (",", "=", ":").
DEVICE_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,27}")
MACHINE_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
MAC: Final = re.compile(r"[0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5}")
# Source: x86 COMMAND_LINE_SIZE 2048 with the final NUL; the kernel cuts off silently.
MAX_CMDLINE_BYTES: Final = 2047
# The kernel, its page tables and an unpacked initrd do not fit below.
MIN_MEMORY_MIB: Final = 64
MIN_MTU: Final = 68
MAX_MTU: Final = 65535
# Source: linux/magic numbers of lib/decompress.c, plus cpio "newc" itself.
INITRD_MAGICS: Final = (
    b"070701", b"070702", b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"\x02\x21\x4c\x18",
    b"\xfd7zXZ\x00", b"BZh", b"\x5d\x00\x00",
)  # fmt: skip
HUGE_PAGES: Final = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")
PT_NOTE: Final = 4
EM_X86_64: Final = 62
XEN_ELFNOTE_PHYS32_ENTRY: Final = 18


def check_huge_pages(memory_mib: int, directory: Path = HUGE_PAGES) -> None:
    """Refuse a machine for which too few huge pages are free: the guest would die by SIGBUS.

    Raises:
        PreconditionFailed.
    """
    needed = -(-memory_mib // HUGE_PAGE_MIB)
    try:
        free = int((directory / "free_hugepages").read_text())
    except (OSError, ValueError):
        free = 0
    if memory_mib % HUGE_PAGE_MIB or free < needed:
        raise PreconditionFailed(
            "huge pages",
            path=directory,
            why=f"{free} of {HUGE_PAGE_MIB} MiB are free, {memory_mib} MiB of memory need {needed}",
            fix="reserve more (vm.nr_hugepages), or set enable_hugepages = false",
        )


def check_values(spec: MachineSpec, cmdline: str) -> None:
    """Refuse values out of range. `cmdline` is the whole one.

    Raises:
        PreconditionFailed.
    """

    def refuse(what: str, why: str, fix: str) -> None:
        raise PreconditionFailed(what, path=None, why=why, fix=fix)

    if not MACHINE_ID.fullmatch(spec.id):
        refuse("machine id", f"{spec.id!r} has other characters", "use letters, digits, - _ .")
    if not 1 <= spec.vcpus <= spec.max_vcpus:
        refuse("vCPUs", f"{spec.vcpus} of at most {spec.max_vcpus}", "ask for 1 up to the maximum")
    if spec.memory_mib < MIN_MEMORY_MIB:
        refuse("memory", f"{spec.memory_mib} MiB", f"give at least {MIN_MEMORY_MIB} MiB")
    if spec.max_memory_mib < spec.memory_mib:
        refuse("maximum memory", f"{spec.max_memory_mib} MiB", f"give at least {spec.memory_mib}")
    if spec.huge_pages:
        check_huge_pages(spec.memory_mib)
    if len(cmdline.encode()) > MAX_CMDLINE_BYTES:
        refuse("kernel command line", "the kernel would cut it off", "keep it below 2048 bytes")
    if not cmdline.isprintable():
        refuse("kernel command line", "it has control characters", "remove them")
    ids = [device.id for device in spec.devices]
    for device_id in ids:
        if not DEVICE_ID.fullmatch(device_id):
            refuse("device id", f"{device_id!r}", "use up to 28 letters, digits, - and _")
        if ids.count(device_id) > 1:
            refuse("device id", f"{device_id!r} appears twice", "give every device its own")
    for device in spec.devices:
        if isinstance(device, NetDevice):
            check_net(device)
        elif isinstance(device, BlockDevice):
            os.close(open_block(device)[0])
        elif isinstance(device, SharedDirectory) and not 1 <= len(device.tag.encode()) <= 36:
            refuse("virtio-fs tag", f"{device.tag!r}", "use 1 to 36 bytes")


def check_net(device: NetDevice) -> None:
    """Refuse an interface no VMM takes."""
    if not MAC.fullmatch(device.mac):
        raise PreconditionFailed("MAC", path=None, why=device.mac, fix="use six hex pairs")
    if not MIN_MTU <= device.mtu <= MAX_MTU:
        raise PreconditionFailed("MTU", path=None, why=str(device.mtu), fix="use 68 to 65535")
    if not device.tap_fds or len(device.vhost_fds) not in (0, len(device.tap_fds)):
        raise PreconditionFailed(
            "tap", path=None, why="no descriptor, or another number of vhost ones",
            fix="give one of each a queue pair",
        )  # fmt: skip


def open_block(device: BlockDevice) -> tuple[int, str]:
    """Open an image as asked; returns the descriptor, the caller's, and "file" or "host_device".

    Raises:
        PreconditionFailed: missing, not readable or writable as asked, or neither of the two.
    """
    what = f"block device {device.id}"
    if len(device.serial.encode()) > 20:
        raise PreconditionFailed(what, path=None, why="serial of over 20 bytes", fix="shorten it")
    flags = os.O_RDONLY if device.read_only else os.O_RDWR
    try:
        # Not blocking: the path may be a FIFO or a tape.
        fd = os.open(device.path, flags | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise PreconditionFailed(
            what, path=device.path, why="cannot be used", errno=error.errno,
            fix="check that the volume is attached and the shim may open it",
        ) from error  # fmt: skip
    mode = os.fstat(fd).st_mode
    if stat.S_ISBLK(mode):
        return fd, "host_device"
    if stat.S_ISREG(mode):
        return fd, "file"
    os.close(fd)
    raise PreconditionFailed(
        what, path=device.path, why="neither a regular file nor a block device",
        fix="give an image file or a block device",
    )  # fmt: skip


def check_program(what: str, path: Path, fix: str) -> None:
    """Refuse a program that cannot be executed."""
    head = read_head(what, path, 4, fix)
    if not os.access(path, os.X_OK):
        raise PreconditionFailed(what, path=path, why="not executable", fix=fix, errno=13)
    if head[:4] != b"\x7fELF" and head[:2] != b"#!":
        raise PreconditionFailed(what, path=path, why="not a program", fix=fix)


def check_initrd(path: Path) -> None:
    """Refuse an initrd that is missing or that no kernel unpacks."""
    fix = "build the guest image (make guest) or correct the initrd path"
    if not read_head("guest initrd", path, 8, fix).startswith(INITRD_MAGICS):
        raise PreconditionFailed(
            "guest initrd", path=path, why="not a cpio archive, plain or compressed", fix=fix
        )


def check_kernel(path: Path) -> None:
    """Refuse a kernel that is missing, of another machine, or without a way to enter it."""
    fix = "build the guest image (make guest) or correct the kernel path"
    head = read_head("guest kernel", path, 4096, fix)
    why = _kernel_problem(path, head)
    if why is not None:
        raise PreconditionFailed("guest kernel", path=path, why=why, fix=fix)


def check_readable_by_all(what: str, path: Path) -> None:
    """Refuse a file that a VMM under a user of its own cannot read."""
    if not os.stat(path).st_mode & stat.S_IROTH:
        raise PreconditionFailed(
            what, path=path, why="not readable for the VMM's user", errno=13,
            fix="chmod a+r it, or run the VMM as the launcher (rootless = false)",
        )  # fmt: skip


def check_executable_by_all(what: str, path: Path) -> None:
    """Refuse a program that a user of its own cannot reach or run."""
    for step in (path, *path.parents):
        if not os.stat(step).st_mode & stat.S_IXOTH:
            raise PreconditionFailed(
                what, path=step, why="closed to the VMM's user", errno=13,
                fix="chmod a+x it, or run the VMM as the launcher (rootless = false)",
            )  # fmt: skip


def read_head(what: str, path: Path, size: int, fix: str) -> bytes:
    """The first bytes of a regular file, or PreconditionFailed."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise PreconditionFailed(
            what, path=path, why="cannot be opened", errno=error.errno, fix=fix
        ) from error
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise PreconditionFailed(what, path=path, why="not a regular file", fix=fix)
        return os.read(fd, size)
    except OSError as error:
        raise PreconditionFailed(
            what, path=path, why="cannot be read", errno=error.errno, fix=fix
        ) from error
    finally:
        os.close(fd)


def _kernel_problem(path: Path, head: bytes) -> str | None:
    # Source: Documentation/arch/x86/boot.rst, header magic at 0x202.
    if head[0x202:0x206] == b"HdrS":
        return None
    if len(head) < 64 or head[:4] != b"\x7fELF":
        return "neither a bzImage nor an ELF vmlinux"
    # Source: elf(5), Elf64_Ehdr and Elf64_Phdr.
    if head[4] != 2 or struct.unpack_from("<H", head, 18)[0] != EM_X86_64:
        return "built for another machine than x86-64"
    table, entry_size, count = (
        *struct.unpack_from("<Q", head, 32),
        *struct.unpack_from("<HH", head, 54),
    )
    for index in range(count):
        at = table + index * entry_size
        if at + 56 > len(head):
            return "damaged program header table"
        if struct.unpack_from("<I", head, at)[0] != PT_NOTE:
            continue
        offset, size = (
            struct.unpack_from("<Q", head, at + 8)[0],
            struct.unpack_from("<Q", head, at + 32)[0],
        )
        if _has_pvh_note(path, offset, min(size, 65536)):
            return None
    return "it has no PVH entry note (CONFIG_PVH is off)"


def _has_pvh_note(path: Path, offset: int, size: int) -> bool:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        notes = os.pread(fd, size, offset)
    finally:
        os.close(fd)
    at = 0
    while at + 12 <= len(notes):
        name_size, value_size, kind = struct.unpack_from("<III", notes, at)
        if kind == XEN_ELFNOTE_PHYS32_ENTRY and notes[at + 12 : at + 16] == b"Xen\x00":
            return True
        at += 12 + (name_size + 3 & ~3) + (value_size + 3 & ~3)
    return False
