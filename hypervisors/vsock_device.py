"""Starts vhost-device-vsock, the daemon behind a UnixVsock.

It makes its sockets itself; we wait for them by inotify. Its guest CID is private to the machine,
so every machine may have the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import trio

from . import isolation
from .child import spawn
from .errors import LaunchFailed, PreconditionFailed
from .helper import Helper
from .inotify import wait_created
from .spec_check import check_program

if TYPE_CHECKING:
    from pathlib import Path

    from .child import Child, Recorder

NAME: Final = "vhost-device-vsock"
FIX: Final = "run `make setup`, or correct the path of vhost-device-vsock"
# Starting takes 5 ms on an idle machine. Source: own measurement; generous for a loaded one.
READY_DEADLINE_S: Final = 5.0
# Source: linux/vm_sockets.h: 0 to 2 are the hypervisor, local and the host.
FIRST_GUEST_CID: Final = 3


def vsock_device_argv(binary: Path, socket: Path, uds_path: Path, cid: int) -> list[str]:
    """The command line. Pure."""
    return [
        str(binary),
        f"--guest-cid={cid}",
        f"--socket={socket}",
        f"--uds-path={uds_path}",
    ]


def check_vsock_device(binary: Path, cid: int) -> None:
    """Refuse a missing daemon or a reserved CID.

    Raises:
        PreconditionFailed.
    """
    check_program(NAME, binary, FIX)
    if not FIRST_GUEST_CID <= cid < 1 << 32:
        raise PreconditionFailed(
            "guest CID", path=None, why=f"{cid} is reserved", fix="use 3 or up"
        )


async def start_vsock_device(
    binary: Path, socket: Path, uds_path: Path, cid: int = FIRST_GUEST_CID, *, record: Recorder
) -> Helper:
    """Start the daemon and return when both its sockets exist.

    Cancellation: safe, nothing is left but sockets the daemon may have made.

    Raises:
        PreconditionFailed, SpawnFailed; LaunchFailed when it ended or made no socket in time.
    """
    check_vsock_device(binary, cid)
    argv = vsock_device_argv(binary, socket, uds_path, cid)
    child = await spawn(
        NAME, argv, record=record, unshare=isolation.own_namespaces(), no_new_privileges=True
    )
    helper = Helper(child, (socket, uds_path))
    try:
        await _wait_ready(child, (socket, uds_path))
    except BaseException:
        await helper.aclose()
        raise
    return helper


async def _wait_ready(child: Child, sockets: tuple[Path, ...]) -> None:
    ready = False
    async with trio.open_nursery() as nursery:
        nursery.cancel_scope.deadline = trio.current_time() + READY_DEADLINE_S

        async def stop_at_exit() -> None:
            await child.wait()
            nursery.cancel_scope.cancel()

        nursery.start_soon(stop_at_exit)
        await wait_created(sockets)
        ready = True
        nursery.cancel_scope.cancel()
    if child.exit is not None:
        raise LaunchFailed(NAME, str(child.exit), child.stderr_tail)
    if not ready:
        ending = f"made no socket within {READY_DEADLINE_S:g} s"
        raise LaunchFailed(NAME, ending, child.stderr_tail)
