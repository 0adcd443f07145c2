"""Starts virtiofsd, the daemon behind a SharedDirectory: QEMU's C program (7.2) or the Rust one.

We make the listening socket and pass it down, so a VMM can connect at once and no start race
exists. The daemon leaves when its VMM does. Its arguments are fixed; nothing free-form reaches it.

The share must already be a mount with shared propagation: the daemon enters a mount namespace of
its own, and with private propagation later mounts would be invisible and writes would silently go
to the directories below them.
"""

from __future__ import annotations

import contextlib
import os
import socket
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

from .child import spawn
from .errors import PreconditionFailed
from .helper import Helper
from .spec_check import check_program

if TYPE_CHECKING:
    from pathlib import Path

    from .child import Recorder

Cache: TypeAlias = Literal["auto", "always", "never", "none", "metadata"]
Flavour: TypeAlias = Literal["c", "rust"]

LISTEN_FD: Final = 3
FIX: Final = "install qemu-system-common or virtiofsd, or correct the virtiofsd path"
# Every Rust program's standard library reads this variable. Paths of its source are no mark,
# because Debian maps them. Observed: virtiofsd 1.13.2 of Debian 13.
RUST_MARK: Final = b"RUST_BACKTRACE"
SCAN_CHUNK_BYTES: Final = 1 << 18
# What each program calls what is asked for. Source: virtiofsd --help of QEMU 7.2 and of 1.13.
CACHES: Final[dict[Flavour, dict[Cache, str]]] = {
    "c": {"auto": "auto", "always": "always", "never": "none", "none": "none"},
    "rust": {
        "auto": "auto", "always": "always", "never": "never", "none": "never",
        "metadata": "metadata",
    },
}  # fmt: skip


def flavour_of(binary: Path) -> Flavour:
    """Which of the two programs this is, told from its bytes: running it would cost 5 ms a pod."""
    with open(binary, "rb", buffering=0) as stream:
        before = b""
        while chunk := stream.read(SCAN_CHUNK_BYTES):
            if RUST_MARK in before + chunk:
                return "rust"
            before = chunk[-len(RUST_MARK) :]
    return "c"


def virtiofsd_argv(
    binary: Path, shared_dir: Path, flavour: Flavour, *, cache: Cache = "auto", xattr: bool = False
) -> list[str]:
    """The command line. Pure. `xattr` costs a round trip for each exec and write in the guest."""
    if flavour == "rust":
        argv = [
            str(binary),
            f"--fd={LISTEN_FD}",
            f"--shared-dir={shared_dir}",
            f"--cache={CACHES[flavour][cache]}",
            "--sandbox=namespace",
            "--seccomp=kill",
            "--announce-submounts",
            "--log-level=warn",
        ]
        return [*argv, "--xattr"] if xattr else argv
    options = [
        f"source={shared_dir}",
        f"cache={CACHES[flavour][cache]}",
        "sandbox=namespace",
        "announce_submounts",
        "log_level=warn",
        "xattr" if xattr else "no_xattr",
    ]
    argv = [str(binary), "-f", f"--fd={LISTEN_FD}"]
    for option in options:
        argv += ["-o", option]
    return argv


def check_virtiofsd(binary: Path, cache: Cache = "auto") -> None:
    """Refuse a missing daemon, or a way of caching that this one does not have.

    Raises:
        PreconditionFailed.
    """
    check_program("virtiofsd", binary, FIX)
    flavour = flavour_of(binary)
    if cache not in CACHES[flavour]:
        known = ", ".join(f'"{one}"' for one in CACHES[flavour])
        raise PreconditionFailed(
            "virtio_fs_cache",
            path=binary,
            why=f'"{cache}" is nothing that this virtiofsd can do',
            fix=f"set virtio_fs_cache to one of {known}, or virtio_fs_daemon to another program",
        )


def check_share(shared_dir: Path) -> None:
    """Refuse a share that the daemon's option syntax cannot name.

    Raises:
        PreconditionFailed.
    """
    if "," in str(shared_dir):
        raise PreconditionFailed(
            "shared directory", path=shared_dir, why="a comma in its path", fix="choose another"
        )
    if not os.path.isdir(shared_dir):
        raise PreconditionFailed(
            "shared directory", path=shared_dir, why="not a directory", fix="create it first"
        )


async def start_virtiofsd(
    binary: Path,
    shared_dir: Path,
    socket_path: Path,
    *,
    record: Recorder,
    cache: Cache = "auto",
    xattr: bool = False,
) -> Helper:
    """Listen on `socket_path`, start the daemon on it, and return; a VMM can connect at once.

    Cancellation: safe, nothing is left.

    Raises:
        PreconditionFailed, SpawnFailed; OSError when the socket cannot be made.
    """
    check_virtiofsd(binary, cache)
    check_share(shared_dir)
    argv = virtiofsd_argv(binary, shared_dir, flavour_of(binary), cache=cache, xattr=xattr)
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        listener.bind(str(socket_path))
        undo = stack.enter_context(contextlib.ExitStack())
        undo.callback(os.unlink, socket_path)
        os.chmod(socket_path, 0o600)
        listener.listen(1)
        child = await spawn(
            "virtiofsd", argv, record=record, pass_fds={LISTEN_FD: listener.fileno()}
        )
        undo.pop_all()
    return Helper(child, (socket_path,))
