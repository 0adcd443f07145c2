"""The VMMs that are here, beside each other: to a ready agent, in memory, and what is plugged.

A VMM joins by being one of `vmm.SETUPS` with a configuration of its own (`make shim` makes it).
Those that can't run here are named with the reason.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

import trio

from hypervisors.machine import BlockDevice, GuestAddress, MachineSpec, NetDevice, Rng
from hypervisors.registry import find_hypervisor
from tests.bench.ctr_run import read_timelines
from tests.bench.figure import Figure, rounds
from tests.bench.probes import memory_of
from tests.harness import vmm
from tests.harness.configuration import runtimes
from tests.harness.ctr import Ctr, fresh_id
from tests.harness.node import BUILD
from tests.harness.parts import VIRTIOFSD, VSOCK, find_one, find_parts
from tests.harness.patience import patient
from tests.hypervisors import machines, scratch_guest

if TYPE_CHECKING:
    from hypervisors.base import VirtualMachine
    from hypervisors.machine import Capabilities
    from tests.harness.node import Node

_BASE: Final = "qemu"
_ROUNDS, _BUDGET_S = 5, 90.0
_PLUG_ROUNDS, _PLUG_BUDGET_S = 3, 45.0
_MAC: Final = "02:00:00:00:00:07"
_Samples = dict[str, list[float]]


def measure(node: Node) -> Iterator[Figure]:
    """All figures of all VMMs; beside each is QEMU's q35."""
    here = {}
    for setup, runtime in runtimes(BUILD / "etc").items():
        if why := vmm.missing(setup):
            print(f"\n  left out: {why}", end=" ")
        else:
            here[setup] = Ctr(node, runtime)
    yield from _figures("launch → agent ready", "ms", _ready(here))
    yield from _figures("PSS of the VMM, one container", "MiB", _memory(here, []))
    yield from _figures("PSS with its daemons", "MiB", _memory(here, [VIRTIOFSD, VSOCK]))
    plugged: dict[str, _Samples] = defaultdict(dict)
    for setup in here:
        with tempfile.TemporaryDirectory(prefix="kata-vmms-") as name:
            for what, took in _plug(setup, Path(name)).items():
                plugged[what][setup] = took
    for what, by_setup in plugged.items():
        yield from _figures(what, "ms", by_setup)


def _figures(what: str, unit: str, by_setup: _Samples) -> Iterator[Figure]:
    for setup, samples in by_setup.items():
        peer = by_setup.get(_BASE, []) if setup != _BASE else []
        yield Figure(
            name=f"{setup}: {what}",
            unit=unit,
            samples=samples,
            peer=_BASE if peer else "",
            peer_samples=peer,
        )


def _ready(here: dict[str, Ctr]) -> _Samples:
    """From the VMM's launch to the agent's report, by the shims' own marks; each VMM in turn."""
    took: _Samples = defaultdict(list)
    for _ in rounds(_ROUNDS, _BUDGET_S, least=1):
        for setup, ctr in here.items():
            ctr.run(fresh_id("vmm"), "/bin/true", check=True, timeout_s=patient(60))
            marks = read_timelines(ctr.node)[-1]
            # The agent of a very slow machine is dialled before it reports.
            ready = marks.get("agent_ready", marks["agent_connected"])
            took[setup].append(ready - marks["launch"])
    return took


def _memory(here: dict[str, Ctr], daemons: list[str]) -> _Samples:
    """Of the VMM's process, and of those daemons of its that it has."""
    found: _Samples = {}
    for setup, ctr in here.items():
        container = fresh_id("vmm")
        ctr.start(container, "sleep", "1000")
        ctr.exec(container, "true", check=True)
        parts = [find_one(ctr.node, vmm.process_name(setup.partition(":")[0]))]
        for name in daemons:
            parts += find_parts(ctr.node, name)
        found[setup] = [sum(memory_of(part.directory).pss for part in parts)]
        ctr.remove(container)
    return found


def _plug(setup: str, directory: Path) -> _Samples:
    """From the order to the guest's having it, on a machine without containers; one of each a boot.

    The guest looks every 50 ms.
    """
    directory.chmod(0o755)
    disk = directory / "disk"
    disk.write_bytes(bytes(1 << 20))
    disk.chmod(0o666)
    spec = _specification(setup, directory, scratch_guest.write_initrd(directory / "initrd.img"))
    took: _Samples = defaultdict(list)
    for _ in rounds(_PLUG_ROUNDS, _PLUG_BUDGET_S, least=1):
        trio.run(_plug_once, setup, spec, disk, took)
    return took


async def _plug_once(setup: str, spec: MachineSpec, disk: Path, took: _Samples) -> None:
    name = setup.partition(":")[0]
    can = find_hypervisor(name).capabilities(spec)
    if can.block_hotplug or can.net_hotplug or can.vcpu_hotplug or can.memory_hotplug:
        async with machines.running(name, spec, []) as machine:
            await machines.says(machine, "GUEST-READY")
            await machines.says(machine, "cpus=1")
            await _plug_each(machine, can, disk, took)


async def _plug_each(
    machine: VirtualMachine, can: Capabilities, disk: Path, took: _Samples
) -> None:
    async def timed(what: str, order: Callable[[], Awaitable[object]], needle: str) -> None:
        begin = time.perf_counter()
        got = await order()
        seen = machines.disk_at(got) if isinstance(got, GuestAddress) and not needle else needle
        await machines.says(machine, seen)
        took[what].append((time.perf_counter() - begin) * 1000)

    if can.block_hotplug:
        device = BlockDevice(id="disk", path=disk, read_only=True)
        await timed("disk plugged", lambda: machine.attach(device), "")
    if can.net_hotplug:
        tap = machines.make_tap_elsewhere()
        net = NetDevice(id="net", mac=_MAC, tap_fds=(tap,), mtu=1500)
        await timed("interface plugged", lambda: machine.attach(net), f"nets=[ {_MAC} ]")
        os.close(tap)
    if can.vcpu_hotplug:
        await timed("vCPU plugged", lambda: machine.resize_vcpus(2), "cpus=2")
    if can.memory_hotplug:
        await timed("256 MiB plugged", lambda: machine.resize_memory(512), "mem128=3.")


def _specification(setup: str, directory: Path, initrd: Path) -> MachineSpec:
    """A machine of 256 MiB with room for one of each."""
    return MachineSpec(
        id="bench",
        kernel=scratch_guest.KERNEL,
        initrd=initrd,
        cmdline="",
        vcpus=1,
        max_vcpus=2,
        memory_mib=256,
        max_memory_mib=1024,
        run_dir=directory,
        devices=(Rng(),),
        hotplug_ports=2,
        **vmm.fields_of(setup),
    )
