"""One running container: latency of State, memory on both sides, growth over many execs."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tests.bench.figure import Aim, Figure, rounds
from tests.bench.probes import (
    Memory,
    agent_metrics,
    call_state,
    collect_garbage,
    memory_of,
    shim_of,
    shim_size,
)
from tests.harness.containerd_api import Tasks
from tests.harness.ctr import KATA, RUNC, Ctr, fresh_id

if TYPE_CHECKING:
    from tests.harness.node import Node

_CALLS = 10_000
_WARM_EXECS, _EXECS, _EXECS_AT_A_TIME = 50, 200, 50
_GROWTH_BUDGET_S = 120.0
_RSS = 'kata_agent_proc_status{item="vmrss"}'
_PEER = "runc's shim"


@contextlib.contextmanager
def _running(ctr: Ctr) -> Iterator[str]:
    container = fresh_id("bench-" + ctr.runtime.split(".")[-2])
    ctr.start(container, "sleep", "1000")
    try:
        yield container
    finally:
        ctr.remove(container)


def measure_shim(node: Node) -> Iterator[Figure]:
    """State, then memory: 1000 calls and more have been answered, and garbage collected."""
    micros: dict[str, list[float]] = {}
    memory: dict[str, Memory] = {}
    for ctr in (Ctr(node, KATA), Ctr(node, RUNC)):
        with _running(ctr) as container:
            call_state(node, container, 1000)
            micros[ctr.runtime] = call_state(node, container, _CALLS)
            if ctr.runtime == KATA:
                collect_garbage(node, container)
                agent = agent_metrics(node)
            memory[ctr.runtime] = memory_of(shim_of(ctr).directory)
    for of, limit in (("median", 80), ("p99", 300)):
        yield Figure(
            name=f"State RPC {'p50' if of == 'median' else of}",
            unit="µs",
            samples=micros[KATA],
            peer=_PEER,
            peer_samples=micros[RUNC],
            aim=Aim(of="median" if of == "median" else "p99", limit=limit),
        )
    for kind, aim in (("pss", Aim(of="median", limit=30)), ("uss", None)):
        yield Figure(
            name=f"shim {kind.upper()} after 1000 calls and gc",
            unit="MiB",
            samples=[getattr(memory[KATA], kind)],
            peer=_PEER,
            peer_samples=[getattr(memory[RUNC], kind)],
            aim=aim,
        )
    yield Figure(
        name="agent RSS, one container running",
        unit="MiB",
        samples=[agent[_RSS] / 1024],
        aim=Aim(of="median", limit=2),
    )


def measure_growth(node: Node) -> Iterator[Figure]:
    """Execs in a row; what both sides hold is read after every 50, and must not rise.

    The first 50 aren't counted: in them allocators and caches take what they go on to use.
    """
    ctr = Ctr(node, KATA)
    sizes: list[dict[str, float]] = []
    took: list[float] = []
    with _running(ctr) as container, Tasks(node) as tasks, _drained_fifo(node) as fifo:
        took += _exec_often(tasks, container, fifo, _WARM_EXECS)
        sizes.append(_sizes(ctr, container))
        for _ in rounds(_EXECS // _EXECS_AT_A_TIME, _GROWTH_BUDGET_S, least=1):
            took += _exec_often(tasks, container, fifo, _EXECS_AT_A_TIME)
            sizes.append(_sizes(ctr, container))
    first, last = sizes[0], sizes[-1]
    limits = {"shim fds": 0, "shim tasks": 0, "shim RSS": 256}
    limits |= {"agent fds": 0, "agent threads": 0, "agent RSS": 128}
    for name, limit in limits.items():
        yield Figure(
            name=f"{len(took) - _WARM_EXECS} execs: {name} grew by",
            unit="KiB" if name.endswith("RSS") else "",
            samples=[last[name] - first[name]],
            aim=Aim(of="median", limit=limit),
            note=" → ".join(f"{size[name]:.0f}" for size in sizes),
        )
    yield Figure(name="exec by containerd's API, with output", unit="ms", samples=took)


def _sizes(ctr: Ctr, container: str) -> dict[str, float]:
    tasks = collect_garbage(ctr.node, container)
    shim = shim_size(shim_of(ctr).directory)
    agent = agent_metrics(ctr.node)
    return {
        "shim fds": shim.fds,
        "shim tasks": tasks,
        "shim RSS": shim.rss_kib,
        "agent fds": agent["kata_agent_open_fds"],
        "agent threads": agent["kata_agent_threads"],
        "agent RSS": agent[_RSS],
    }


def _exec_often(tasks: Tasks, container: str, fifo: str, count: int) -> list[float]:
    took = []
    for _ in range(count):
        name = fresh_id("often")
        begin = time.perf_counter()
        tasks.exec(container, name, ["/bin/true"], stdout=fifo, stderr=fifo)
        pending = tasks.wait_later(container, name)
        tasks.start(container, name)
        assert pending.exit_status() == 0
        tasks.delete_exec(container, name)
        took.append((time.perf_counter() - begin) * 1000)
    return took


@contextlib.contextmanager
def _drained_fifo(node: Node) -> Iterator[str]:
    """A fifo of the node that nobody writes much into; held open so that it has a reader."""
    inside = f"/run/{fresh_id('bench-fifo')}"
    path: Path = node.path(inside)
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        yield inside
    finally:
        os.close(reader)
        path.unlink()
