"""Taps for a VMM that opens them by name, from a caller who has them as descriptors.

A tap has one descriptor at a time, and goes with it. So it is made to stay, our descriptor lets go
of it, the VMM opens it by its name in its network namespace, and our descriptor becomes a copy of
the VMM's, by which the tap is told to go with the last one again. Nothing of it outlives the VMM,
and the caller's descriptor is, before and after, one of the tap.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NoReturn

from . import child_exec
from .empty_root import collect
from .errors import ControlError, PreconditionFailed

if TYPE_CHECKING:
    from .machine import NetDevice

# Source: linux/if_tun.h, linux/sched.h, asm/unistd_64.h; the character device's numbers are those
# of Documentation/networking/tuntap.rst.
_TUNSETIFF: Final = 0x400454CA
_TUNSETPERSIST: Final = 0x400454CB
_TUNGETIFF: Final = 0x800454D2
_IFF_MULTI_QUEUE: Final = 0x0100
_IFF_PERSIST: Final = 0x0800
_TUN_FLAGS: Final = 0x7003  # those that a tap is opened with: TUN, TAP, NO_PI, ONE_QUEUE, VNET_HDR
_IFREQ: Final = struct.Struct("=16sH22x")
_TUN_DEVICE: Final = (10, 200)
_CLONE_NEWNET: Final = 0x40000000
_SYS_PIDFD_GETFD: Final = 438
_TUN: Final = "/dev/net/tun"


@dataclass(frozen=True, slots=True)
class _Lent:
    name: str
    fd: int
    flags: int


class LentTaps:
    """The taps of one machine: `lend` each, then `take_back` all, or `abandon` them."""

    def __init__(self, vmm: str, network_namespace: int | None) -> None:
        self._vmm = vmm
        self._namespace = network_namespace
        self._lent: list[_Lent] = []

    def lend(self, device: NetDevice) -> str:
        """Let go of an interface's tap, which stays; returns the name to open it by.

        Raises:
            PreconditionFailed: as `check_tap`, or the kernel refused.
        """
        fd = device.tap_fds[0]
        name, flags = check_tap(self._vmm, device)
        try:
            null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
            try:
                # In the list first: what is refused half-way is taken back by `abandon`.
                self._lent.append(_Lent(name, fd, flags))
                fcntl.ioctl(fd, _TUNSETPERSIST, 1)
                os.dup2(null, fd, inheritable=False)
            finally:
                os.close(null)
        except OSError as error:
            raise PreconditionFailed(
                f"tap {name}", path=None, why="cannot be lent to the VMM", errno=error.errno,
                fix="run the shim as root",
            ) from error  # fmt: skip
        return name

    def take_back(self, pid: int) -> None:
        """Make the descriptors copies of those that the VMM has opened by now.

        Raises:
            ControlError: it has not opened one.
        """
        for lent in tuple(self._lent):
            try:
                theirs = _find(pid, lent.name)
                try:
                    os.dup2(theirs, lent.fd, inheritable=False)
                finally:
                    os.close(theirs)
                self._let_go(lent)
            except OSError as error:
                raise ControlError(f"open tap {lent.name}", str(error)) from error
            self._lent.remove(lent)

    async def abandon(self) -> None:
        """Take away what is still lent, when the VMM is dead. Idempotent; shielded, and bounded.

        A namespace that is gone has taken its taps along.
        """
        lent = [(one.name, one.flags) for one in self._lent]
        self._lent.clear()
        if lent and self._namespace is not None:
            await _remove(lent, self._namespace)

    def _let_go(self, lent: _Lent) -> None:
        if not lent.flags & _IFF_PERSIST:  # else it is somebody else's, who keeps it
            fcntl.ioctl(lent.fd, _TUNSETPERSIST, 0)


def check_tap(vmm: str, device: NetDevice) -> tuple[str, int]:
    """The name and flags of an interface's tap.

    Raises:
        PreconditionFailed: several queues, or a descriptor that has no name to be opened by.
    """

    def refuse(why: str, fix: str) -> PreconditionFailed:
        return PreconditionFailed(f"network device {device.id}", path=None, why=why, fix=fix)

    number = os.fstat(device.tap_fds[0]).st_rdev
    if (os.major(number), os.minor(number)) != _TUN_DEVICE:
        raise refuse(
            f"{vmm} opens taps by name, and this is none (a macvtap?)",
            'set internetworking_model = "tcfilter"',
        )
    answer = fcntl.ioctl(device.tap_fds[0], _TUNGETIFF, _IFREQ.pack(b"", 0))
    name, flags = _IFREQ.unpack(answer)
    if len(device.tap_fds) > 1 or flags & _IFF_MULTI_QUEUE:
        raise refuse(f"{vmm}'s interfaces have one queue", "set network_queues = 1")
    return name.rstrip(b"\0").decode("ascii", "replace"), flags


def _find(pid: int, name: str) -> int:
    """A copy of the descriptor that a process has of the tap `name`. Raises OSError."""
    for entry in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            if os.readlink(f"/proc/{pid}/fd/{entry}").endswith("/tun"):
                with open(f"/proc/{pid}/fdinfo/{entry}", encoding="ascii") as stream:
                    if ["iff:", name] in [line.split() for line in stream]:
                        return _copy(pid, int(entry))
    raise FileNotFoundError(f"process {pid} has no tap {name}")


def _copy(pid: int, number: int) -> int:
    pidfd = os.pidfd_open(pid)
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        fd: int = libc.syscall(_SYS_PIDFD_GETFD, pidfd, number, 0)
        if fd < 0:
            code = ctypes.get_errno()
            raise OSError(code, f"pidfd_getfd: {os.strerror(code)}")
        return fd
    finally:
        os.close(pidfd)


async def _remove(taps: list[tuple[str, int]], namespace: int) -> None:
    """Let taps go that nobody holds. By a child: the caller stays in its own namespace."""
    child_exec.prepare()
    answer, far = os.pipe2(os.O_CLOEXEC)
    try:
        try:
            helper = os.fork()
            if helper == 0:
                _remove_and_exit(taps, namespace)
        finally:
            os.close(far)
        await collect(helper, answer)
    finally:
        os.close(answer)


def _remove_and_exit(taps: list[tuple[str, int]], namespace: int) -> NoReturn:
    try:
        child_exec.leave_parent(keep=namespace)
        if ctypes.CDLL(None).setns(namespace, _CLONE_NEWNET) == 0:
            for name, flags in taps:
                with contextlib.suppress(OSError):
                    fd = os.open(_TUN, os.O_RDWR)
                    fcntl.ioctl(fd, _TUNSETIFF, _IFREQ.pack(name.encode(), flags & _TUN_FLAGS))
                    fcntl.ioctl(fd, _TUNSETPERSIST, int(bool(flags & _IFF_PERSIST)))
                    os.close(fd)
    finally:
        os._exit(0)
