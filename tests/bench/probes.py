"""Looks at the parts of a running sandbox from outside: shim process, socket, agent."""

from __future__ import annotations

import json
import re
import signal
import socket
import struct
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from agent_proto.client import AgentClient
from agent_proto.vsock import HybridVsock, dial
from tests.harness.messages import MESSAGES
from tests.harness.parts import find_shims

if TYPE_CHECKING:
    from pathlib import Path

    from tests.harness.ctr import Ctr
    from tests.harness.node import Node, NodeProcess

_HEADER = struct.Struct(">IIBB")
_AGENT_PORT = 1024
_BUNDLES = "/run/containerd/io.containerd.runtime.v2.task"
_DUMP_S = 5.0


@dataclass(frozen=True, slots=True)
class Memory:
    """MiB: all that is mapped, shared pages in part (pss) and not at all (uss)."""

    pss: float
    uss: float


@dataclass(frozen=True, slots=True)
class Size:
    """What a process holds."""

    fds: int
    rss_kib: int


def shim_of(ctr: Ctr) -> NodeProcess:
    """The only serving shim of this runtime."""
    (shim,) = find_shims(ctr)
    return shim


def memory_of(directory: Path) -> Memory:
    """Of the process whose /proc entry this is. Source: proc(5) smaps_rollup."""
    rows = [row.split() for row in (directory / "smaps_rollup").read_text().splitlines()[1:]]
    sizes = {row[0].rstrip(":"): int(row[1]) for row in rows}
    private = sizes["Private_Clean"] + sizes["Private_Dirty"]
    return Memory(sizes["Pss"] / 1024, private / 1024)


def shim_size(directory: Path) -> Size:
    """Of the process whose /proc entry this is."""
    found = re.search(r"VmRSS:\s+(\d+)", (directory / "status").read_text())
    assert found is not None
    return Size(len(list((directory / "fd").iterdir())), int(found[1]))


def call_state(node: Node, container: str, count: int) -> list[float]:
    """Call State on one connection, one call after the other; microseconds each.

    Frames are made beforehand and answers aren't decoded: the client's part stays small.
    """
    payload = MESSAGES["StateRequest"](id=container).SerializeToString()
    request = MESSAGES["TtrpcRequest"](
        service="containerd.task.v2.Task", method="State", payload=payload
    ).SerializeToString()
    frames = [_HEADER.pack(len(request), 2 * n + 1, 1, 0) + request for n in range(count)]
    address = node.path(f"{_BUNDLES}/{node.name}/{container}/address").read_text().strip()
    took = []
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(10)
        connection.connect(str(node.path(address.removeprefix("unix://"))))
        for frame in frames:
            begin = time.perf_counter_ns()
            connection.sendall(frame)
            answer = connection.recv(65536)
            took.append((time.perf_counter_ns() - begin) / 1000)
            assert _HEADER.unpack_from(answer)[0] == len(answer) - _HEADER.size
    return took


def collect_garbage(node: Node, container: str) -> int:
    """Have the shim collect its garbage and log its tasks (SIGUSR1); return their number."""
    (shim,) = node.find(f"-id {container} start")
    start = node.containerd.log_path.stat().st_size
    node.signal(shim.pid, signal.SIGUSR1.name.removeprefix("SIG"))
    deadline = time.monotonic() + _DUMP_S
    while True:
        with node.containerd.log_path.open("rb") as log:
            log.seek(start)
            lines = log.read().decode(errors="replace").splitlines()
        found = [line for line in lines if '"event": "task"' in line or '"event":"task"' in line]
        # The dump is one burst; the task that writes it is the signal watcher, so a call that is
        # answered after a line of it was seen comes after its last line.
        if found:
            call_state(node, container, 1)
            return _count_tasks(node.containerd.log_path, start)
        if time.monotonic() > deadline:
            raise TimeoutError("the shim did not log its tasks")
        time.sleep(0.01)  # a log file has no event for its readers


def _count_tasks(log_path: Path, start: int) -> int:
    time.sleep(0.1)  # containerd copies the shim's log by itself
    with log_path.open("rb") as log:
        log.seek(start)
        lines = log.read().decode(errors="replace").splitlines()
    records = (json.loads(line[line.find("{") :]) for line in lines if line.count("{") == 1)
    return sum(record.get("event") == "task" for record in records)


def agent_metrics(node: Node) -> dict[str, float]:
    """Ask the agent of the node's only sandbox for its metrics, on a connection of our own."""
    (directory,) = (
        path for path in node.path("/run/kata").iterdir() if (path / "vsock.sock").exists()
    )

    async def ask() -> str:
        endpoint = HybridVsock(directory / "vsock.sock", _AGENT_PORT)
        agent = AgentClient(await dial(endpoint, timeout_s=5))
        async with trio.open_nursery() as nursery:
            await nursery.start(agent.run)
            text = await agent.get_metrics()
            agent.close()
        return text

    rows = (line.rpartition(" ") for line in trio.run(ask).splitlines() if line[:1] != "#")
    return {name: float(value) for name, _, value in rows}
