"""Takes steps of a plan back, inside of the namespace.

Runs at every teardown, also in `delete` after the shim was killed: so it is small, needs no
library, and each step takes what is gone already for done.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Sequence
from typing import Final, assert_never

from netns import rtnetlink
from netns.inside import WorkFailed
from netns.plan import (
    AddIngress,
    AddMacvtap,
    DeleteFilter,
    DeleteIngress,
    DeleteMacvtap,
    DeleteTap,
    Operation,
    PassVlans,
    Redirect,
    Shape,
    Unshape,
)
from netns.scan import link_of

# Source: linux/rtnetlink.h, linux/pkt_sched.h
RTM_DELLINK: Final = 17
_RTM_NEWLINK, _RTM_GETLINK = 16, 18
_RTM_DELQDISC: Final = 37
_RTM_DELTFILTER: Final = 45
_TC_H_ROOT: Final = 0xFFFF_FFFF
_TC_H_INGRESS: Final = 0xFFFF_FFF1
_INGRESS_HANDLE: Final = 0xFFFF_0000
_INGRESS_FILTERS: Final = 0xFFFF_FFF2

IFINFO: Final = struct.Struct("=BxHiII")
_TCMSG: Final = struct.Struct("=BxxxiIII")

# What the kernel answers when there is nothing to remove. EINVAL: the link has no such qdisc.
_NOTHING: Final = (0, errno.ENOENT, errno.ENODEV, errno.EINVAL)


def revert(steps: Sequence[Operation]) -> None:
    """Take all of `steps`; one that fails does not keep the others from being taken.

    Raises:
        WorkFailed: the first that failed, with how many did.
    """
    failed = [(step, code) for step in steps if (code := _take(step)) not in _NOTHING]
    if failed:
        step, code = failed[0]
        raise WorkFailed(f"{step}", code, f"{len(failed)} of {len(steps)} steps failed")


def ask(kind: int, body: bytes) -> int:
    """Send one netlink request; return the errno of its acknowledgement, 0 for success."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as netlink:
        netlink.send(rtnetlink.request(kind, body))
        for message in rtnetlink.messages(netlink.recv(64 << 10)):
            if message.type == rtnetlink.NLMSG_ERROR:
                return rtnetlink.refusal(message)
    return errno.EIO


def find(link: int, name: str) -> int:
    """Give the index of a link: as planned, or for one of ours by its name; 0 if there is none."""
    if link:
        return link
    try:
        return socket.if_nametoindex(name)
    except OSError:
        return 0


def _take(step: Operation) -> int:
    match step:
        case DeleteIngress(link, name):
            return _delete_qdisc(find(link, name), _INGRESS_HANDLE, _TC_H_INGRESS)
        case Unshape(link, name):
            return _delete_qdisc(find(link, name), 0, _TC_H_ROOT)
        case DeleteFilter(link, name, priority):
            body = _TCMSG.pack(0, find(link, name), 0, _INGRESS_FILTERS, priority << 16)
            return ask(_RTM_DELTFILTER, body)
        case DeleteMacvtap(name):
            return _delete_link(name, "macvtap")
        case DeleteTap(name):
            return _delete_link(name, "tun")
        case AddIngress() | Redirect() | PassVlans() | Shape() | AddMacvtap():
            raise TypeError(f"{step} takes nothing back")
        case _:
            assert_never(step)


def _delete_qdisc(index: int, handle: int, parent: int) -> int:
    if not index:
        return 0
    return ask(_RTM_DELQDISC, _TCMSG.pack(0, index, handle, parent, 0))


def _delete_link(name: str, kind: str) -> int:
    index = find(0, name)
    if not index or not _is_of(kind, index):
        return 0
    return ask(RTM_DELLINK, IFINFO.pack(0, 0, index, 0, 0))


def _is_of(kind: str, index: int) -> bool:
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as netlink:
        body = IFINFO.pack(0, 0, index, 0, 0)
        netlink.send(rtnetlink.request(_RTM_GETLINK, body, flags=0))
        found = rtnetlink.messages(netlink.recv(64 << 10))
        return any(m.type == _RTM_NEWLINK and link_of(m.body).kind == kind for m in found)
