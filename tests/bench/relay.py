"""How fast output passes the shim: its relay and agent client, with a local stream as the guest.

A child process answers ReadStdout with bytes that are ready, another reads the fifo and drops
them: what is measured is what the shim adds between the two.
"""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import trio

from agent_proto.client import AgentClient
from shimv2.relay import Relay
from shimv2.stdio import Logger, LoggerCommand, open_stdio, parse_stdio
from shimv2.stdio_fifo import CHUNK_BYTES
from tests.harness.messages import MESSAGES
from tests.harness.node import REPOSITORY

TOTAL_BYTES = 1 << 30
_HEADER = struct.Struct(">IIBB")


def serve_stream(connection: socket.socket, total: int) -> None:
    """Answer stdio reads on a ttrpc connection: `total` bytes of stdout, no stderr."""
    # ReadStreamResponse { bytes data = 1; }
    length = CHUNK_BYTES
    varint = bytes((length >> shift & 0x7F) | (0x80 if length >> shift + 7 else 0)
                   for shift in range(0, 21, 7) if length >> shift)
    data = b"\x0a" + varint + b"x" * length
    full = MESSAGES["TtrpcResponse"](payload=data).SerializeToString()
    left = total
    reader = connection.makefile("rb")
    while header := reader.read(_HEADER.size):
        size, stream, _, _ = _HEADER.unpack(header)
        request = reader.read(size)
        answer = b""
        if left > 0 and b"ReadStdout" in request:
            answer, left = full, left - length
        connection.sendall(_HEADER.pack(len(answer), stream, 2, 0) + answer)


class LocalGuest:
    """The shim's view of a process in the guest, over a real agent client."""

    def __init__(self, agent: AgentClient) -> None:
        self._agent = agent

    async def read_stdout(self, max_bytes: int) -> bytes:
        return await self._agent.read_stdout("c", "c", max_bytes)

    async def read_stderr(self, max_bytes: int) -> bytes:
        return await self._agent.read_stderr("c", "c", max_bytes)

    async def write_stdin(self, data: bytes) -> int:
        return len(data)

    async def close_stdin(self) -> None:
        return


async def _no_logger(command: LoggerCommand) -> Logger:
    raise AssertionError(command)


async def _relay(connection: socket.socket, fifo: Path) -> None:
    connection.setblocking(False)
    agent = AgentClient(connection)
    async with trio.open_nursery() as nursery:
        await nursery.start(agent.run)
        plan = parse_stdio("", str(fifo), "", terminal=False)
        await Relay(plan, await open_stdio(plan, _no_logger), LocalGuest(agent)).run()
        agent.close()


def measure_mb_per_s() -> float:
    """Move 1 GiB through the relay once; return MB (10^6) a second."""
    ours, theirs = socket.socketpair()
    with tempfile.TemporaryDirectory() as directory, ours, theirs:
        fifo = Path(directory, "stdout")
        os.mkfifo(fifo)
        server = subprocess.Popen(
            [sys.executable, "-m", "tests.bench.relay", str(theirs.fileno())],
            pass_fds=[theirs.fileno()], cwd=REPOSITORY, stdout=subprocess.PIPE)
        theirs.close()
        reader = subprocess.Popen(["dd", f"if={fifo}", "of=/dev/null", "bs=1M"],
                                  stderr=subprocess.DEVNULL)
        assert server.stdout is not None
        with server.stdout:
            server.stdout.readline()  # its imports are over
        begin = time.perf_counter()
        trio.run(_relay, ours, fifo)
        reader.wait(60)
        elapsed = time.perf_counter() - begin
        server.wait(10)
    return TOTAL_BYTES / 1e6 / elapsed


if __name__ == "__main__":
    print("ready", flush=True)
    serve_stream(socket.socket(fileno=int(sys.argv[1])), TOTAL_BYTES)
