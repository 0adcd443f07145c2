"""Tells when something changes in a pod's namespace: networks that arrive after the VM.

The socket was made inside of the namespace by the helper process, and belongs to it for good; it is
read from outside.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable
from typing import Final

import trio

from netns import rtnetlink
from netns.plan import is_ours
from netns.scan import RTM_NEWADDR, RTM_NEWLINK, RTM_NEWROUTE, link_of

_RTM_DELLINK, _RTM_DELADDR, _RTM_DELROUTE = 17, 21, 25
_CHANGES: Final = {
    RTM_NEWLINK, RTM_NEWADDR, RTM_NEWROUTE, _RTM_DELLINK, _RTM_DELADDR, _RTM_DELROUTE,
}  # fmt: skip

# Source: linux/rtnetlink.h RTMGRP_LINK, IPV4_IFADDR, IPV4_ROUTE, IPV6_IFADDR, IPV6_ROUTE
_GROUPS: Final = 0x1 | 0x10 | 0x40 | 0x100 | 0x400
_READ_BYTES: Final = 64 << 10

# A network arrives as a burst: link, name, addresses, up, routes. Looking at half of it is useless.
QUIET_S: Final = 0.05


def open_watch() -> socket.socket:
    """Make the socket, in the namespace of the calling process."""
    kind = socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
    netlink = socket.socket(socket.AF_NETLINK, kind, socket.NETLINK_ROUTE)
    netlink.bind((0, _GROUPS))
    return netlink


async def wait_changed(watch: socket.socket, *, quiet_s: float = QUIET_S) -> None:
    """Return when links, addresses or routes have changed and then kept still for `quiet_s`.

    What our own taps do does not count. Nothing is lost between two calls. Safe to cancel.

    Raises:
        OSError: the socket is broken.
    """
    while not _drain(watch, is_change):
        await trio.lowlevel.wait_readable(watch)
    while True:
        with trio.move_on_after(quiet_s) as quiet:
            await trio.lowlevel.wait_readable(watch)
        if quiet.cancelled_caught:
            return
        _drain(watch, is_change)


def is_change(message: rtnetlink.Message) -> bool:
    """Tell whether a message of the watched groups is about the pod's own network."""
    if message.type not in _CHANGES:
        return False
    if message.type not in (RTM_NEWLINK, _RTM_DELLINK):
        return True
    link = link_of(message.body)
    return not (link.is_loopback or is_ours(link.name))


def _drain(watch: socket.socket, is_wanted: Callable[[rtnetlink.Message], bool]) -> bool:
    """Read all there is; tell whether any of it is wanted, or some of it was lost."""
    found = False
    while True:
        try:
            data = watch.recv(_READ_BYTES)
        except BlockingIOError:
            return found
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise
            found = True  # the kernel had more to say than it could keep
        else:
            found = found or any(is_wanted(message) for message in rtnetlink.messages(data))
