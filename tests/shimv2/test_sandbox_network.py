"""A sandbox's network: real namespaces and taps, an agent and a VMM that only listen."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from agent_proto.errors import AgentError, AgentUnreachable
from hypervisors.errors import HypervisorError
from hypervisors.machine import GuestAddress, NetDevice
from netns.errors import HostNamespace, KernelRefused, UnsupportedLink
from netns.network import PodNetwork
from shimv2.config import RuntimeConfig
from shimv2.errors import FailedPrecondition
from shimv2.journal import Journal, read, replay
from shimv2.sandbox_network import SandboxNetwork, namespace_path
from tests.harness.limitations import documented
from tests.netns.pod import NEEDS_TAPS, OUTSIDE, POD, ROUTES, Holder

CONFIG = RuntimeConfig()


@pytest.fixture
def holder():
    """An empty network namespace."""
    made = Holder()
    yield made
    made.close()


@pytest.fixture
def outside():
    """What the pod's veth leads to."""
    made = Holder()
    yield made
    made.close()


@pytest.fixture
def pod(holder, outside):
    """A pod with one veth."""
    holder.run(POD.format(outside=outside.pid))
    outside.run(OUTSIDE)
    return holder


class Vmm:
    """Takes devices and gives them back."""

    def __init__(self, refusal: HypervisorError | None = None) -> None:
        self.plugged: dict[str, NetDevice] = {}
        self.refusal = refusal

    async def attach(self, device: Any) -> GuestAddress:
        if self.refusal is not None:
            raise self.refusal
        self.plugged[device.id] = device
        return GuestAddress(pci_path="10/00")

    async def detach(self, device_id: str) -> None:
        del self.plugged[device_id]


class Listener:
    """Takes the agent's calls of a network's."""

    def __init__(self) -> None:
        self.interfaces: list[Any] = []
        self.routes: list[Any] = []
        self.neighbours: list[Any] = []
        self.told = trio.Event()
        self.refusal: AgentError | None = None

    async def do_in_order(self, *requests: Any) -> None:
        for request in requests:
            match type(request).__name__:
                case "UpdateInterfaceRequest":
                    await self.update_interface(request.interface)
                case "UpdateRoutesRequest":
                    await self.update_routes(request.routes.Routes)
                case "AddARPNeighborsRequest":
                    await self.add_arp_neighbors(request.neighbors.ARPNeighbors)

    async def update_interface(self, message: Any) -> Any:
        if self.refusal is not None:
            raise self.refusal
        self.interfaces.append(message)
        return message

    async def update_routes(self, messages: Any) -> None:
        self.routes = list(messages)
        self.told.set()

    async def add_arp_neighbors(self, messages: Any) -> None:
        self.neighbours = list(messages)


@pytest.fixture
def book(tmp_path):
    """The sandbox's journal; nothing is held in it when the test ends."""
    made = Journal.open(str(tmp_path / "journal"), namespace="n", sandbox_id="s")
    yield made
    assert kinds(made) == []
    made.close()


@asynccontextmanager
async def opened(namespace: Path | None, book: Journal) -> AsyncIterator[SandboxNetwork]:
    """A sandbox's network; it is taken back without a complaint."""
    network = await SandboxNetwork.open(namespace, CONFIG, book, vcpus=1)
    yield network
    assert await network.aclose() == []


@asynccontextmanager
async def configured(namespace: Path, book: Journal) -> AsyncIterator[tuple[SandboxNetwork, Any]]:
    """One whose VM runs and whose guest has heard of it, and what it has heard."""
    async with opened(namespace, book) as network:
        await network.wire()
        network.vmm_started()
        agent: Any = Listener()
        await network.configure(agent)
        yield network, agent


def kinds(book: Journal) -> list[str]:
    return [entry.kind for entry in book.held]


def test_path_of_the_namespace_is_the_spec_s():
    spec = {"linux": {"namespaces": [{"type": "pid"}, {"type": "network", "path": "/run/n"}]}}
    assert namespace_path(spec) == Path("/run/n")
    assert namespace_path({"linux": {"namespaces": [{"type": "network"}]}}) is None


@pytest.mark.parametrize("spec", [{}, {"linux": {"namespaces": [{"type": "pid"}]}}])
def test_host_network_is_refused_with_a_way_out(spec):
    with pytest.raises(FailedPrecondition, match="without hostNetwork"):
        namespace_path(spec)


async def test_pod_without_a_namespace_has_no_devices_and_takes_nothing(book):
    async with opened(None, book) as network:
        agent: Any = Listener()
        await network.wire()
        await network.configure(agent)
        assert (network.devices, agent.interfaces, kinds(book)) == ((), [], [])


async def test_host_s_namespace_is_refused_before_anything_is_taken(book):
    with pytest.raises(HostNamespace):
        await SandboxNetwork.open(Path("/proc/self/ns/net"), CONFIG, book, vcpus=1)
    assert kinds(book) == []


class TestWired:
    pytestmark = NEEDS_TAPS

    async def test_guest_is_told_everything_and_the_journal_is_empty_after(
        self, book, pod, outside
    ):
        pod.run(ROUTES)
        before = pod.everything()
        async with opened(pod.path, book) as network:
            assert kinds(book) == []
            (device,) = network.devices
            assert (device.mac, device.mtu) == ("02:00:00:00:00:07", 1450)
            await network.wire()
            assert kinds(book) == ["network"]
            network.vmm_started()
            agent: Any = Listener()
            await network.configure(agent)
            assert [message.name for message in agent.interfaces] == ["eth0"]
            assert len(agent.routes) == 4
            assert len(agent.neighbours) == 1
        assert pod.everything() == before

    async def test_killed_shim_s_journal_undoes_the_wiring(self, book, pod, outside):
        before = pod.everything()
        network = await SandboxNetwork.open(pod.path, CONFIG, book, vcpus=1)
        await network.wire()
        network.vmm_started()
        assert [entry.kind for entry in read(book.path)[1]] == ["network"]
        assert replay(book.path) == []
        assert replay(book.path) == []
        assert pod.everything() == before
        await network.aclose()

    async def test_interface_that_arrives_later_is_attached_and_configured(
        self, book, holder, outside
    ):
        async with opened(holder.path, book) as network:
            await network.wire()
            agent: Any = Listener()
            vm = Vmm()
            with trio.fail_after(20):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(network.follow, agent, vm, pytest.fail)
                    await trio.testing.wait_all_tasks_blocked()
                    holder.run(POD.format(outside=outside.pid))
                    outside.run(OUTSIDE)
                    await agent.told.wait()
                    nursery.cancel_scope.cancel()
            assert [device.mac for device in vm.plugged.values()] == ["02:00:00:00:00:07"]
            assert agent.interfaces[0].devicePath == "10/00"

    async def test_interface_that_leaves_is_unplugged_and_may_come_back(
        self, book, holder, outside
    ):
        async with opened(holder.path, book) as network:
            agent: Any = Listener()
            vm = Vmm()
            for _ in range(2):
                holder.run(POD.format(outside=outside.pid))
                outside.run(OUTSIDE)
                await network.catch_up(agent, vm, pytest.fail)
                (device,) = vm.plugged.values()
                assert device.mac == "02:00:00:00:00:07"
                holder.run("ip link del eth0")
                await network.catch_up(agent, vm, pytest.fail)
                assert not vm.plugged
                assert agent.routes == []
                assert network.endpoints == ()
            assert [message.name for message in agent.interfaces] == ["eth0", "eth0"]

    async def test_interface_of_the_launch_that_leaves_has_no_address_any_more(
        self, book, pod, outside
    ):
        async with configured(pod.path, book) as (network, agent):
            pod.run("ip link del eth0")
            await network.catch_up(agent, Vmm(), pytest.fail)
            before, after = agent.interfaces
            assert (before.name, before.hwAddr) == ("eth0", after.hwAddr)
            assert after.name.startswith("left")
            assert not after.IPAddresses
            assert agent.routes == []

    async def test_second_machine_for_a_namespace_is_refused(self, book, pod, outside):
        network = await SandboxNetwork.open(pod.path, CONFIG, book, vcpus=1)
        await network.wire()
        with pytest.raises(
            UnsupportedLink,
            match=documented(
                "network interface … cannot be given to a virtual machine: another one has it; "
                "containers share a network only in one pod, so give this one a network of its own"
            ),
        ):
            await SandboxNetwork.open(pod.path, CONFIG, book, vcpus=1)
        assert await network.aclose() == []
        again = await SandboxNetwork.open(pod.path, CONFIG, book, vcpus=1)
        assert await again.aclose() == []

    async def test_ports_that_cannot_be_forwarded_are_told_and_nothing_else_suffers(
        self, book, pod, outside, monkeypatch
    ):
        async def old_kernel(_self: object) -> None:
            raise KernelRefused("bpf", errno.EINVAL)

        monkeypatch.setattr(PodNetwork, "steer_loopback", old_kernel)
        async with opened(pod.path, book) as network:
            said: list[str] = []
            dial: Any = None
            await network.forward(dial, said.append)
            (text,) = said
            assert documented("ports cannot be forwarded to the pod: …").search(text)

    async def test_interface_that_the_vmm_refuses_is_told_and_plugged_in_at_the_next_change(
        self, book, pod, outside
    ):
        async with configured(pod.path, book) as (network, agent):
            vm = Vmm(HypervisorError("all hot-plug ports are taken"))
            said: list[str] = []
            pod.run(ROUTES)
            pod.run(f"ip link add eth1 type veth peer name peer1 netns {outside.pid}")
            outside.run("ip link set peer1 up")
            pod.run("ip addr add 10.8.0.3/24 dev eth1; ip link set eth1 up")
            pod.run("ip route add 10.6.0.0/16 via 10.8.0.1")
            pod.run("ip addr add 10.9.8.7/32 dev eth0")
            await network.catch_up(agent, vm, said.append)
            (text,) = said
            assert "interface eth1 did not reach the guest: all hot-plug ports are taken" in text
            assert {message.name for message in agent.interfaces} == {"eth0"}
            assert "10.9.8.7" in {ip.address for ip in agent.interfaces[-1].IPAddresses}
            assert {route.device for route in agent.routes} == {"eth0"}
            vm.refusal = None
            await network.catch_up(agent, vm, pytest.fail)
            assert len(vm.plugged) == 1
            assert (agent.interfaces[-1].name, agent.interfaces[-1].devicePath) == ("eth1", "10/00")
            assert {route.device for route in agent.routes} == {"eth0", "eth1"}

    async def test_change_that_the_agent_or_the_wiring_refuses_is_carried_over_with_the_next(
        self, book, holder, outside, monkeypatch
    ):
        async def refused(_self: object) -> None:
            raise KernelRefused("wire", errno.EBUSY)

        async with opened(holder.path, book) as network:
            agent: Any = Listener()
            vm = Vmm()
            said: list[str] = []
            holder.run(POD.format(outside=outside.pid))
            outside.run(OUTSIDE)
            holder.run(ROUTES)
            with monkeypatch.context() as patch:
                patch.setattr(PodNetwork, "wire", refused)
                await network.catch_up(agent, vm, said.append)
            assert (len(said), vm.plugged, agent.interfaces) == (1, {}, [])
            agent.refusal = AgentUnreachable("UpdateInterface", "busy")
            await network.catch_up(agent, vm, said.append)
            assert (len(said), len(vm.plugged), agent.routes) == (2, 1, [])
            agent.refusal = None
            await network.catch_up(agent, vm, pytest.fail)
            assert [message.devicePath for message in agent.interfaces] == ["10/00"]
            assert agent.routes
            assert len(vm.plugged) == 1

    async def test_interface_that_leaves_before_the_guest_has_heard_of_it_is_unplugged(
        self, book, holder, outside
    ):
        async with opened(holder.path, book) as network:
            agent: Any = Listener()
            vm = Vmm()
            said: list[str] = []
            holder.run(POD.format(outside=outside.pid))
            agent.refusal = AgentUnreachable("UpdateInterface", "busy")
            await network.catch_up(agent, vm, said.append)
            assert (len(said), len(vm.plugged)) == (1, 1)
            holder.run("ip link del eth0")
            await network.catch_up(agent, vm, pytest.fail)
            assert not vm.plugged

    async def test_macvtap_is_in_the_journal_before_it_is_made(self, book, pod, outside):
        before = pod.everything()
        runtime = replace(CONFIG.runtime, internetworking_model="macvtap")
        network = await SandboxNetwork.open(
            pod.path, replace(CONFIG, runtime=runtime), book, vcpus=1
        )
        assert kinds(book) == ["network"]
        assert await network.aclose() == []
        assert pod.everything() == before
