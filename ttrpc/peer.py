"""Who is at the other end of a unix socket, as the kernel tells it."""

from __future__ import annotations

import os
import socket
from struct import Struct
from typing import Final, NamedTuple

_UCRED: Final = Struct("iii")


class PeerCredentials(NamedTuple):
    """Of the process that connected, at the time it did. Source: unix(7) SO_PEERCRED."""

    pid: int
    uid: int
    gid: int


def peer_credentials(sock: socket.socket) -> PeerCredentials | None:
    """Return the peer's credentials; None if the socket is not a unix socket.

    Of a socket that is not connected, the pid is 0 and the others are -1.
    """
    if sock.family != socket.AF_UNIX:
        return None
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    return PeerCredentials(*_UCRED.unpack(raw))


def is_same_user(peer: PeerCredentials | None) -> bool:
    """Whether the peer runs as this process's effective user and group.

    Source: ttrpc unixcreds_linux.go UnixSocketRequireSameUser, which containerd's shims use.
    """
    return peer is not None and peer.uid == os.geteuid() and peer.gid == os.getegid()
