"""A ttrpc client of a shim's own socket: blocking, one call at a time, written apart from ttrpc/.

Measures and questions a shim as containerd would, whichever runtime's it is.
"""

from __future__ import annotations

import socket
import struct
from pathlib import Path
from typing import Any, Self

from tests.harness.messages import MESSAGES
from tests.harness.patience import patient

_HEADER = struct.Struct(">IIBB")
_REQUEST, _RESPONSE = 1, 2
_SERVICE = "containerd.task.v2.Task"


class ShimRefused(Exception):
    """The shim answered with an error status."""

    def __init__(self, method: str, code: int, message: str) -> None:
        super().__init__(f"{method}: code {code}: {message}")
        self.code = code
        self.message = message


class ShimClient:
    """One connection to a shim. Use as a context manager."""

    def __init__(self, path: Path, *, timeout_s: float = 30) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(patient(timeout_s))
        self._socket.connect(str(path))
        self._stream = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *details: object) -> None:
        self._socket.close()

    def call(self, method: str, payload: bytes) -> bytes:
        """Call a method of the Task service; raises ShimRefused."""
        self._stream += 2
        request = MESSAGES["TtrpcRequest"](service=_SERVICE, method=method, payload=payload)
        data = request.SerializeToString()
        self._socket.sendall(_HEADER.pack(len(data), self._stream, _REQUEST, 0) + data)
        length, stream, kind, _ = _HEADER.unpack(self._receive(_HEADER.size))
        assert (stream, kind) == (self._stream, _RESPONSE)
        response = MESSAGES["TtrpcResponse"].FromString(self._receive(length))
        if response.status.code:
            raise ShimRefused(method, response.status.code, response.status.message)
        return bytes(response.payload)

    def connect(self, container: str) -> Any:
        request = MESSAGES["ConnectRequest"](id=container)
        return MESSAGES["ConnectResponse"].FromString(
            self.call("Connect", request.SerializeToString())
        )

    def state(self, container: str) -> bytes | ShimRefused:
        """Return the State response's bytes, or the refusal, which is an answer, too."""
        try:
            return self.call("State", MESSAGES["StateRequest"](id=container).SerializeToString())
        except ShimRefused as refused:
            return refused

    def shutdown(self, container: str) -> None:
        request = MESSAGES["ShutdownRequest"](id=container)
        self.call("Shutdown", request.SerializeToString())

    def _receive(self, length: int) -> bytes:
        data = b""
        while len(data) < length:
            chunk = self._socket.recv(length - len(data))
            if not chunk:
                raise ConnectionResetError("the shim closed the connection")
            data += chunk
        return data
