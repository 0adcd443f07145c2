"""Makes and removes tap devices in a pod's network namespace.

A tap is a virtual machine's end of a network card: what the VMM writes to its descriptor comes out
of the link in the namespace. The VMM gets descriptors, so that it need not live in the namespace.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import struct
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from netns.inside import MAX_FDS, Outcome, WorkFailed, run_inside
from netns.revert import IFINFO, RTM_DELLINK, ask

if TYPE_CHECKING:
    from netns.model import TapMode

# Source: linux/if_tun.h
_TUNSETIFF: Final = 0x4004_54CA
_TUNSETPERSIST: Final = 0x4004_54CB
_TUNSETVNETHDRSZ: Final = 0x4004_54D8
_VHOST_NET: Final = "/dev/vhost-net"
_IFF_TAP: Final = 0x0002
_IFF_MULTI_QUEUE: Final = 0x0100
_IFF_NO_PI: Final = 0x1000
_IFF_VNET_HDR: Final = 0x4000
_IFF_TUN_EXCL: Final = 0x8000

# Source: linux/sockios.h, linux/if.h
_SIOCGIFFLAGS: Final = 0x8913
_SIOCSIFFLAGS: Final = 0x8914
_SIOCSIFMTU: Final = 0x8922
_IFF_UP: Final = 0x1
_IFNAMSIZ: Final = 16

# Source: virtio 1.2, 5.1.6: struct virtio_net_hdr with num_buffers, which virtio 1 devices use.
_VNET_HEADER_BYTES: Final = 12

_IFREQ: Final = struct.Struct("=16sH22x")
_IFREQ_INT: Final = struct.Struct("=16si20x")


async def create_tap(
    namespace: Path, name: str, *, queues: int = 1, mtu: int | None = None, persistent: bool = False
) -> tuple[int, ...]:
    """Make the tap `name` in the network namespace at `namespace`, bring it up, hand it over.

    Returns one descriptor a queue, which the caller owns. A tap that isn't `persistent` is gone
    when the last of its descriptors is closed, by whomever: nothing is left to clean up after a
    dead VMM. Packets carry a virtio-net header of 12 bytes and no packet information.
    Cancelling leaves no tap.

    Raises:
        NamespaceGone: the path is no network namespace.
        KernelRefused: e.g. EEXIST or EBUSY when the name is taken.
        HelperLost: the helper process died or hung.
    """
    if not 1 <= queues <= MAX_FDS:
        raise ValueError(f"a tap cannot have {queues} queues")
    label = f"create tap {name}"
    _encoded(name)
    work = partial(_create, name, queues, mtu, persistent)
    return tuple((await run_inside(namespace, label, work)).fds)


async def remove_tap(namespace: Path, name: str) -> None:
    """Remove the link `name`, whoever holds descriptors of it. Removing what isn't there is fine.

    Raises as `create_tap`.
    """
    _encoded(name)
    await run_inside(namespace, f"remove tap {name}", partial(_remove, name))


def _encoded(name: str) -> bytes:
    raw = name.encode()
    # The kernel would take "%" for a pattern and cut long names.
    if not 0 < len(raw) < _IFNAMSIZ or not name.isascii() or set(name) & set("/%: \n\t\0"):
        raise ValueError(f"{name!r} cannot name a network link")
    return raw


def open_tap(
    name: str, queues: int, mtu: int | None, *, persistent: bool = False, quiet: bool = False
) -> list[int]:
    """Make a tap in the caller's own namespace, for work that runs there; see `create_tap`.

    A `quiet` tap has no IPv6 of its own, so that nothing but the pod's frames comes out of it.

    Raises:
        WorkFailed: the kernel refused; nothing is left.
    """
    flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR | (_IFF_MULTI_QUEUE if queues > 1 else 0)
    fds = _open_queues(name, flags, queues, exclusive=True)
    raw = _encoded(name)
    with _as(f"set tap {name} up"), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        if mtu is not None:
            fcntl.ioctl(control, _SIOCSIFMTU, _IFREQ_INT.pack(raw, mtu))
        if quiet:
            _disable_ipv6(name)
        fcntl.ioctl(control, _SIOCSIFFLAGS, _IFREQ.pack(raw, _flags(control, raw) | _IFF_UP))
        # Last: what fails before it goes with the descriptors.
        if persistent:
            fcntl.ioctl(fds[0], _TUNSETPERSIST, 1)
    return fds


def join_tap(name: str, mode: TapMode, queues: int) -> list[int]:
    """Open a tap that somebody has made for a virtual machine, as its maker made it.

    Raises:
        WorkFailed: e.g. EBUSY when another program holds it.
    """
    flags = _IFF_TAP
    flags |= 0 if mode.has_packet_info else _IFF_NO_PI
    flags |= _IFF_VNET_HDR if mode.has_vnet_header else 0
    flags |= _IFF_MULTI_QUEUE if mode.is_multi_queue else 0
    return _open_queues(name, flags, queues if mode.is_multi_queue else 1, exclusive=False)


def open_vhost_net(queues: int) -> tuple[int, ...]:
    """Open the kernel's accelerator once a queue; none where the host has none."""
    fds: list[int] = []
    try:
        for _ in range(queues):
            fds.append(os.open(_VHOST_NET, os.O_RDWR | os.O_CLOEXEC))  # noqa: PERF401
    except OSError:
        for fd in fds:
            os.close(fd)
        return ()
    return tuple(fds)


def _create(name: str, queues: int, mtu: int | None, persistent: bool) -> Outcome:
    return Outcome(fds=open_tap(name, queues, mtu, persistent=persistent))


def _open_queues(name: str, flags: int, queues: int, *, exclusive: bool) -> list[int]:
    raw = _encoded(name)
    fds: list[int] = []
    for queue in range(queues):
        with _as(f"open a queue of tap {name}"):
            fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
            # A tap of that name which we did not make is refused; further queues join ours.
            only_new = _IFF_TUN_EXCL if exclusive and queue == 0 else 0
            fcntl.ioctl(fd, _TUNSETIFF, _IFREQ.pack(raw, flags | only_new))
            if flags & _IFF_VNET_HDR:
                fcntl.ioctl(fd, _TUNSETVNETHDRSZ, struct.pack("=i", _VNET_HEADER_BYTES))
        fds.append(fd)
    return fds


def _disable_ipv6(name: str) -> None:
    # A kernel without IPv6 has no such file, and an unwritable one only costs a few packets.
    with contextlib.suppress(OSError):
        path = f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6"
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, b"1")
        finally:
            os.close(fd)


def _remove(name: str) -> Outcome:
    try:
        index = socket.if_nametoindex(name)
    except OSError:
        return Outcome()
    code = ask(RTM_DELLINK, IFINFO.pack(0, 0, index, 0, 0))
    if code not in (0, errno.ENODEV):
        raise WorkFailed(f"remove link {name}", code)
    return Outcome()


def _flags(control: socket.socket, name: bytes) -> int:
    flags: int = _IFREQ.unpack(fcntl.ioctl(control, _SIOCGIFFLAGS, _IFREQ.pack(name, 0)))[1]
    return flags


@contextlib.contextmanager
def _as(operation: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise WorkFailed(operation, error.errno or errno.EIO) from error
