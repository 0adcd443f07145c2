"""How fast output passes the shim: its relay and agent client, with a local stream as the guest.

One process answers ReadStdout with bytes that are ready, another reads the fifo and drops them, a
third is the relay. Beside it, runc's shim copying the same amount from a container's pipe.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from agent_proto.client import AgentClient
from shimv2 import heap
from shimv2.relay import Relay
from shimv2.stdio import Logger, LoggerCommand, open_stdio, parse_stdio
from shimv2.stdio_fifo import CHUNK_BYTES
from tests.bench.figure import Aim, Figure
from tests.harness.containerd_api import Tasks
from tests.harness.ctr import RUNC, Ctr, fresh_id
from tests.harness.messages import MESSAGES
from tests.harness.node import REPOSITORY

if TYPE_CHECKING:
    from tests.harness.node import Node

TOTAL_BYTES = 10**9 // CHUNK_BYTES * CHUNK_BYTES
_ROUNDS = 3
_HEADER = struct.Struct(">IIBB")
_RESPONSE = 2


def measure(node: Node) -> Iterator[Figure]:
    """1 GB of output, ours and runc's in turn."""
    ours: list[float] = []
    theirs: list[float] = []
    for _ in range(_ROUNDS):
        ours.append(measure_relay())
        theirs.append(_measure_runc(node))
    yield Figure(
        name="1 GB of output through the relay, by RPC",
        unit="MB/s",
        samples=ours,
        peer="runc's shim",
        peer_samples=theirs,
        aim=Aim(of="median", limit=600, at_least=True),
    )


def measure_relay() -> float:
    """Move the bytes through our relay once; return MB (10^6) a second."""
    with tempfile.TemporaryDirectory() as directory:
        fifo = Path(directory, "stdout")
        os.mkfifo(fifo)
        with _program("reader", str(fifo)) as reader, _program("relay", str(fifo)) as relay:
            assert relay.stdin is not None
            begin = time.perf_counter()
            relay.communicate(b"\n", timeout=60)
            received = int(reader.communicate(timeout=60)[0])
            took = time.perf_counter() - begin
    assert received == TOTAL_BYTES, received
    return received / 1e6 / took


def _measure_runc(node: Node) -> float:
    """Have a container of runc's write as much, and read what its shim copies into a fifo."""
    ctr, container, exec_id = Ctr(node, RUNC), fresh_id("relay-runc"), fresh_id("relay")
    inside = f"/run/{container}"
    os.mkfifo(node.path(inside))
    ctr.start(container, "sleep", "1000")
    try:
        with Tasks(node) as tasks, _program("reader", str(node.path(inside))) as reader:
            blocks = TOTAL_BYTES // CHUNK_BYTES
            command = ["dd", "if=/dev/zero", f"bs={CHUNK_BYTES}", f"count={blocks}"]
            tasks.exec(container, exec_id, command, stdout=inside, stderr="/dev/null")
            pending = tasks.wait_later(container, exec_id)
            begin = time.perf_counter()
            tasks.start(container, exec_id)
            pending.exit_status()
            tasks.delete_exec(container, exec_id)
            received = int(reader.communicate(timeout=60)[0])
            took = time.perf_counter() - begin
    finally:
        ctr.remove(container)
    assert received == TOTAL_BYTES, received
    return received / 1e6 / took


def _program(*arguments: str) -> subprocess.Popen[bytes]:
    """Start a part of the measurement as a process of its own, and wait until it is ready."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.bench.relay", *arguments],
        cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    process.stdout.readline()
    return process


def _read_fifo(path: str) -> None:
    """Count what comes through a fifo, to its end."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    print("ready", flush=True)
    os.set_blocking(descriptor, True)
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    poll.poll()  # until the first writer's first byte: before it, a read says end of file
    total = 0
    buffer = bytearray(1 << 20)
    while size := os.readv(descriptor, [buffer]):
        total += size
    print(total, flush=True)


def _serve_stream(connection: socket.socket) -> None:
    """Answer stdio reads on a ttrpc connection: the bytes as stdout, no stderr."""
    length = CHUNK_BYTES
    varint = bytes(
        (length >> shift & 0x7F) | (0x80 if length >> shift + 7 else 0)
        for shift in range(0, 21, 7)
        if length >> shift
    )
    # ReadStreamResponse { bytes data = 1; }
    data = b"\x0a" + varint + b"x" * length
    full = MESSAGES["TtrpcResponse"](payload=data).SerializeToString()
    left = TOTAL_BYTES
    reader = connection.makefile("rb")
    while header := reader.read(_HEADER.size):
        size, stream, _, _ = _HEADER.unpack(header)
        request = reader.read(size)
        answer = b""
        if left > 0 and b"ReadStdout" in request:
            answer, left = full, left - length
        connection.sendall(_HEADER.pack(len(answer), stream, _RESPONSE, 0) + answer)


class _LocalGuest:
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


async def _relay(connection: socket.socket, fifo: str) -> None:
    connection.setblocking(False)
    agent = AgentClient(connection)
    async with trio.open_nursery() as nursery:
        await nursery.start(agent.run)
        plan = parse_stdio("", fifo, "", terminal=False)
        await Relay(plan, await open_stdio(plan, _no_logger), _LocalGuest(agent)).run()
        agent.close()


def _run_relay(fifo: str) -> None:
    heap.keep_chunks()  # as in a shim
    ours, theirs = socket.socketpair()
    if os.fork() == 0:
        ours.close()
        _serve_stream(theirs)
        os._exit(0)
    theirs.close()
    print("ready", flush=True)
    sys.stdin.readline()
    trio.run(_relay, ours, fifo)


if __name__ == "__main__":
    {"reader": _read_fifo, "relay": _run_relay}[sys.argv[1]](sys.argv[2])
