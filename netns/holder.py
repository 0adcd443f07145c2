"""Holds a network namespace, mostly a new one, by a process, while somebody needs its pid.

An OCI hook that sets up a container's network (nerdctl, Docker) is told a pid and finds the
namespace below /proc. A virtual machine's containers have no pid on the host: this is one for the
hooks. When they have run and the namespace is pinned by a descriptor, the process may go.
"""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Final, NoReturn

import trio

from netns.errors import HelperLost, KernelRefused
from netns.inside import fork_helper, join_network, leave_parent, unshare_network
from netns.namespace import Namespace

START_S: Final = 5.0
_EXIT_S: Final = 1.0
_NAME: Final = "hold a network namespace"
_GO: Final = b"go"
_CODE: Final = struct.Struct("=i")

# Source: linux/sockios.h, linux/if.h
_SIOCSIFFLAGS: Final = 0x8914
_IFF_UP: Final = 0x1
_IFREQ: Final = struct.Struct("=16sH22x")


class Holder:
    """A sleeping process in a network namespace: a given one, or one with only a loopback."""

    def __init__(self, pid: int, pidfd: int, sock: socket.socket) -> None:
        self.pid = pid
        self.path = Path(f"/proc/{pid}/ns/net")
        self._pidfd = pidfd
        self._sock = sock

    @classmethod
    async def start(cls, record: Callable[[int], None], namespace: Path | None = None) -> Holder:
        """Start one, in a new namespace or in `namespace`; `record` first learns its pid.

        It dies with the caller, and has no descriptor of it. Cancelling leaves no process.

        Raises:
            HostNamespace, NamespaceGone: `namespace` is not a pod's.
            KernelRefused: the kernel makes no namespace, or enters none.
            HelperLost: there is no process to be had, or it died.
        """
        if namespace is not None:
            Namespace.open(namespace).close()
        holder = cls(*fork_helper(_NAME, lambda theirs: _hold(theirs, namespace)))
        try:
            record(holder.pid)
            holder._sock.send(_GO)
            await holder._wait_ready()
        except BaseException:
            with trio.CancelScope(shield=True):  # bounded by _EXIT_S
                await holder.aclose()
            raise
        return holder

    async def aclose(self) -> None:
        """End the process; the namespace goes with its last user. Idempotent."""
        if self._pidfd < 0:
            return
        pidfd, self._pidfd = self._pidfd, -1
        self._sock.close()
        try:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            with trio.move_on_after(_EXIT_S, shield=True):
                await trio.lowlevel.wait_readable(pidfd)
        finally:
            _collect(pidfd)

    async def _wait_ready(self) -> None:
        with trio.move_on_after(START_S):
            await trio.lowlevel.wait_readable(self._sock)
            answer = self._sock.recv(_CODE.size)
            if len(answer) != _CODE.size:
                raise HelperLost(_NAME, "died")
            (code,) = _CODE.unpack(answer)
            if code:
                raise KernelRefused("enter a network namespace", code)
            return
        raise HelperLost(_NAME, f"had no answer within {START_S:g} s")


def _collect(pidfd: int) -> None:
    os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)
    os.close(pidfd)


def _hold(sock: socket.socket, namespace: Path | None) -> NoReturn:
    code = 0
    try:
        leave_parent(keep=(sock.fileno(),))
        if sock.recv(len(_GO)) == _GO:
            if namespace is not None:
                join_network(namespace)
            else:
                unshare_network()
                with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
                    fcntl.ioctl(control, _SIOCSIFFLAGS, _IFREQ.pack(b"lo", _IFF_UP))
            sock.send(_CODE.pack(0))
            sock.recv(1)  # until the parent closes its end
    except OSError as error:
        code = error.errno or errno.EIO
    except BaseException:
        code = errno.EIO
    try:
        sock.send(_CODE.pack(code))
    finally:
        os._exit(0)
