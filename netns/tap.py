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
from typing import Final

from netns.inside import MAX_FDS, WorkFailed, run_inside

# Source: linux/if_tun.h
_TUNSETIFF: Final = 0x4004_54CA
_TUNSETPERSIST: Final = 0x4004_54CB
_TUNSETVNETHDRSZ: Final = 0x4004_54D8
_IFF_TAP: Final = 0x0002
_IFF_MULTI_QUEUE: Final = 0x0100
_IFF_NO_PI: Final = 0x1000
_IFF_VNET_HDR: Final = 0x4000
_IFF_TUN_EXCL: Final = 0x8000

# Source: linux/sockios.h, linux/if.h
_SIOCGIFFLAGS: Final = 0x8913
_SIOCSIFFLAGS: Final = 0x8914
_SIOCSIFMTU: Final = 0x8922
_SIOCGIFINDEX: Final = 0x8933
_IFF_UP: Final = 0x1
_IFNAMSIZ: Final = 16

# Source: virtio 1.2, 5.1.6: struct virtio_net_hdr with num_buffers, which virtio 1 devices use.
_VNET_HEADER_BYTES: Final = 12

# Source: linux/rtnetlink.h, linux/netlink.h
_RTM_DELLINK: Final = 17
_NLM_F_REQUEST_ACK: Final = 0x1 | 0x4

_IFREQ: Final = struct.Struct("=16sH22x")
_IFREQ_INT: Final = struct.Struct("=16si20x")
_NLMSG: Final = struct.Struct("=IHHII")
_IFINFO: Final = struct.Struct("=BxHiII")


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
    work = partial(_create, _encoded(name), queues, mtu, persistent)
    return tuple(await run_inside(namespace, label, work))


async def remove_tap(namespace: Path, name: str) -> None:
    """Remove the link `name`, whoever holds descriptors of it. Removing what isn't there is fine.

    Raises as `create_tap`.
    """
    await run_inside(namespace, f"remove tap {name}", partial(_remove, _encoded(name)))


def _encoded(name: str) -> bytes:
    raw = name.encode()
    # The kernel would take "%" for a pattern and cut long names.
    if not 0 < len(raw) < _IFNAMSIZ or not name.isascii() or set(name) & set("/%: \n\t\0"):
        raise ValueError(f"{name!r} cannot name a network link")
    return raw


def _create(name: bytes, queues: int, mtu: int | None, persistent: bool) -> list[int]:
    shown = name.decode()
    flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR | (_IFF_MULTI_QUEUE if queues > 1 else 0)
    fds: list[int] = []
    for queue in range(queues):
        with _as(f"open a queue of tap {shown}"):
            fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
            # A tap of that name which we did not make is refused; further queues join ours.
            exclusive = _IFF_TUN_EXCL if queue == 0 else 0
            fcntl.ioctl(fd, _TUNSETIFF, _IFREQ.pack(name, flags | exclusive))
            fcntl.ioctl(fd, _TUNSETVNETHDRSZ, struct.pack("=i", _VNET_HEADER_BYTES))
        fds.append(fd)
    with _as(f"set tap {shown} up"), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        if mtu is not None:
            fcntl.ioctl(control, _SIOCSIFMTU, _IFREQ_INT.pack(name, mtu))
        fcntl.ioctl(control, _SIOCSIFFLAGS, _IFREQ.pack(name, _flags(control, name) | _IFF_UP))
        # Last: what fails before it goes with the descriptors.
        if persistent:
            fcntl.ioctl(fds[0], _TUNSETPERSIST, 1)
    return fds


def _remove(name: bytes) -> list[int]:
    shown = name.decode()
    with _as(f"find link {shown}"), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        try:
            reply = fcntl.ioctl(control, _SIOCGIFINDEX, _IFREQ_INT.pack(name, 0))
        except OSError as error:
            if error.errno == errno.ENODEV:
                return []
            raise
        index: int = _IFREQ_INT.unpack(reply)[1]
    code = _delete_link(index)
    if code not in (0, errno.ENODEV):
        raise WorkFailed(f"remove link {shown}", code)
    return []


def _flags(control: socket.socket, name: bytes) -> int:
    flags: int = _IFREQ.unpack(fcntl.ioctl(control, _SIOCGIFFLAGS, _IFREQ.pack(name, 0)))[1]
    return flags


def _delete_link(index: int) -> int:
    """Send RTM_DELLINK; return the errno of the kernel's acknowledgement.

    Source: rtnetlink(7). The one request that no ioctl can make.
    """
    body = _IFINFO.pack(socket.AF_UNSPEC, 0, index, 0, 0)
    head = _NLMSG.pack(_NLMSG.size + len(body), _RTM_DELLINK, _NLM_F_REQUEST_ACK, 1, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as netlink:
        netlink.send(head + body)
        answer = netlink.recv(4096)
    (code,) = struct.unpack_from("=i", answer, _NLMSG.size)
    return -int(code)


@contextlib.contextmanager
def _as(operation: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise WorkFailed(operation, error.errno or errno.EIO) from error
