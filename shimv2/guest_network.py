"""A pod's endpoints -> network devices of the machine, and what the agent must configure. Pure.

The guest's kernel names its links as it likes; the agent finds each by its hardware address and
gives it the name it has in the pod.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Final

from agent_proto.pb import types_pb2
from hypervisors.machine import NetDevice

if TYPE_CHECKING:
    from netns.model import Endpoint, Interface, Ip, Neighbour, Route
    from netns.network import Attached

# Source: linux/if.h, linux/rtnetlink.h
_IFF_NOARP: Final = 0x80
_RTNH_F_ONLINK: Final = 0x4


def device_id(ifindex: int) -> str:
    """Name the machine's device of an endpoint; indexes are never used twice in a namespace."""
    return f"net{ifindex}"


def net_device(attached: Attached, vhost_fds: Sequence[int] = ()) -> NetDevice:
    """Describe the device of one endpoint; the descriptors stay the caller's."""
    endpoint = attached.attachment.endpoint
    return NetDevice(
        id=device_id(endpoint.ifindex),
        mac=endpoint.mac,
        tap_fds=attached.fds,
        mtu=endpoint.mtu,
        vhost_fds=tuple(vhost_fds),
    )


def interface(endpoint: Endpoint, pci_path: str = "") -> types_pb2.Interface:
    """Describe one interface for UpdateInterface.

    `pci_path` makes the agent wait for a device that was attached to the running machine.
    """
    return types_pb2.Interface(
        device=endpoint.name,
        name=endpoint.name,
        IPAddresses=[_address(address) for address in endpoint.addresses],
        mtu=endpoint.mtu,
        hwAddr=endpoint.mac,
        devicePath=pci_path,
        type=endpoint.kind,
        raw_flags=0 if endpoint.has_arp else _IFF_NOARP,
    )


def emptied(endpoint: Endpoint) -> types_pb2.Interface:
    """Describe an interface that has left the pod but whose device can't leave the machine.

    It has no address, and makes room for another of its name.
    """
    name = f"left{endpoint.ifindex}"
    return types_pb2.Interface(
        device=name,
        name=name,
        mtu=endpoint.mtu,
        hwAddr=endpoint.mac,
        type=endpoint.kind,
        raw_flags=_IFF_NOARP,
    )


def routes(endpoints: Iterable[Endpoint]) -> list[types_pb2.Route]:
    """List the routes of all endpoints for UpdateRoutes, which replaces the guest's.

    Those without a gateway come first, over all endpoints: a gateway must be reachable when its
    route is added.
    """
    pairs = [(endpoint, route) for endpoint in endpoints for route in endpoint.routes]
    pairs.sort(key=lambda pair: pair[1].gateway is not None)
    return [_route(route, endpoint.name) for endpoint, route in pairs]


def neighbours(endpoints: Iterable[Endpoint]) -> list[types_pb2.ARPNeighbor]:
    """List the fixed neighbours of all endpoints for AddARPNeighbors."""
    return [
        _neighbour(neighbour, endpoint.name)
        for endpoint in endpoints
        for neighbour in endpoint.neighbours
    ]


def _address(address: Interface) -> types_pb2.IPAddress:
    # Source: types.proto IPAddress.mask: the prefix length in decimal digits
    return types_pb2.IPAddress(
        family=_family(address.ip), address=str(address.ip), mask=str(address.network.prefixlen)
    )


def _route(route: Route, device: str) -> types_pb2.Route:
    destination = route.destination
    return types_pb2.Route(
        # Source: types.proto Route.dest: empty for the default route
        dest=str(destination) if destination.prefixlen else "",
        gateway=str(route.gateway) if route.gateway is not None else "",
        device=device,
        source=str(route.source) if route.source is not None else "",
        scope=route.scope,
        family=_family(destination.network_address),
        flags=_RTNH_F_ONLINK if route.is_on_link else 0,
        mtu=route.mtu,
    )


def _neighbour(neighbour: Neighbour, device: str) -> types_pb2.ARPNeighbor:
    return types_pb2.ARPNeighbor(
        toIPAddress=types_pb2.IPAddress(
            family=_family(neighbour.address), address=str(neighbour.address)
        ),
        device=device,
        lladdr=neighbour.mac,
        state=neighbour.state,
        flags=neighbour.flags,
    )


def _family(ip: Ip) -> types_pb2.IPFamily:
    return types_pb2.v6 if ip.version == 6 else types_pb2.v4
