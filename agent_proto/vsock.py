"""Connects to a port of a guest: over AF_VSOCK, or over the unix socket of a hybrid vsock device.

Hands out plain non-blocking sockets, which is what `ttrpc.client` takes. Who calls: `shimv2`, once
the guest has said that it serves (`readiness`), or with `dial_until` for agents that never say so.
"""

from __future__ import annotations

import errno
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import trio

from agent_proto.errors import AgentUnreachable
from agent_proto.hybrid_vsock import MAX_REPLY_BYTES, Connected, Handshake

# Source: kata-containers 4.1, agent server address vsock://-1:1024.
AGENT_PORT: Final = 1024

# The first pause of dial_until is what a person would not notice, the last what a starting guest
# would not: the sum of the pauses adds at most 2 % to any boot longer than 25 s, 0.5 s to a hung
# one. Polling harder has wedged a vhost-device-vsock 0.3.0.
FIRST_PAUSE_S: Final = 0.010
LONGEST_PAUSE_S: Final = 0.500

# A wedged vsock device takes the connection and never answers. Two seconds is far more than a
# loaded emulated guest needs for a connect, and leaves dial_until other attempts.
LONGEST_ATTEMPT_S: Final = 2.0


@dataclass(frozen=True, slots=True)
class HybridVsock:
    """A guest's port behind the unix socket `uds_path` of its vsock device."""

    uds_path: Path
    port: int = AGENT_PORT

    def __str__(self) -> str:
        return f"hvsock://{self.uds_path}:{self.port}"


@dataclass(frozen=True, slots=True)
class KernelVsock:
    """A guest's port by the context id its vhost-vsock device has."""

    cid: int
    port: int = AGENT_PORT

    def __str__(self) -> str:
        return f"vsock://{self.cid}:{self.port}"


Endpoint = HybridVsock | KernelVsock


async def dial(endpoint: Endpoint, *, timeout_s: float) -> socket.socket:
    """Make one connection to `endpoint` within `timeout_s` seconds.

    Returns a connected non-blocking socket that the caller owns. Cancelling leaves nothing open.

    Raises:
        HandshakeRefused: the hybrid vsock device did not confirm.
        AgentUnreachable: anything else: no socket, connection refused, no answer in time.
    """
    with trio.move_on_after(timeout_s):
        match endpoint:
            case HybridVsock():
                return await _dial_hybrid(endpoint)
            case KernelVsock():
                return await _dial_kernel(endpoint)
    raise AgentUnreachable(str(endpoint), f"no connection within {timeout_s:g} s")


async def dial_until(endpoint: Endpoint, *, deadline_s: float) -> socket.socket:
    """Dial again and again until a connection stands or `deadline_s` seconds have passed.

    For agents that don't report readiness. The pause between attempts doubles from 10 ms to 500 ms.
    Returns and cancels as `dial`.

    Raises:
        AgentUnreachable: no attempt succeeded; its `__cause__` is the last attempt's error.
    """
    started = trio.current_time()
    give_up_at = started + deadline_s
    pause_s = FIRST_PAUSE_S
    attempts = 0
    while True:
        attempts += 1
        left_s = max(0.0, give_up_at - trio.current_time())
        try:
            return await dial(endpoint, timeout_s=min(left_s, LONGEST_ATTEMPT_S))
        except AgentUnreachable as error:
            if trio.current_time() + pause_s >= give_up_at:
                reason = f"gave up after {attempts} attempts in {deadline_s:g} s: {error.reason}"
                raise AgentUnreachable(str(endpoint), reason) from error
        # Nothing signals that such an agent listens, so this has to be a poll.
        await trio.sleep(pause_s)
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


async def _dial_hybrid(endpoint: HybridVsock) -> socket.socket:
    address = os.fspath(endpoint.uds_path)
    sock = await _connect(socket.AF_UNIX, address, str(endpoint))
    try:
        await _shake_hands(sock, endpoint)
    except OSError as error:
        sock.close()
        raise AgentUnreachable(str(endpoint), _reason(error)) from error
    except BaseException:
        sock.close()
        raise
    return sock


async def _dial_kernel(endpoint: KernelVsock) -> socket.socket:
    return await _connect(socket.AF_VSOCK, (endpoint.cid, endpoint.port), str(endpoint))


async def _connect(family: int, address: str | tuple[int, int], name: str) -> socket.socket:
    try:
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    except OSError as error:
        raise AgentUnreachable(name, _reason(error)) from error
    try:
        # EAGAIN from a unix socket means that its queue is full, not that the connection is on its
        # way: connect_ex tells it apart and it becomes a failed attempt.
        code = sock.connect_ex(address)
        if code == errno.EINPROGRESS:
            await trio.lowlevel.wait_writable(sock)
            code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            raise OSError(code, os.strerror(code))
    except OSError as error:
        sock.close()
        raise AgentUnreachable(name, _reason(error)) from error
    except BaseException:
        sock.close()
        raise
    return sock


async def _shake_hands(sock: socket.socket, endpoint: HybridVsock) -> None:
    handshake = Handshake(endpoint.port)
    # A fresh socket's buffer takes a line whole; a short send would be a kernel we don't know.
    request = handshake.request()
    if sock.send(request, socket.MSG_NOSIGNAL) != len(request):
        raise AgentUnreachable(str(endpoint), "the vsock device takes no data")
    while not await _feed(handshake, sock):
        pass


async def _feed(handshake: Handshake, sock: socket.socket) -> list[Connected]:
    # What follows the line belongs to the stream. Peeking finds the end of the line, so that no
    # byte behind it leaves the socket.
    await trio.lowlevel.wait_readable(sock)
    seen = sock.recv(MAX_REPLY_BYTES, socket.MSG_PEEK)
    end = seen.find(b"\n") + 1
    return handshake.receive_data(sock.recv(end or len(seen)) if seen else b"")


def _reason(error: OSError) -> str:
    # socket raises a bare OSError("AF_UNIX path too long") without errno.
    return error.strerror or str(error)
