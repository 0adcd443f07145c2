"""A shim's sandbox in a pod's network namespace: a real one with a real veth, a VMM of straw."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from hypervisors.errors import LaunchFailed
from hypervisors.machine import NetDevice
from shimv2.config import AgentConfig, RuntimeConfig
from shimv2.journal import read
from tests.fakes.fake_process import SLEEP
from tests.netns.pod import NEEDS_TAPS, OUTSIDE, POD, ROUTES, Holder
from tests.shimv2.shim_bench import ShimBench, refusal, spec
from ttrpc import Code

pytestmark = NEEDS_TAPS


@pytest.fixture
def pod() -> Iterator[Holder]:
    """A pod with one veth; it must be as before when the shim is done with it."""
    made, outside = Holder(), Holder()
    made.run(POD.format(outside=outside.pid))
    outside.run(OUTSIDE)
    made.run(ROUTES)
    before = made.everything()
    yield made
    assert made.everything() == before
    made.close()
    outside.close()


def spec_in(pod: Holder) -> dict[str, Any]:
    namespaces = [{"type": "pid"}, {"type": "network", "path": str(pod.path)}]
    return spec(linux={"namespaces": namespaces})


def network_of(shim: ShimBench) -> list[NetDevice]:
    return [device for device in shim.machine.spec.devices if isinstance(device, NetDevice)]


def taps() -> int:
    """Count the descriptors of taps that this process holds."""
    links = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{fd}"))
        except FileNotFoundError:
            continue
    return links.count("/dev/net/tun")


async def test_vmm_gets_the_tap_and_the_guest_the_addresses_before_its_containers(
    tmp_path: Path, pod: Holder
) -> None:
    async with ShimBench(tmp_path).running() as shim:
        shim.agent.program(SLEEP)
        await shim.run(config=spec_in(pod))
        (device,) = network_of(shim)
        assert (device.mac, device.mtu, len(device.tap_fds)) == ("02:00:00:00:00:07", 1450, 1)
        assert taps() == 1  # the machine's
        (told,) = shim.agent.called("UpdateInterface")
        assert told.interface.name == "eth0"
        assert {address.address for address in told.interface.IPAddresses} >= {"10.9.0.2"}
        order = [method for method, _ in shim.agent.requests]
        for told_before in ("UpdateInterface", "UpdateRoutes", "AddARPNeighbors", "CreateSandbox"):
            assert order.index(told_before) < order.index("CreateContainer")
        held = [entry.kind for entry in read(shim.state_dir.journal)[1]]
        assert held.count("network") == 1
        assert "mirred" in pod.run("tc filter show dev eth0 ingress")


async def test_agent_that_does_not_report_is_told_one_thing_after_the_other(
    tmp_path: Path, pod: Holder
) -> None:
    config = RuntimeConfig(agent=AgentConfig(readiness="dial"))
    async with ShimBench(tmp_path, config).running() as shim:
        shim.agent_reports = False
        shim.agent.program(SLEEP)
        shim.agent.fail("UpdateInterface", Code.INTERNAL, "of another maker")
        assert "of another maker" in str(await refusal(shim.create(config=spec_in(pod))))
        assert shim.agent.called("UpdateRoutes") == []


async def test_death_of_the_vmm_undoes_the_wiring_before_delete(
    tmp_path: Path, pod: Holder
) -> None:
    before = pod.everything()
    async with ShimBench(tmp_path).running() as shim:
        shim.agent.program(SLEEP)
        await shim.run(config=spec_in(pod))
        assert pod.everything() != before
        shim.machine.die()
        assert (await shim.wait()).exit_status == 137
        with trio.fail_after(10):
            await shim.until(
                lambda: all(e.kind != "network" for e in read(shim.state_dir.journal)[1])
            )
        assert pod.everything() == before


async def test_launch_that_fails_leaves_no_tap(tmp_path: Path, pod: Holder) -> None:
    async with ShimBench(tmp_path).running() as shim:
        shim.hypervisor.launch_error = LaunchFailed("qemu", "was killed by SIGKILL", [])
        assert "qemu" in str(await refusal(shim.create(config=spec_in(pod))))
        assert taps() == 0


async def test_agent_that_refuses_an_address_fails_the_creation(
    tmp_path: Path, pod: Holder
) -> None:
    async with ShimBench(tmp_path).running() as shim:
        shim.agent.fail("UpdateInterface", Code.INVALID_ARGUMENT, "no such device")
        assert "no such device" in str(await refusal(shim.create(config=spec_in(pod))))
        assert shim.agent.called("CreateContainer") == []


async def test_namespace_that_is_gone_is_refused_with_its_path(tmp_path: Path) -> None:
    async with ShimBench(tmp_path).running() as shim:
        missing = {"namespaces": [{"type": "network", "path": str(tmp_path / "gone")}]}
        error = await refusal(shim.create(config=spec(linux=missing)))
        assert error.code == Code.FAILED_PRECONDITION
        assert str(tmp_path / "gone") in str(error)
        assert shim.hypervisor.machines == []
