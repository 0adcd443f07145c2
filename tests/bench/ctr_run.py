"""Whole runs as a person sees them: `ctr run` and `ctr task exec`, against runc and a bare machine.

Every round does all of them in turn, so that load on the machine falls on each alike.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from tests.bench.bare_guest import BareRecipe
from tests.bench.figure import Aim, Figure, rounds
from tests.harness.ctr import KATA, RUNC, Ctr, fresh_id

if TYPE_CHECKING:
    from tests.harness.node import Node

_TIMELINE = "sandbox timeline"


def measure_runs(node: Node) -> Iterator[Figure]:
    """`ctr run` of `true` on both runtimes, and the bare recipe's boot between them."""
    ours: list[float] = []
    runc: list[float] = []
    bare: list[float] = []
    timelines: list[dict[str, float]] = []
    with BareRecipe() as recipe:
        for _ in rounds(12, 75):
            ours.append(_run_ms(Ctr(node, KATA)))
            bare.append(recipe.boot_ms())
            runc.append(_run_ms(Ctr(node, RUNC)))
        timelines = read_timelines(node)[-len(ours) :]
    ready = [line["agent_ready"] - line["launch"] for line in timelines]
    yield Figure(
        name="VMM launch → agent ready",
        unit="ms",
        samples=ready,
        peer="bare recipe",
        peer_samples=bare,
        aim=Aim(of="ratio", limit=1.25),
    )
    yield Figure(
        name="ctr run of true",
        unit="ms",
        samples=ours,
        peer="launch → ready",
        peer_samples=ready,
        aim=Aim(of="ratio", limit=1.6),
        note="; ".join(_phases(timelines, ours)),
    )
    yield Figure(name="ctr run of true", unit="ms", samples=ours, peer="runc", peer_samples=runc)


def measure_exec(node: Node) -> Iterator[Figure]:
    """`ctr task exec` of `true` in a running container of each runtime."""
    ours, theirs = Ctr(node, KATA), Ctr(node, RUNC)
    names = {KATA: fresh_id("exec-kata"), RUNC: fresh_id("exec-runc")}
    samples: dict[str, list[float]] = {KATA: [], RUNC: []}
    try:
        for ctr in (ours, theirs):
            ctr.start(names[ctr.runtime], "sleep", "1000")
        for _ in rounds(20, 20):
            for ctr in (ours, theirs):
                samples[ctr.runtime].append(_exec_ms(ctr, names[ctr.runtime]))
    finally:
        ours.remove(*names.values())
    yield Figure(
        name="ctr task exec of true",
        unit="ms",
        samples=samples[KATA],
        peer="runc",
        peer_samples=samples[RUNC],
    )


def _run_ms(ctr: Ctr) -> float:
    return _timed(lambda: ctr.run(fresh_id("bench"), "/bin/true"))


def _exec_ms(ctr: Ctr, container: str) -> float:
    return _timed(lambda: ctr.exec(container, "/bin/true"))


def _timed(action: Callable[[], Any]) -> float:
    started = time.perf_counter()
    done = action()
    took = (time.perf_counter() - started) * 1000
    assert done.returncode == 0, done.stderr
    return took


def read_timelines(node: Node) -> list[dict[str, float]]:
    """The timelines that shims wrote into containerd's log, in order."""
    found = []
    for line in node.containerd.log_path.read_text(errors="replace").splitlines():
        if _TIMELINE in line and "{" in line:
            record = json.loads(line[line.find("{") :])
            found.append({name: at for name, at in record.items() if isinstance(at, float)})
    return found


def _phases(timelines: list[dict[str, float]], walls: list[float]) -> Iterator[str]:
    """Where the time of a run goes: medians of what each phase took, in order."""
    order = sorted(timelines[-1], key=timelines[-1].__getitem__)
    before = ""
    for name in order:
        took = [line[name] - line.get(before, 0.0) for line in timelines if name in line]
        yield f"{name} +{statistics.median(took):.0f}"
        before = name
    last = order[-1]
    rest = [wall - line[last] for wall, line in zip(walls, timelines, strict=True) if last in line]
    yield f"the rest {statistics.median(rest):.0f} ms"
