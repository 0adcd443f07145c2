"""Pods over CRI as kubelet makes them: until one is ready, what its network costs, many in a row.

Each round does ours and runc's in turn, on the same CNI network.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from tests.bench.ctr_run import read_timelines
from tests.bench.figure import Aim, Figure, rounds
from tests.bench.probes import call_state, collect_garbage, memory_of, shim_of
from tests.harness.crictl import Crictl
from tests.harness.ctr import KATA, Ctr, fresh_id
from tests.harness.leaks import take_snapshot, wait_for_no_leaks

if TYPE_CHECKING:
    from tests.harness.node import Node

_CYCLES, _AT_A_TIME, _CONTAINERS = 50, 4, 3
_SLEEP = ("sleep", "1000")
_SETTLE_S = 30.0
_NETWORK = "ktbench"
_WITH_NETWORK = ("--with-ns", f"network:/run/netns/{_NETWORK}")
_MAKE_NETWORK = f"""
ip netns add {_NETWORK}
ip link add ktpeer type veth peer name eth0 netns {_NETWORK}
ip -n {_NETWORK} addr add 10.77.0.2/24 dev eth0
ip -n {_NETWORK} link set eth0 up
ip -n {_NETWORK} route add default via 10.77.0.1
"""
_Millis = dict[str, list[float]]


def measure_ready(node: Node) -> Iterator[Figure]:
    """RunPodSandbox, CreateContainer and StartContainer of a pod with a network."""
    ours, runc = Crictl(node, "kata"), Crictl(node, "runc")
    walls: _Millis = defaultdict(list)
    for _ in rounds(8, 60):
        for crictl in (ours, runc):
            begin = time.perf_counter()
            crictl.run(crictl.run_pod(), *_SLEEP)
            walls[crictl.handler].append((time.perf_counter() - begin) * 1000)
            crictl.remove_all()
    marks = read_timelines(node)[-len(walls["kata"]) :]
    ready = [line["agent_ready"] - line["launch"] for line in marks]
    yield Figure(
        name="pod ready: RunPodSandbox and one container",
        unit="ms",
        samples=walls["kata"],
        peer="launch → ready",
        peer_samples=ready,
        aim=Aim(of="ratio", limit=1.5),
    )
    yield Figure(
        name="pod ready: RunPodSandbox and one container",
        unit="ms",
        samples=walls["kata"],
        peer="runc",
        peer_samples=walls["runc"],
    )


def measure_network(node: Node) -> Iterator[Figure]:
    """What a network costs: a container's sandbox that has one beside one that has none."""
    ctr = Ctr(node, KATA)
    node.run(["sh", "-ec", _MAKE_NETWORK])
    grown, took = [], []
    for _ in rounds(5, 60):
        uss = [_shim_uss(ctr, *options) for options in ((), _WITH_NETWORK)]
        grown.append(uss[1] - uss[0])
        without, having = (_set_up_ms(marks) for marks in read_timelines(node)[-2:])
        took.append(having - without)
    yield Figure(
        name="a pod's network: time until the guest is set up",
        unit="ms",
        samples=took,
        aim=Aim(of="median", limit=60),
        note="more than without one; the wiring on the host goes on beside the boot",
    )
    yield Figure(
        name="a pod's network: shim USS", unit="MiB", samples=grown, aim=Aim(of="median", limit=2)
    )


def _set_up_ms(marks: dict[str, float]) -> float:
    """What the boot waits for, and what follows it until containers can be made."""
    return marks["launch"] - marks["prepared"] + marks["sandbox"] - marks["agent_connected"]


def _shim_uss(ctr: Ctr, *options: str) -> float:
    container = fresh_id("memory")
    ctr.start(container, *_SLEEP, options=options)
    call_state(ctr.node, container, 100)
    collect_garbage(ctr.node, container)
    uss = memory_of(shim_of(ctr).directory).uss
    ctr.remove(container)
    return uss


def measure_cycles(node: Node) -> Iterator[Figure]:
    """Pods of three containers, four at a time: how long each phase takes; nothing may be left."""
    crictl = Crictl(node)
    _cycle(crictl)  # what the first pod of a node makes for all that follow
    before = take_snapshot(node, [node.containerd.pid])
    with ThreadPoolExecutor(_AT_A_TIME) as pool:
        cycles = list(pool.map(_cycle, [crictl] * _CYCLES))
    leaks = wait_for_no_leaks(node, before, deadline_s=_SETTLE_S)
    assert not leaks, "\n".join(map(str, leaks))
    for phase in cycles[0]:
        samples = [cycle[phase] for cycle in cycles]
        yield Figure(
            name=f"{_CYCLES} pods of {_CONTAINERS}, {_AT_A_TIME} at a time: {phase}",
            unit="ms",
            samples=samples,
        )


def _cycle(crictl: Crictl) -> dict[str, float]:
    took: dict[str, float] = {}

    def timed(phase: str, action: Callable[[], object]) -> None:
        begin = time.perf_counter()
        action()
        took[phase] = (time.perf_counter() - begin) * 1000

    made: list[str] = []
    containers: list[str] = []
    timed("RunPodSandbox", lambda: made.append(crictl.run_pod()))
    (pod,) = made
    create = [lambda: crictl.create(pod, *_SLEEP)] * _CONTAINERS
    timed("3 CreateContainer", lambda: containers.extend(make() for make in create))
    timed("3 StartContainer", lambda: crictl.call("start", *containers))
    timed("3 StopContainer", lambda: crictl.call("stop", "-t", "5", *containers))
    timed("StopPodSandbox", lambda: crictl.call("stopp", pod))
    timed("RemovePodSandbox", lambda: crictl.remove_pod(pod))
    return took


_PINGS = 50
_MIB = {"kata": 32, "runc": 256}  # some seconds each


def measure_pod_to_pod(node: Node) -> Iterator[Figure]:
    """Round trips and bulk data between two pods on the same bridge."""
    trips: _Millis = {}
    rates: _Millis = {}
    for crictl in (Crictl(node, "kata"), Crictl(node, "runc")):
        server_pod = crictl.run_pod()
        crictl.run(server_pod, "nc", "-ll", "-p", "5000", "-e", "wc", "-c")
        client = crictl.run(crictl.run_pod(), *_SLEEP)
        address = crictl.addresses(server_pod)[0]
        trips[crictl.handler] = _round_trips(crictl, client, address)
        rates[crictl.handler] = [_rate(crictl, client, address) for _ in range(2)]
        crictl.remove_all()
    yield Figure(
        name="round trip between two pods",
        unit="µs",
        samples=trips["kata"],
        peer="runc",
        peer_samples=trips["runc"],
    )
    yield Figure(
        name="TCP from pod to pod",
        unit="MB/s",
        samples=rates["kata"],
        peer="runc",
        peer_samples=rates["runc"],
    )


def _round_trips(crictl: Crictl, client: str, address: str) -> list[float]:
    shown = crictl.output(client, "ping", "-c", str(_PINGS), "-i", "0.05", address)
    found = [line.partition("time=")[2] for line in shown.splitlines() if "time=" in line]
    assert len(found) > _PINGS / 2, shown
    return [float(text.split()[0]) * 1000 for text in found]


def _rate(crictl: Crictl, client: str, address: str) -> float:
    mib = _MIB[crictl.handler]
    script = f"time sh -c 'dd if=/dev/zero bs=1M count={mib} 2>/dev/null | nc {address} 5000'"
    shown = crictl.exec(client, "sh", "-c", script)
    assert shown.stdout.split() == [str(mib << 20)], "the other side counts the bytes"
    (real,) = (line for line in shown.stderr.splitlines() if line.startswith("real"))
    minutes, _, seconds = real.split(maxsplit=1)[1].partition("m")
    return mib * 1.048576 / (float(minutes) * 60 + float(seconds.rstrip("s")))
