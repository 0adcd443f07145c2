"""The pod's network through a sandbox's life: netns, hypervisors and agent meet here.

    open ──> devices ──> (VMM launched) ──> vmm_started
      └────> wire, while the guest boots ──> configure (agent reachable) ──> follow … ──> aclose

A pod without a namespace of its own path has no interfaces, and then nothing here costs anything:
`netns` is not even imported.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import trio

from agent_proto.errors import AgentError
from agent_proto.pb import agent_pb2
from hypervisors.errors import HypervisorError
from shimv2.errors import FailedPrecondition
from shimv2.guest_network import device_id, emptied, interface, neighbours, net_device, routes
from shimv2.port_forward import Dial, PortForward

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from agent_proto.client import AgentClient
    from hypervisors.machine import Device, GuestAddress, NetDevice
    from netns.model import Endpoint, Statistics
    from netns.network import Attached, PodNetwork, UndoRecord
    from shimv2.config import RuntimeConfig
    from shimv2.journal import Entry, Journal

Tell = Callable[[str], None]


class Machine(Protocol):
    """What can be plugged into a running machine, and out of it."""

    async def attach(self, device: Device) -> GuestAddress: ...
    async def detach(self, device_id: str) -> None: ...


def namespace_path(spec: dict[str, Any]) -> Path | None:
    """Give the path of the pod's network namespace; None for a new one with nothing in it.

    Raises:
        FailedPrecondition: the spec asks for the host's network.
    """
    linux = spec.get("linux")
    found = linux.get("namespaces") if isinstance(linux, dict) else None
    for namespace in found if isinstance(found, list) else []:
        if isinstance(namespace, dict) and namespace.get("type") == "network":
            path = namespace.get("path")
            return Path(path) if path else None
    raise FailedPrecondition(
        "the host's network was asked for (no network namespace in the spec): a virtual machine "
        "cannot share it; run the pod without hostNetwork"
    )


@dataclass(slots=True)
class _Given:
    """An interface whose device the machine has. `endpoint` is as the guest was told of it last."""

    endpoint: Endpoint | None = None
    pci_path: str = ""


class SandboxNetwork:
    """One sandbox's network; made by `open`, ended by `aclose`, whatever else goes on then."""

    def __init__(self, journal: Journal) -> None:
        self.devices: tuple[NetDevice, ...] = ()
        self._journal = journal
        self._entry: Entry | None = None
        self._pod: PodNetwork | None = None
        self._vhost_fds: list[int] = []
        self._has_vhost = False
        self._given: dict[int, _Given] = {}  # by the interface's index
        # What the guest has all of; None when some of it has not reached the guest.
        self._carried: tuple[Endpoint, ...] | None = ()
        self.is_late = False  # what is in the namespace at Start has come since Create
        self._working = trio.Lock()  # `wire`, a change and the end come from tasks of their own
        self._life = trio.CancelScope()  # of `follow`
        self._forwarding = trio.CancelScope()  # of `forward`
        self._is_closed = False

    @classmethod
    async def open(
        cls,
        path: Path | None,
        config: RuntimeConfig,
        journal: Journal,
        *,
        vcpus: int,
        lends_taps: bool = False,
    ) -> SandboxNetwork:
        """Look into the pod's namespace and make what the VMM must have at its launch.

        `lends_taps`: it opens taps by name, which therefore may stay when a shim is killed.

        Raises:
            NetnsError: nothing is left then but what the journal knows.
        """
        made = cls(journal)
        if path is None or config.runtime.disable_new_netns:
            return made
        from netns.model import Wiring
        from netns.network import PodNetwork

        queues = max(1, min(config.hypervisor.network_queues, vcpus))
        made._has_vhost = not config.hypervisor.disable_vhost_net
        wiring = Wiring(config.runtime.internetworking_model)
        made._pod = await PodNetwork.open(
            path, made._record, wiring=wiring, queues=queues, lends_taps=lends_taps
        )
        made.devices = tuple(made._device(each) for each in made._pod.attached)
        return made

    @property
    def has_namespace(self) -> bool:
        """Tell whether the pod has a network namespace, in which interfaces are or may come."""
        return self._pod is not None

    @property
    def namespace_fd(self) -> int | None:
        """The namespace itself, open until `aclose`; None without one."""
        return self._pod.namespace_fd if self._pod is not None else None

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences on what of the pod's network the guest does not get; for the log."""
        return self._pod.notes if self._pod is not None else ()

    @property
    def endpoints(self) -> tuple[Endpoint, ...]:
        return self._pod.layout.endpoints if self._pod is not None else ()

    def statistics(self) -> tuple[Statistics, ...]:
        """Count what went through each interface, without asking the guest."""
        return self._pod.statistics() if self._pod is not None else ()

    async def wire(self) -> None:
        """Join the taps to the pod's links. Meant to run beside the boot; raises NetnsError."""
        async with self._working:
            if self._pod is not None and not self._is_closed:
                await self._pod.wire()

    def vmm_started(self) -> None:
        """Close our copies of the descriptors, so that the taps go when the VMM does."""
        if self._pod is not None:
            self._pod.close_taps()
        self._close_vhost()

    def _close_vhost(self) -> None:
        while self._vhost_fds:
            os.close(self._vhost_fds.pop())

    async def configure(self, agent: AgentClient, *following: Message) -> None:
        """Tell the guest its addresses, routes and neighbours; before the first container.

        With requests `following`, all goes out at once, as `AgentClient.do_in_order`; without,
        each request waits for the answer to the one before.

        Raises:
            AgentError: the agent refused one.
        """
        requests = list(self._requests())
        if following:
            await agent.do_in_order(*requests, *following)
        else:
            for request in requests:
                await agent.do_in_order(request)
        for endpoint in self.endpoints:
            self._given[endpoint.ifindex] = _Given(endpoint)
        self._carried = self.endpoints

    def _requests(self) -> Iterator[Message]:
        for endpoint in self.endpoints:
            yield agent_pb2.UpdateInterfaceRequest(interface=interface(endpoint))
        if self.endpoints:
            table = agent_pb2.Routes(Routes=routes(self.endpoints))
            yield agent_pb2.UpdateRoutesRequest(routes=table)
        if fixed := neighbours(self.endpoints):
            entries = agent_pb2.ARPNeighbors(ARPNeighbors=fixed)
            yield agent_pb2.AddARPNeighborsRequest(neighbors=entries)

    async def follow(self, agent: AgentClient, vm: Machine, tell: Tell) -> None:
        """Give the guest what comes to the pod's network later, take what leaves; until `aclose`.

        What can't be carried over is told, and tried again at the next change: the pod lives on.
        """
        if self._pod is None:
            return
        with self._life:
            while not self._is_closed:
                await self._pod.wait_changed()
                await self.catch_up(agent, vm, tell)

    async def catch_up(self, agent: AgentClient, vm: Machine, tell: Tell) -> None:
        """Give the guest what is there by now, as `follow` does."""
        if self._pod is None:
            return
        from netns.errors import NetnsError

        try:
            async with self._working:
                await self._carry_over(self._pod, agent, vm, tell)
        except (NetnsError, HypervisorError, AgentError) as error:
            tell(f"the pod's network did not reach the guest: {error}")

    async def forward(self, dial: Dial, tell: Tell) -> None:
        """Carry connections to the namespace's loopback into the guest; runs until `aclose`."""
        if self._pod is None:
            return
        from netns.errors import NetnsError

        with self._forwarding:
            try:
                steering = await self._pod.steer_loopback()
            except NetnsError as error:
                tell(f"ports cannot be forwarded to the pod: {error}")
                return
            await PortForward(steering, dial).run()

    async def _carry_over(
        self, pod: PodNetwork, agent: AgentClient, vm: Machine, tell: Tell
    ) -> None:
        await pod.rescan()
        pod.drop_gone()
        if self._carried == self.endpoints:
            return  # a carrier that came or went, say: the guest's routes need no replacing
        self._carried = None
        # First: one that left and came back has its old name in the guest.
        await self._take_away_gone(agent, vm, tell)
        await self._plug(pod, vm, tell)
        has_all = await self._update_interfaces(agent, tell)
        await self._configure_tables(agent)
        if has_all:
            self._carried = self.endpoints

    async def _take_away_gone(self, agent: AgentClient, vm: Machine, tell: Tell) -> None:
        here = {endpoint.ifindex for endpoint in self.endpoints}
        for ifindex in [one for one in self._given if one not in here]:
            await _take_away(ifindex, self._given[ifindex].endpoint, agent, vm, tell)
            del self._given[ifindex]

    async def _plug(self, pod: PodNetwork, vm: Machine, tell: Tell) -> None:
        """Give the machine what it has no device for. The taps of what it refuses stay ours."""
        from netns.errors import NetnsError

        try:
            await pod.wire()
        except NetnsError as error:
            tell(f"the pod's network did not reach the guest: {error}")
        for each in pod.waiting:
            endpoint = each.attachment.endpoint
            try:
                address = await vm.attach(self._device(each))
            except (NetnsError, HypervisorError) as error:
                tell(f"network interface {endpoint.name} did not reach the guest: {error}")
                continue
            finally:
                self._close_vhost()
            pod.close_taps(each)
            self._given[endpoint.ifindex] = _Given(pci_path=address.pci_path)

    async def _update_interfaces(self, agent: AgentClient, tell: Tell) -> bool:
        """Tell the guest what is new of its interfaces; return whether it has all of the pod's."""
        has_all = True
        for endpoint in self.endpoints:
            given = self._given.get(endpoint.ifindex)
            if given is None:
                has_all = False
            elif given.endpoint != endpoint:
                pci_path = given.pci_path if given.endpoint is None else ""
                try:
                    await agent.update_interface(interface(endpoint, pci_path))
                    given.endpoint = endpoint
                except AgentError as error:
                    tell(f"network interface {endpoint.name} did not reach the guest: {error}")
                    has_all = False
        return has_all

    async def aclose(self) -> list[str]:
        """Undo the wiring; return what could not be undone, which the journal then keeps.

        Call it when the VMM is dead; within `netns.network.UNDO_S`. Idempotent.
        """
        self._is_closed = True
        self._life.cancel()
        self._forwarding.cancel()
        # A `wire` under way ends first: within its own bound, and at once with its sandbox.
        async with self._working:
            problems = await self._pod.aclose() if self._pod is not None else []
            self.vmm_started()
            if self._entry is not None and not problems:
                self._journal.release(self._entry)
                self._entry = None
            return problems

    async def _configure_tables(self, agent: AgentClient) -> None:
        told = {index for index, given in self._given.items() if given.endpoint is not None}
        here = [endpoint for endpoint in self.endpoints if endpoint.ifindex in told]
        await agent.update_routes(routes(here))
        if fixed := neighbours(here):
            await agent.add_arp_neighbors(fixed)

    def _device(self, attached: Attached) -> NetDevice:
        from netns.tap import open_vhost_net

        vhost = open_vhost_net(len(attached.fds)) if self._has_vhost else ()
        self._vhost_fds += vhost
        return net_device(attached, vhost)

    def _record(self, record: UndoRecord) -> None:
        # The new one holds all steps of the old one.
        old = self._entry
        self._entry = self._journal.take("network", **record._asdict())
        if old is not None:
            self._journal.release(old)


async def _take_away(
    ifindex: int, endpoint: Endpoint | None, agent: AgentClient, vm: Machine, tell: Tell
) -> None:
    """Unplug the device of an interface that has left; one from the launch stays, without use."""
    try:
        await vm.detach(device_id(ifindex))
        return
    except KeyError:
        pass  # not plugged into a running machine
    except HypervisorError as error:
        name = endpoint.name if endpoint is not None else f"number {ifindex}"
        tell(f"network interface {name} left, its device is still there: {error}")
    if endpoint is not None:  # else the guest has never heard of it
        await agent.update_interface(emptied(endpoint))
