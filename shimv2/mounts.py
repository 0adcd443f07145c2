"""The mount system calls, and the few shapes in which the shim uses them.

Everything is synchronous and short. Targets that a guest can reach are given as descriptors from
`open_beneath`, never as paths: the tree behind a virtio-fs share is hostile once the guest runs.
"""

from __future__ import annotations

import ctypes
import os
from typing import TYPE_CHECKING, NamedTuple, Protocol

from shimv2.errors import ShimError

if TYPE_CHECKING:
    from collections.abc import Sequence

# Source: linux/mount.h
MS_RDONLY = 0x1
MS_NOSUID = 0x2
MS_NODEV = 0x4
MS_NOEXEC = 0x8
MS_REMOUNT = 0x20
MS_BIND = 0x1000
MS_REC = 0x4000
MS_PRIVATE = 0x40000
MS_SLAVE = 0x80000
MS_SHARED = 0x100000
MNT_DETACH = 0x2
UMOUNT_NOFOLLOW = 0x8
MOUNT_ATTR_RDONLY = 0x1
MOUNT_ATTR_NOSUID = 0x2
MOUNT_ATTR_NODEV = 0x4
AT_RECURSIVE = 0x8000
CLONE_NEWNS = 0x20000

# Source: linux/openat2.h
RESOLVE_NO_XDEV = 0x01
RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_BENEATH = 0x08
RESOLVE_IN_ROOT = 0x10

# The same numbers on every architecture.
_SYS_OPEN_TREE = 428  # since Linux 5.2
_SYS_MOVE_MOUNT = 429  # since 5.2
_SYS_OPENAT2 = 437  # since 5.6
_SYS_MOUNT_SETATTR = 442  # since 5.12
_AT_FDCWD = -100
_AT_EMPTY_PATH = 0x1000
_OPEN_TREE_CLONE = 1
_MOVE_MOUNT_F_EMPTY_PATH = 0x4
_MOVE_MOUNT_T_EMPTY_PATH = 0x40

_PAGE = 4096  # mount(2) takes one page of data, its final NUL included

_FLAG_OPTIONS: dict[str, tuple[int, int]] = {  # option -> (flags to set, flags to clear)
    "ro": (MS_RDONLY, 0), "rw": (0, MS_RDONLY),
    "nosuid": (MS_NOSUID, 0), "suid": (0, MS_NOSUID),
    "nodev": (MS_NODEV, 0), "dev": (0, MS_NODEV),
    "noexec": (MS_NOEXEC, 0), "exec": (0, MS_NOEXEC),
    "sync": (0x10, 0), "async": (0, 0x10), "dirsync": (0x80, 0), "remount": (MS_REMOUNT, 0),
    "mand": (0x40, 0), "nomand": (0, 0x40),
    "atime": (0, 0x400), "noatime": (0x400, 0), "diratime": (0, 0x800), "nodiratime": (0x800, 0),
    "bind": (MS_BIND, 0), "rbind": (MS_BIND | MS_REC, 0),
    "relatime": (0x200000, 0), "norelatime": (0, 0x200000),
    "strictatime": (0x1000000, 0), "nostrictatime": (0, 0x1000000),
    "private": (MS_PRIVATE, 0), "rprivate": (MS_PRIVATE | MS_REC, 0),
    "slave": (MS_SLAVE, 0), "rslave": (MS_SLAVE | MS_REC, 0),
    "shared": (MS_SHARED, 0), "rshared": (MS_SHARED | MS_REC, 0),
    "defaults": (0, 0), "loop": (0, 0),
}  # fmt: skip
_PROPAGATION = MS_PRIVATE | MS_SLAVE | MS_SHARED

_libc = ctypes.CDLL(None, use_errno=True)


class MountFailed(ShimError):
    """A mount call failed; `errno` says why, the text says what was to go where."""

    def __init__(self, operation: str, target: str, errno: int) -> None:
        super().__init__(f"{operation} on {target}: {os.strerror(errno)}")
        self.errno = errno
        self.target = target


class RootfsMount(Protocol):
    """containerd.types.Mount, as far as it matters here."""

    @property
    def type(self) -> str: ...
    @property
    def source(self) -> str: ...
    @property
    def target(self) -> str: ...
    @property
    def options(self) -> Sequence[str]: ...


class MountOptions(NamedTuple):
    """fstab options, sorted into what mount(2) takes: flags, then propagation, then data."""

    flags: int
    propagation: int
    data: str


def parse_options(options: Sequence[str]) -> MountOptions:
    """Split fstab options; what is no flag belongs to the file system."""
    flags = 0
    propagation = 0
    data: list[str] = []
    for option in options:
        known = _FLAG_OPTIONS.get(option)
        if known is None:
            data.append(option)
        elif known[0] & _PROPAGATION:
            propagation = known[0]
        else:
            flags = (flags & ~known[1]) | known[0]
    return MountOptions(flags, propagation, ",".join(data))


def mount(source: str, target: str | int, fstype: str = "", flags: int = 0, data: str = "") -> None:
    """mount(2). A descriptor as target means the very file it has open. Raises `MountFailed`."""
    place = _place(target)
    result = _libc.mount(
        os.fsencode(source),
        os.fsencode(place),
        os.fsencode(fstype) if fstype else None,
        ctypes.c_ulong(flags),
        os.fsencode(data) if data else None,
    )
    if result != 0:
        raise MountFailed(f"mount {fstype or 'bind'} {source}", place, ctypes.get_errno())


def bind(
    source: str | int,
    target: str | int,
    *,
    read_only: bool = False,
    recursive: bool = True,
    writable_below: bool = False,
    propagation: int = 0,
    attributes: int = 0,
) -> None:
    """Bind `source` over `target`, with everything mounted below it if `recursive`.

    A descriptor, of either, means the very file it has open. Read-only, the other `attributes`
    (MOUNT_ATTR_*) and `propagation` (MS_PRIVATE: no later mount of the host's appears; MS_SLAVE:
    each does; 0: as at the source) hold for the whole tree, and are set on the host, where no guest
    can take them back, before the tree can be reached at `target`. With `writable_below` what is
    mounted below a read-only source stays as it is. Raises `MountFailed`.
    """
    tree = _clone(source, recursive=recursive)
    try:
        if read_only and writable_below:
            _set_attributes(tree, MOUNT_ATTR_RDONLY, 0, _place(source), below=False)
        elif read_only:
            attributes |= MOUNT_ATTR_RDONLY
        if attributes or propagation:
            _set_attributes(tree, attributes, propagation, _place(source))
        _attach(tree, target)
    finally:
        os.close(tree)


def _clone(source: str | int, *, recursive: bool) -> int:
    """open_tree(2): a detached copy of the mount at `source`, as a descriptor."""
    flags = _OPEN_TREE_CLONE | os.O_CLOEXEC | (AT_RECURSIVE if recursive else 0)
    directory, path = (source, b"") if isinstance(source, int) else (_AT_FDCWD, os.fsencode(source))
    if isinstance(source, int):
        flags |= _AT_EMPTY_PATH
    tree: int = _libc.syscall(
        ctypes.c_long(_SYS_OPEN_TREE), ctypes.c_int(directory), path, ctypes.c_uint(flags)
    )
    if tree < 0:
        raise MountFailed("clone for a bind", _place(source), ctypes.get_errno())
    return tree


def _set_attributes(
    tree: int, attributes: int, propagation: int, shown: str, *, below: bool = True
) -> None:
    """mount_setattr(2) on a detached tree: on all mounts in it, or the topmost alone."""
    wanted = (ctypes.c_uint64 * 4)(attributes, 0, propagation, 0)
    result = _libc.syscall(
        ctypes.c_long(_SYS_MOUNT_SETATTR), ctypes.c_int(tree), b"",
        ctypes.c_uint(_AT_EMPTY_PATH | (AT_RECURSIVE if below else 0)), ctypes.byref(wanted),
        ctypes.c_size_t(ctypes.sizeof(wanted)),
    )  # fmt: skip
    if result != 0:
        what = "making read-only" if attributes & MOUNT_ATTR_RDONLY else "options of the bind"
        raise MountFailed(what, shown, ctypes.get_errno())


def _attach(tree: int, target: str | int) -> None:
    """move_mount(2): put a detached tree on `target`, the very file if that is a descriptor."""
    flags = _MOVE_MOUNT_F_EMPTY_PATH
    directory, path = (target, b"") if isinstance(target, int) else (_AT_FDCWD, os.fsencode(target))
    if isinstance(target, int):
        flags |= _MOVE_MOUNT_T_EMPTY_PATH
    result = _libc.syscall(
        ctypes.c_long(_SYS_MOVE_MOUNT), ctypes.c_int(tree), b"", ctypes.c_int(directory), path,
        ctypes.c_uint(flags),
    )  # fmt: skip
    if result != 0:
        raise MountFailed("bind", _place(target), ctypes.get_errno())


def rootfs_layers(mounts: Sequence[RootfsMount]) -> int:
    """How many mounts `mount_rootfs` will stack on the root itself; the others lie below it.

    Raises `MountFailed` for a target that leaves the root.
    """
    targets = [_below(one.target) for one in mounts]
    return targets.count("") + bool(targets and targets[0])


def mount_rootfs(mounts: Sequence[RootfsMount], target: str) -> None:
    """Stack a snapshotter's mounts on `target`, a directory that no guest can replace.

    A mount's own target is looked up below the mounts before it, whose content is the image's:
    links are not followed. Detaching `target` as often as `rootfs_layers` says takes all of it
    back; that is done here when a mount fails. Raises `MountFailed`.
    """
    layers = rootfs_layers(mounts)
    try:
        if mounts and _below(mounts[0].target):
            bind(target, target)  # so that what lies below goes with it
        for one in mounts:
            _mount_below(one, target, _below(one.target))
    except BaseException:
        for _ in range(layers):
            detach(target)
        raise


def _mount_below(one: RootfsMount, target: str, path: str) -> None:
    if not path:
        _mount_one(one, target)
        return
    root = os.open(target, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        place = open_beneath(root, path, os.O_PATH)
    except OSError as exc:
        raise MountFailed("rootfs mount", one.target, exc.errno or 0) from exc
    finally:
        os.close(root)
    try:
        _mount_one(one, place)
    finally:
        os.close(place)


def _below(target: str) -> str:
    """A mount's own target as a path below the root. Raises `MountFailed` if it leaves it."""
    parts = [part for part in target.split("/") if part not in ("", ".")]
    if ".." in parts or "\0" in target:
        raise MountFailed("rootfs mount", target, 22)
    return "/".join(parts)


def _mount_one(one: RootfsMount, place: str | int) -> None:
    flags, propagation, data = parse_options(one.options)
    if one.type in ("bind", "rbind") or flags & MS_BIND:
        recursive = one.type == "rbind" or bool(flags & MS_REC)
        bind(
            one.source, place, read_only=bool(flags & MS_RDONLY), recursive=recursive,
            propagation=propagation & ~MS_REC,
        )  # fmt: skip
    else:
        _mount_filesystem(one.source, place, one.type, flags, data)


def detach(target: str) -> bool:
    """Lazily unmount `target`, never through a symbolic link; False if nothing is mounted there."""
    if _libc.umount2(os.fsencode(target), MNT_DETACH | UMOUNT_NOFOLLOW) == 0:
        return True
    number = ctypes.get_errno()
    if number in (22, 2, 20):  # EINVAL: not a mount; ENOENT, ENOTDIR: not there at all
        return False
    raise MountFailed("unmount", target, number)


def make_shared(path: str) -> None:
    """Make `path` a mount of its own whose later mounts propagate to its peers.

    virtiofsd, whose mount namespace is made from ours, sees them only if this came before it.
    """
    mount(path, path, "", MS_BIND | MS_REC)
    mount("none", path, "", MS_SHARED)


def prctl(option: int, *arguments: int) -> int:
    """prctl(2); returns what it returns."""
    result: int = _libc.prctl(option, *(ctypes.c_ulong(one) for one in arguments))
    return result


def private_mount_namespace() -> None:
    """Leave the host's mount namespace: its mounts flow in, ours don't flow out.

    They end with the last process in it, however that process dies. Raises `MountFailed`.
    Source: kata containerd-shim-v2 `start` (unshare, rslave, rshared).
    """
    if _libc.unshare(CLONE_NEWNS) != 0:
        raise MountFailed("unshare", "the mount namespace", ctypes.get_errno())
    mount("none", "/", "", MS_REC | MS_SLAVE)
    mount("none", "/", "", MS_REC | MS_SHARED)


def open_beneath(directory: int, path: str, flags: int, *, resolve: int = 0, mode: int = 0) -> int:
    """openat2(2): open `path` under `directory`, following no link out of it or at all.

    Returns a close-on-exec descriptor that the caller closes. Raises OSError.
    """
    how = (ctypes.c_uint64 * 3)(
        flags | os.O_CLOEXEC,
        mode,
        resolve or (RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS),
    )
    result: int = _libc.syscall(
        ctypes.c_long(_SYS_OPENAT2), ctypes.c_int(directory), os.fsencode(path),
        ctypes.byref(how), ctypes.c_size_t(ctypes.sizeof(how)),
    )  # fmt: skip
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path)
    return result


def _place(target: str | int) -> str:
    return f"/proc/self/fd/{target}" if isinstance(target, int) else target


def _mount_filesystem(source: str, place: str | int, fstype: str, flags: int, data: str) -> None:
    if fstype != "overlay" or len(os.fsencode(data)) < _PAGE:
        mount(source, place, fstype, flags, data)
        return
    # Many layers don't fit into the page: name them relative to their common directory. The working
    # directory is the process's, but nothing else runs between these three lines.
    base, shorter = _relative_layers(data)
    before = os.open(".", os.O_PATH | os.O_CLOEXEC)
    try:
        os.chdir(base)
        mount(source, place, fstype, flags, shorter)
    finally:
        os.fchdir(before)
        os.close(before)


def _relative_layers(data: str) -> tuple[str, str]:
    options = data.split(",")
    layers = next((o[9:].split(":") for o in options if o.startswith("lowerdir=")), [])
    if not layers:
        return "/", data
    base = os.path.commonpath(layers)
    lower = "lowerdir=" + ":".join(os.path.relpath(layer, base) for layer in layers)
    return base, ",".join(lower if o.startswith("lowerdir=") else o for o in options)
