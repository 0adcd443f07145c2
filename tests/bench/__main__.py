"""Runs the measurements named on the command line, or all; prints, and writes build/bench/.

    python -m tests.bench [GROUP …]     the groups' names are in GROUPS

Exits with 1 when something could not be measured; a figure that is not reached is no failure.
Medians of a busy machine say little: look at `uptime` first. Where it never is quiet, `chrt -r 1`
before the command gives the group `start` the machine for itself; the others make containers of
runc's, which it refuses to a real-time process.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from tests.bench import ctr_run, pods, relay, report, running, start, vmms, volumes
from tests.bench.picture import draw
from tests.harness.containerd_daemon import ContainerdMissing, find_containerd
from tests.harness.node import BUILD, Node

if TYPE_CHECKING:
    from tests.bench.figure import Figure

OUTPUT = BUILD / "bench"
GROUPS: dict[str, Callable[[Node], Iterator[Figure]]] = {
    "start": start.measure,
    "shim": running.measure_shim,
    "runs": ctr_run.measure_runs,
    "exec": ctr_run.measure_exec,
    "relay": relay.measure,
    "growth": running.measure_growth,
    "volumes": volumes.measure,
    "pods": pods.measure_ready,
    "network": pods.measure_network,
    "between": pods.measure_pod_to_pod,
    "cycles": pods.measure_cycles,
    "vmms": vmms.measure,
}


class Bench:
    """One run: what was measured, what could not be, and how busy the machine was."""

    def __init__(self) -> None:
        self.figures: list[Figure] = []
        self.failures: list[str] = []
        self.groups: list[dict[str, Any]] = []

    def measure(self, name: str) -> None:
        """Measure one group on a node of its own: a failure of one spoils no other."""
        load, begin = os.getloadavg()[0], time.monotonic()
        print(f"{name:8} …", end=" ", flush=True)
        try:
            with Node(find_containerd(1), log_directory=OUTPUT / "logs") as node:
                self.figures += GROUPS[name](node)
        except ContainerdMissing:
            raise
        except Exception as error:  # reported, and the exit status says it
            traceback.print_exc()
            self.failures.append(f"{name}: {error!r}")
        took = time.monotonic() - begin
        self.groups.append({"group": name, "took_s": round(took, 1), "load": round(load, 2)})
        print(f"{took:5.1f} s, load {load:.1f}", flush=True)

    def write(self) -> None:
        """Print the table and write the files."""
        print("\n" + "\n".join(report.table(self.figures)) + "\n")
        for figure in self.figures:
            if figure.note:
                print(f"{figure.name}: {figure.note}")
        busiest = max((group["load"] for group in self.groups), default=0.0)
        if busiest > (os.cpu_count() or 1):
            print(
                f"The machine was busy (load {busiest:.1f}): times and their ratios are too long."
            )
        for failure in self.failures:
            print(f"not measured: {failure}", file=sys.stderr)
        text = report.as_json(self.figures, self.failures, self.groups)
        (OUTPUT / "bench.json").write_text(text)
        (OUTPUT / "bench.svg").write_text(draw(self.figures))
        print(f"\nwritten: {OUTPUT}/bench.json, bench.svg")


def main(names: list[str]) -> int:
    """Measure and report; return the exit status."""
    unknown = set(names) - set(GROUPS)
    if unknown or os.geteuid() != 0:
        print("make bench: needs root" if not unknown else __doc__, file=sys.stderr)
        return 2
    OUTPUT.mkdir(parents=True, exist_ok=True)
    bench = Bench()
    try:
        for name in names or GROUPS:
            bench.measure(name)
    except ContainerdMissing as missing:
        print(f"make bench: {missing}", file=sys.stderr)
        return 1
    bench.write()
    return 1 if bench.failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
