"""Hears from the guest that its agent serves: the guest connects to a port of the host and says so.

One line of JSON, then the guest closes:
`{"agent": "…", "version": "…", "boot_ms": {"phase": milliseconds, …}}`.
Ours alone: an agent that never calls is reached with `vsock.dial_until`. The listener stands before
the VM is launched, so the call cannot be missed.
"""

from __future__ import annotations

import errno
import json
import math
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import trio

from agent_proto.errors import AgentMisbehaved, AgentTimeout, AgentUnreachable, guest_text
from agent_proto.vsock import Endpoint, HybridVsock, KernelVsock

# The host port that `kata.ready_port=` names on the guest's kernel command line.
READY_PORT: Final = 1030

# For KernelVsock: let the kernel choose. Host ports are one space for all guests of a machine, so
# a fixed one serves one sandbox only.
ANY_PORT: Final = socket.VMADDR_PORT_ANY

MAX_REPORT_BYTES: Final = 4096

# From the first byte of the line to its last. It is one write of the agent's; this is what an
# emulated guest under heavy load could need for it, times ten.
REPORT_LINE_S: Final = 10.0

# One connection is expected. A few more may wait so that a stray one cannot shut out the agent.
_BACKLOG: Final = 4

_MAX_PHASES: Final = 32
_MAX_NAME: Final = 64
_MAX_PHASE_MS: Final = 86_400_000.0

_METHOD: Final = "readiness report"


@dataclass(frozen=True, slots=True)
class BootReport:
    """What the agent said of itself. Hearsay: for logs and timelines, not for decisions."""

    agent: str
    version: str
    boot_ms: Mapping[str, float] = field(default_factory=dict)


def parse_report(line: bytes) -> BootReport:
    """Turn the guest's line into a report; unknown members are passed over.

    Raises:
        AgentMisbehaved: not the JSON described above, or out of its limits.
    """
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise AgentMisbehaved(_METHOD, f"not JSON: {guest_text(line, 80)}") from error
    if not isinstance(value, dict):
        raise AgentMisbehaved(_METHOD, "not a JSON object")
    boot_ms = value.get("boot_ms", {})
    if not isinstance(boot_ms, dict) or len(boot_ms) > _MAX_PHASES:
        raise AgentMisbehaved(_METHOD, f"boot_ms is no object of at most {_MAX_PHASES} numbers")
    phases = {guest_text(name, _MAX_NAME): _phase_ms(number) for name, number in boot_ms.items()}
    return BootReport(_name(value, "agent"), _name(value, "version"), phases)


def _name(value: Mapping[str, object], key: str) -> str:
    text = value.get(key)
    if not isinstance(text, str) or not text:
        raise AgentMisbehaved(_METHOD, f"no {key}")
    return guest_text(text, _MAX_NAME)


def _phase_ms(number: object) -> float:
    if isinstance(number, bool) or not isinstance(number, int | float):
        raise AgentMisbehaved(_METHOD, "boot_ms holds something else than a number")
    # Compared before it is converted: float() of a huge int raises.
    if not 0 <= number <= _MAX_PHASE_MS or not math.isfinite(number):
        raise AgentMisbehaved(_METHOD, "boot_ms holds a number out of range")
    return float(number)


def readiness_path(endpoint: HybridVsock) -> Path:
    """Return the unix socket on which a hybrid vsock device delivers the guest's calls.

    Source: Firecracker docs/vsock.md "Guest-initiated connections": `<uds_path>_<port>`.
    """
    return endpoint.uds_path.with_name(f"{endpoint.uds_path.name}_{endpoint.port}")


class ReadinessListener:
    """A bound socket for one guest's report. Leaving the context closes and removes it.

    Bind with `listen`, launch the VM inside of the context, then `wait`.
    """

    def __init__(self, sock: socket.socket, endpoint: Endpoint) -> None:
        self._sock = sock
        self._endpoint = endpoint

    @classmethod
    def listen(cls, endpoint: Endpoint) -> Self:
        """Bind for the guest's calls to host port `endpoint.port`.

        A hybrid endpoint takes `readiness_path(endpoint)`, mode 0600. A kernel endpoint takes the
        AF_VSOCK port if it is free, else any, and accepts only its own cid. Tell the guest `.port`.

        Raises:
            AgentUnreachable: the address can't be bound: in use, path too long, no vsock.
        """
        family = socket.AF_UNIX if isinstance(endpoint, HybridVsock) else socket.AF_VSOCK
        try:
            sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        except OSError as error:
            raise AgentUnreachable(str(endpoint), error.strerror or str(error)) from error
        try:
            if isinstance(endpoint, HybridVsock):
                _bind_private(sock, readiness_path(endpoint))
            else:
                _bind_vsock(sock, endpoint.port)
            sock.listen(_BACKLOG)
        except OSError as error:
            sock.close()
            raise AgentUnreachable(str(endpoint), error.strerror or str(error)) from error
        return cls(sock, endpoint)

    @property
    def port(self) -> int:
        """The host port to tell the guest."""
        if isinstance(self._endpoint, HybridVsock):
            return self._endpoint.port
        port: int = self._sock.getsockname()[1]
        return port

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop listening and remove the socket's file. Idempotent."""
        if self._sock.fileno() < 0:
            return
        trio.lowlevel.notify_closing(self._sock)
        self._sock.close()
        if isinstance(self._endpoint, HybridVsock):
            readiness_path(self._endpoint).unlink(missing_ok=True)

    async def wait(self, *, timeout_s: float = math.inf) -> BootReport:
        """Wait for the guest's report. Safe to cancel and to call again.

        A caller that says nothing, or that is another guest, is passed over.

        Raises:
            AgentTimeout: no report within `timeout_s`.
            AgentMisbehaved: the guest called and said something else.
        """
        with trio.move_on_after(timeout_s):
            while True:
                sock, peer = await self._accept()
                with sock:
                    if isinstance(self._endpoint, KernelVsock) and peer != self._endpoint.cid:
                        continue
                    line = await _read_line(sock)
                if line:
                    return parse_report(line)
        raise AgentTimeout(_METHOD, timeout_s)

    async def _accept(self) -> tuple[socket.socket, int | None]:
        while True:
            await trio.lowlevel.wait_readable(self._sock)
            try:
                sock, address = self._sock.accept()
            except (BlockingIOError, ConnectionAbortedError):
                continue
            sock.setblocking(False)
            return sock, None if isinstance(self._endpoint, HybridVsock) else address[0]


def _bind_private(sock: socket.socket, path: Path) -> None:
    # bind() makes the file with the mode of the inode behind the descriptor, less the umask.
    os.fchmod(sock.fileno(), 0o600)
    sock.bind(os.fspath(path))


def _bind_vsock(sock: socket.socket, port: int) -> None:
    try:
        sock.bind((socket.VMADDR_CID_ANY, port))
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        sock.bind((socket.VMADDR_CID_ANY, ANY_PORT))


async def _read_line(sock: socket.socket) -> bytes:
    """Read up to the end of line or of stream; nothing if the peer says nothing."""
    line = b""
    with trio.move_on_after(REPORT_LINE_S):
        while len(line) < MAX_REPORT_BYTES:
            await trio.lowlevel.wait_readable(sock)
            try:
                data = sock.recv(MAX_REPORT_BYTES - len(line))
            except BlockingIOError:
                continue
            except OSError as error:
                if error.errno != errno.ECONNRESET:
                    raise
                data = b""
            line += data
            if not data or b"\n" in data:
                return line.partition(b"\n")[0]
        raise AgentMisbehaved(_METHOD, f"no end of line within {MAX_REPORT_BYTES} bytes")
    if not line:
        return b""
    raise AgentMisbehaved(_METHOD, f"no end of line within {REPORT_LINE_S:g} s")
