"""Where a Firecracker lives: its jail, or, where there is no jailer, what it gets instead of one.

    <run_dir>/fc/                     the VMM's user's until the guest runs, then root's:
                                          sockets, fifos, and, unjailed, disks/
    <run_dir>/fc-jail/                jailed: a file system of its own, because /run allows neither
        <program>/<id>/root/              programs nor devices
            kernel, initrd            the host's files, bound
            disks/                    root's: nodes, each while the VMM opens it; the placeholder
            run/                      <run_dir>/fc, bound

The jailer, which lies beside the program, makes the rest of the jail, becomes the VMM's user there
and executes a copy of the program. Without one the shim does what it does for other VMMs: a user of
its own, descriptors instead of paths, and every file system read-only once it runs.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from . import fc_config, isolation
from .child_exec import Account
from .disk_nodes import DiskNodes
from .empty_root import CLONE_NEWNS
from .errors import PreconditionFailed
from .machine import BlockDevice
from .vmm_dir import VmmDirectory

if TYPE_CHECKING:
    from .machine import MachineSpec

JAILER: Final = "jailer"
DIRECTORY: Final = "fc"
DISKS: Final = "disks"
API_SOCKET: Final = "api.sock"
LOG: Final = "log"
METRICS: Final = "metrics"
PLACEHOLDER: Final = ".empty"  # as no device is called
_FIRST_FD: Final = 3
# Kernel-held, freed with the jail: a copy of the program and names. Upstream's has 3 MiB.
_JAIL_OPTIONS: Final = b"mode=0700,size=64m,nr_inodes=256"
# Source: sys/mount.h, linux/mount.h
_MS_RDONLY, _MS_NOSUID, _MS_REMOUNT, _MS_BIND = 1, 2, 1 << 5, 1 << 12
_MNT_DETACH, _UMOUNT_NOFOLLOW = 2, 8
# Source: elf(5)
_PT_INTERP: Final = 3
# What the jailer takes for an id. Source: Firecracker v1.16, src/utils/src/validators.rs
_NOT_IN_ID: Final = re.compile(r"[^A-Za-z0-9-]")
_ID_LENGTH: Final = 64


@dataclass(slots=True, kw_only=True)
class Room:
    """One machine's place: what is where, for us and for the VMM.

    `argv` runs the VMM, with `pass_fds`, as `account` and in `namespaces`. `inside` is where it
    finds `directory`, `disks_inside` where what `nodes` shows; without nodes it opens disks where
    they lie. `placeholder` is what it finds in an empty slot.
    """

    directory: VmmDirectory
    inside: str
    kernel: str
    initrd: str | None
    nodes: DiskNodes | None
    disks_inside: str
    placeholder: str
    argv: list[str]
    account: Account | None
    is_jailed: bool
    unshare: int = 0
    pass_fds: dict[int, int] = field(default_factory=dict)
    # What the VMM needs no longer when it runs.
    until_started: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def path(self, name: str) -> Path:
        """Something of the VMM's directory, for us."""
        return self.directory.path / name


def find_jailer(spec: MachineSpec) -> Path | None:
    """The jailer that lies beside the program; only root can use it."""
    if os.geteuid() != 0:
        return None
    for directory in (spec.binary.parent, spec.binary.resolve().parent):
        if os.access(directory / JAILER, os.X_OK):
            return directory / JAILER
    return None


def check_jailed(spec: MachineSpec) -> None:
    """Refuse a program that cannot start in a jail, where no library is.

    Raises:
        PreconditionFailed.
    """
    with spec.binary.open("rb") as stream:
        head = stream.read(4096)
    if head[:4] != b"\x7fELF" or not _has_interpreter(head):
        return
    raise PreconditionFailed(
        "Firecracker",
        path=spec.binary,
        why="linked with shared libraries, which its jailer's directory has not",
        fix="install its own release, which has none, or take the jailer beside it away",
    )


def account_of(spec: MachineSpec) -> Account | None:
    """The VMM's user; a jail has a KVM device of that user's own."""
    if not spec.unprivileged:
        return None
    return isolation.machine_account(spec.id, "jail" if find_jailer(spec) else "kvm")


def build(spec: MachineSpec, undo: contextlib.AsyncExitStack) -> Room:
    """Make the place of a machine; `undo` takes it away.

    Raises:
        PreconditionFailed, OSError: something of the host's is missing.
    """
    account = account_of(spec)
    directory = VmmDirectory.create(spec.run_dir, DIRECTORY, account)
    undo.callback(directory.remove)
    jailer = find_jailer(spec)
    if jailer is None:
        room = _unjailed(spec, directory, account, undo)
    else:
        room = _jailed(spec, jailer, directory, account, undo)
    undo.callback(room.until_started.close)
    content = bytes(fc_config.PLACEHOLDER_BYTES)
    if room.nodes is not None:
        # Where little fits: a VMM that was taken over could let it grow.
        room.nodes.put(PLACEHOLDER, content)
    else:
        (directory.path / PLACEHOLDER).write_bytes(content)
        directory.give(directory.path / PLACEHOLDER)
    return room


def _arguments(inside: str) -> list[str]:
    return [
        *("--api-sock", f"{inside}/{API_SOCKET}"),
        *("--log-path", f"{inside}/{LOG}"),
        *("--level", "Info"),
    ]


def _unjailed(
    spec: MachineSpec,
    directory: VmmDirectory,
    account: Account | None,
    undo: contextlib.AsyncExitStack,
) -> Room:
    nodes = None
    # By their own paths disks could not be written once every file system is read-only.
    if isolation.hides_files() and _has_disks(spec):
        nodes = DiskNodes(directory.path / DISKS, account)
        nodes.mount()
        undo.callback(nodes.unmount)
    shown = contextlib.ExitStack()
    undo.callback(shown.close)
    pass_fds: dict[int, int] = {}

    def give(path: Path, flags: int) -> str:
        fd = os.open(path, flags | os.O_CLOEXEC)
        shown.callback(os.close, fd)
        number = _FIRST_FD + len(pass_fds)
        pass_fds[number] = fd
        return f"/proc/self/fd/{number}"

    inside = give(directory.path, os.O_RDONLY | os.O_DIRECTORY)
    return Room(
        directory=directory,
        inside=inside,
        kernel=give(spec.kernel, os.O_RDONLY),
        initrd=give(spec.initrd, os.O_RDONLY) if spec.initrd is not None else None,
        nodes=nodes,
        disks_inside=f"{inside}/{DISKS}",
        placeholder=f"{inside}/{DISKS if nodes else '.'}/{PLACEHOLDER}",
        argv=[str(spec.binary), "--id", _id(spec), *_arguments(inside)],
        account=account,
        is_jailed=False,
        unshare=CLONE_NEWNS if isolation.hides_files() else 0,
        pass_fds=pass_fds,
        until_started=shown,
    )


def _jailed(
    spec: MachineSpec,
    jailer: Path,
    directory: VmmDirectory,
    account: Account | None,
    undo: contextlib.AsyncExitStack,
) -> Room:
    base = spec.run_dir / f"{DIRECTORY}-jail"
    program = spec.binary.resolve()
    root = base / program.name / _id(spec) / "root"
    with contextlib.suppress(FileNotFoundError):
        os.rmdir(base)  # of an earlier machine, whose mount died with its shim
    os.mkdir(base, 0o700)
    undo.callback(os.rmdir, base)
    _mount(b"jail", base, b"tmpfs", _MS_NOSUID, _JAIL_OPTIONS)
    undo.callback(_unmount, base)
    (root / "run").mkdir(parents=True)
    nodes = DiskNodes(root / DISKS, account)
    nodes.make()
    undo.callback(nodes.close)
    _mount(os.fsencode(directory.path), root / "run", None, _MS_BIND)
    undo.callback(_unmount, root / "run")
    shown = contextlib.ExitStack()
    for name, path in (("kernel", spec.kernel), ("initrd", spec.initrd)):
        if path is not None:
            (root / name).touch()
            _mount(os.fsencode(path), root / name, None, _MS_BIND)
            shown.callback(_unmount, root / name)
            _mount(None, root / name, None, _MS_REMOUNT | _MS_BIND | _MS_RDONLY | _MS_NOSUID)
    user = account or Account(uid=0, gid=0)
    argv = [
        str(jailer),
        *("--id", _id(spec)),
        *("--exec-file", str(program)),
        *("--uid", str(user.uid), "--gid", str(user.gid)),
        *("--chroot-base-dir", str(base)),
        "--",
        *_arguments("/run"),
    ]
    return Room(
        directory=directory,
        inside="/run",
        kernel="/kernel",
        initrd="/initrd" if spec.initrd is not None else None,
        nodes=nodes,
        disks_inside=f"/{DISKS}",
        placeholder=f"/{DISKS}/{PLACEHOLDER}",
        argv=argv,
        account=None,  # the jailer changes to it
        is_jailed=True,
        until_started=shown,
    )


def _has_disks(spec: MachineSpec) -> bool:
    return spec.hotplug_ports > 0 or any(isinstance(one, BlockDevice) for one in spec.devices)


def _id(spec: MachineSpec) -> str:
    return _NOT_IN_ID.sub("-", spec.id)[:_ID_LENGTH]


def _has_interpreter(head: bytes) -> bool:
    table, size, count = (
        *struct.unpack_from("<Q", head, 32),
        *struct.unpack_from("<HH", head, 54),
    )
    starts = (table + index * size for index in range(count))
    return any(
        struct.unpack_from("<I", head, at)[0] == _PT_INTERP for at in starts if at + 4 <= len(head)
    )


def _mount(
    source: bytes | None, target: Path, kind: bytes | None, flags: int, options: bytes = b""
) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    where = os.fsencode(target)
    if libc.mount(source, where, kind, ctypes.c_ulong(flags), options or None) != 0:
        code = ctypes.get_errno()
        raise PreconditionFailed(
            "Firecracker's jail", path=target, why="cannot be mounted", errno=code,
            fix="run the shim as root with CAP_SYS_ADMIN, or take the jailer away",
        )  # fmt: skip


def _unmount(target: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.umount2(os.fsencode(target), _MNT_DETACH | _UMOUNT_NOFOLLOW)
