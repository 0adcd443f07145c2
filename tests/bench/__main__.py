"""Measure, print the table, write build/bench/figures.json and figures.svg.

    python -m tests.bench [FIRST WORDS OF A STEP'S NAME …]
"""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.bench import bare_guest, relay
from tests.bench.containers import (
    agent_rss_mib,
    memory_mib,
    run_execs,
    shim_numbers,
    shim_socket,
    time_run,
    time_states,
    timelines,
)
from tests.bench.figures import Figure, as_json, as_table, median, percentile, spread
from tests.bench.picture import as_svg
from tests.harness.containerd_daemon import find_containerd
from tests.harness.ctr import KATA, RUNC, Ctr
from tests.harness.node import BUILD, REPOSITORY, Node
from tests.harness.parts import find_shims

_STARTS, _BOOTS, _RUNS, _EXECS, _STATES = 15, 5, 5, 15, 5000
_RUNC_SHIM = "runc's shim"


class Bench:
    """One run: a node with Debian's containerd, and the figures so far."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.kata, self.runc = Ctr(node, KATA), Ctr(node, RUNC)

    def start(self) -> list[Figure]:
        """`start` as containerd calls it, and the first answer."""
        # By turns, so that both see the same load of the machine; the first pair only warms.
        times: dict[str, list[tuple[float, float]]] = {"kata": [], "runc": []}
        for _ in range(_STARTS + 1):
            for name, found in times.items():
                found.append(self._start_once(f"containerd-shim-{name}-v2"))
        columns = {name: list(zip(*found[1:], strict=True)) for name, found in times.items()}
        return [
            Figure(name="start to address", value=median(columns["kata"][0]), unit="ms", reach=15,
                   peer=median(columns["runc"][0]), peer_name=_RUNC_SHIM,
                   note=spread(columns["kata"][0], "ms")),
            Figure(name="address to first RPC", value=median(columns["kata"][1]), unit="ms",
                   reach=100, peer=median(columns["runc"][1]), peer_name=_RUNC_SHIM,
                   note=spread(columns["kata"][1], "ms")),
        ]

    def _start_once(self, binary: str) -> tuple[float, float]:
        done = subprocess.run(
            self.node.argv([sys.executable, "-m", "tests.bench.starting", binary, "1"]),
            env=self.node.environment({"PYTHONPATH": str(REPOSITORY)}), check=True,
            capture_output=True, text=True, timeout=60)
        first, second = done.stdout.strip().strip("[]").split(",")
        return float(first), float(second)

    def running(self) -> list[Figure]:
        """State, memory and execs of one container that runs, and the same of runc's shim."""
        state = self._running(self.runc, "peer")
        mine = self._running(self.kata, "mine")
        return [
            Figure(name="State p50", value=mine["p50"], unit="µs", reach=80, peer=state["p50"],
                   peer_name=_RUNC_SHIM),
            Figure(name="State p99", value=mine["p99"], unit="µs", reach=300, peer=state["p99"],
                   peer_name=_RUNC_SHIM),
            Figure(name="shim PSS after 1000 calls and a collection", value=mine["pss"],
                   unit="MiB", reach=30, peer=state["pss"], peer_name=_RUNC_SHIM),
            Figure(name="shim USS after 1000 calls and a collection", value=mine["uss"],
                   unit="MiB", peer=state["uss"], peer_name=_RUNC_SHIM),
            Figure(name="agent RSS, one container", value=mine["agent"], unit="MiB", reach=2),
            Figure(name="200 execs: shim fds", value=mine["grown fds"], unit="more", reach=0.5),
            Figure(name="200 execs: shim RSS", value=mine["grown rss"], unit="KiB more",
                   reach=1024),
            Figure(name="200 execs: agent RSS", value=mine["grown agent"], unit="KiB more",
                   reach=128),
            Figure(name="exec by containerd's API", value=mine["exec"], unit="ms",
                   peer=state["exec"], peer_name="runc", note=f"median of {_EXECS}"),
        ]

    def _running(self, ctr: Ctr, container: str) -> dict[str, float]:
        ctr.start(container, "sleep", "1000")
        path = shim_socket(self.node, container)
        time_states(path, container, 500)
        times = time_states(path, container, _STATES)
        found = {"p50": median(times) * 1e6, "p99": percentile(times, 0.99) * 1e6}
        found["exec"] = median(run_execs(ctr, container, _EXECS)) * 1000
        shim, = find_shims(ctr)
        if ctr.runtime == KATA:
            # Collects garbage. Answered calls tell that the signal was seen.
            self.node.signal(shim.pid, signal.SIGUSR1.name.removeprefix("SIG"))
            time_states(path, container, 10)
            found["agent"] = agent_rss_mib(self.node)
        found["pss"], found["uss"] = memory_mib(shim.directory)
        if ctr.runtime == KATA:
            found |= self._growth(container)
        ctr.remove(container)
        return found

    def _growth(self, container: str) -> dict[str, float]:
        run_execs(self.kata, container, 20)
        before, agent = shim_numbers(self.kata), agent_rss_mib(self.node)
        run_execs(self.kata, container, 200)
        after = shim_numbers(self.kata)
        return {"grown fds": after["shim fds"] - before["shim fds"],
                "grown rss": max(0, after["shim RSS KiB"] - before["shim RSS KiB"]),
                "grown agent": max(0.0, agent_rss_mib(self.node) - agent) * 1024}

    def boot(self) -> list[Figure]:
        """The boot against the bare recipe by turns; `ctr run` against the boot and runc."""
        bare, runs, peers = [], [], []
        with tempfile.TemporaryDirectory() as directory:
            initrd = bare_guest.build_initrd(Path(directory))
            for number in range(_BOOTS + 1):
                bare.append(bare_guest.time_boot(initrd))
                runs.append(time_run(self.kata, f"run{number}"))
                peers.append(time_run(self.runc, f"peer{number}"))
        phases = timelines(self.node)
        ready = [(phases[f"run{number}"]["agent_ready"] - phases[f"run{number}"]["launch"]) / 1000
                 for number in range(1, _BOOTS + 1)]
        return [
            Figure(name="launch to agent ready ÷ bare recipe", value=median(ready) /
                   median(bare[1:]), unit="", reach=1.25, peer=None,
                   note=f"{median(ready):.3f} s ÷ {median(bare[1:]):.3f} s, "
                   + spread(ready, "s")),
            Figure(name="ctr run of true ÷ launch to agent ready", value=median(runs[1:]) /
                   median(ready), unit="", reach=1.6, note=f"{median(runs[1:]):.3f} s"),
            Figure(name="ctr run of true", value=median(runs[1:]) * 1000, unit="ms",
                   peer=median(peers[1:]) * 1000, peer_name="runc",
                   note=spread(runs[1:], "ms", 1000)),
        ]

    def exec(self) -> list[Figure]:
        """`ctr task exec` of true."""
        values = {}
        for ctr in (self.kata, self.runc):
            container = f"exec-{ctr.runtime.split('.')[2]}"
            ctr.start(container, "sleep", "1000")
            times = []
            for _ in range(_EXECS):
                begin = time.perf_counter()
                assert ctr.exec(container, "true").returncode == 0
                times.append(time.perf_counter() - begin)
            values[ctr.runtime] = median(times) * 1000
            ctr.remove(container)
        return [Figure(name="ctr exec of true", value=values[KATA], unit="ms", peer=values[RUNC],
                       peer_name="runc", note=f"median of {_EXECS}")]

    def stdio(self) -> list[Figure]:
        """1 GiB through the shim's relay."""
        speeds = [relay.measure_mb_per_s() for _ in range(3)]
        return [Figure(name="stdio by RPC, local stream", value=median(speeds), unit="MB/s",
                       reach=600, at_least=True, note=spread(speeds, "MB/s"))]


def main() -> int:
    """Run the steps named on the command line, or all."""
    output = BUILD / "bench"
    output.mkdir(parents=True, exist_ok=True)
    figures: list[Figure] = []
    with Node(find_containerd(1), log_directory=output) as node:
        bench = Bench(node)
        steps: list[Callable[[], list[Figure]]] = [
            bench.start, bench.running, bench.boot, bench.exec, bench.stdio]
        wanted = tuple(sys.argv[1:])
        for step in steps:
            if not wanted or step.__name__.startswith(wanted):
                print(f"measuring: {(step.__doc__ or '').splitlines()[0]}", flush=True)
                figures += step()
    machine: dict[str, object] = {
        "cpus": os.cpu_count(), "kernel": platform.release(), "python": platform.python_version(),
        "time": time.strftime("%FT%TZ", time.gmtime())}
    (output / "figures.json").write_text(as_json(figures, machine))
    (output / "figures.svg").write_text(as_svg(figures, f"kata-shimv2, {machine['time']}"))
    print(f"\n{as_table(figures)}\n\nwritten: {output / 'figures.json'}, figures.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
