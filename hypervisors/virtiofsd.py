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

Cache: TypeAlias = Literal["auto", "always", "never"]
Flavour: TypeAlias = Literal["c", "rust"]

LISTEN_FD: Final = 3
FIX: Final = "install qemu-system-common or virtiofsd, or correct the virtiofsd path"
# Every Rust program's standard library reads this variable. Paths of its source are no mark,
# because Debian maps them. Observed: virtiofsd 1.13.2 of Debian 13.
RUST_MARK: Final = b"RUST_BACKTRACE"
SCAN_CHUNK_BYTES: Final = 1 << 18


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
            f"--cache={cache}",
            "--sandbox=namespace",
            "--seccomp=kill",
            "--announce-submounts",
            "--log-level=warn",
        ]
        return [*argv, "--xattr"] if xattr else argv
    options = [
        f"source={shared_dir}",
        f"cache={'none' if cache == 'never' else cache}",
        "sandbox=namespace",
        "announce_submounts",
        "log_level=warn",
        "xattr" if xattr else "no_xattr",
    ]
    argv = [str(binary), "-f", f"--fd={LISTEN_FD}"]
    for option in options:
        argv += ["-o", option]
    return argv


def check_virtiofsd(binary: Path, shared_dir: Path) -> None:
    """Refuse a missing daemon, or a share its option syntax cannot name.

    Raises:
        PreconditionFailed.
    """
    check_program("virtiofsd", binary, FIX)
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
    check_virtiofsd(binary, shared_dir)
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
