"""What is measured on containers that run: sizes, latencies, growth, and the boot."""

from __future__ import annotations

import json
import re
import socket
import struct
import time
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from agent_proto.client import AgentClient
from agent_proto.vsock import HybridVsock, dial
from tests.harness.containerd_api import Tasks
from tests.harness.messages import MESSAGES
from tests.harness.parts import find_shims

if TYPE_CHECKING:
    from tests.harness.ctr import Ctr
    from tests.harness.node import Node

_HEADER = struct.Struct(">IIBB")
_AGENT_PORT = 1024


def shim_socket(node: Node, container: str) -> Path:
    """Return where a container's shim listens, seen from outside of the node."""
    bundle = f"/run/containerd/io.containerd.runtime.v2.task/{node.name}/{container}"
    address = node.path(f"{bundle}/address").read_text().strip()
    return node.path(address.removeprefix("unix://"))


def time_states(path: Path, container: str, count: int) -> list[float]:
    """Call State `count` times on one connection; return seconds a call, sorted as they came.

    Frames are made beforehand and answers aren't decoded: the client's part stays small.
    """
    payload = MESSAGES["StateRequest"](id=container).SerializeToString()
    request = MESSAGES["TtrpcRequest"](service="containerd.task.v2.Task", method="State",
                                       payload=payload).SerializeToString()
    frames = [_HEADER.pack(len(request), 2 * n + 1, 1, 0) + request for n in range(count)]
    times = []
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(10)
        connection.connect(str(path))
        for frame in frames:
            begin = time.perf_counter()
            connection.sendall(frame)
            answer = connection.recv(65536)
            times.append(time.perf_counter() - begin)
            assert answer[8] == 2
    return times


def memory_mib(directory: Path) -> tuple[float, float]:
    """Return (PSS, USS) of a process in MiB."""
    rows = {row.split(":")[0]: row.split() for row in
            (directory / "smaps_rollup").read_text().splitlines()[1:]}
    private = sum(int(rows[key][1]) for key in ("Private_Clean", "Private_Dirty"))
    return int(rows["Pss"][1]) / 1024, private / 1024


def shim_numbers(ctr: Ctr) -> dict[str, int]:
    """Return fds and RSS of the only serving shim."""
    shim, = find_shims(ctr)
    status = (shim.directory / "status").read_text()
    found = re.search(r"VmRSS:\s+(\d+)", status)
    assert found is not None
    return {"shim fds": len(list((shim.directory / "fd").iterdir())),
            "shim RSS KiB": int(found[1])}


def agent_metrics(node: Node) -> dict[str, float]:
    """Ask the agent of the only sandbox for its own metrics, on a second connection."""
    directory, = (path for path in node.path("/run/kata").iterdir()
                  if (path / "vsock.sock").exists())

    async def ask() -> str:
        endpoint = HybridVsock(directory / "vsock.sock", _AGENT_PORT)
        agent = AgentClient(await dial(endpoint, timeout_s=5))
        async with trio.open_nursery() as nursery:
            await nursery.start(agent.run)
            text = await agent.get_metrics()
            agent.close()
        return text

    rows = (line.rpartition(" ") for line in trio.run(ask).splitlines()
            if line.startswith("kata_agent_"))
    return {name: float(value) for name, _, value in rows}


def agent_rss_mib(node: Node) -> float:
    return agent_metrics(node)['kata_agent_proc_status{item="vmrss"}'] / 1024


def run_execs(ctr: Ctr, container: str, count: int) -> list[float]:
    """Exec `true` again and again through containerd's API; return seconds each."""
    times = []
    with Tasks(ctr.node) as tasks:
        for number in range(count):
            begin = time.perf_counter()
            tasks.exec(container, f"b{number}", ["true"])
            waiting = tasks.wait_later(container, f"b{number}")
            tasks.start(container, f"b{number}")
            assert waiting.exit_status() == 0
            tasks.delete_exec(container, f"b{number}")
            times.append(time.perf_counter() - begin)
    return times


def time_run(ctr: Ctr, container: str) -> float:
    """Return the seconds of `ctr run --rm … true`."""
    begin = time.perf_counter()
    ctr.run(container, "true", check=True)
    return time.perf_counter() - begin


def timelines(node: Node) -> dict[str, dict[str, float]]:
    """Return the phases (milliseconds from the shim's start) that the shims have logged."""
    found = {}
    for line in node.containerd.log_path.read_text().splitlines():
        if '"sandbox timeline"' in line:
            entry = json.loads(line[line.index("{"):])
            found[entry["sandbox_id"]] = {
                key: float(value) for key, value in entry.items() if isinstance(value, float)}
    return found
