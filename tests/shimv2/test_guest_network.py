"""Endpoints become devices and agent messages."""

from __future__ import annotations

from ipaddress import ip_address, ip_interface, ip_network

from agent_proto.pb import types_pb2
from netns.model import Endpoint, Mac, Neighbour, Route
from netns.network import Attached
from netns.plan import Attachment
from shimv2.guest_network import interface, neighbours, net_device, routes

MAC = Mac("02:00:00:00:00:07")


def endpoint(**changes) -> Endpoint:
    plain = Endpoint(ifindex=7, name="eth0", kind="veth", mac=MAC, mtu=1450)
    return plain._replace(**changes)


def route(destination: str, **changes) -> Route:
    return Route(link=7, destination=ip_network(destination), **changes)


def test_device_has_the_link_s_mac_and_mtu_and_the_tap_s_descriptors():
    attached = Attached(Attachment(endpoint=endpoint(), device="tap0_kata"), (5, 6))
    device = net_device(attached, (8, 9))
    assert (device.id, device.mac, device.mtu) == ("net7", MAC, 1450)
    assert (device.tap_fds, device.vhost_fds) == ((5, 6), (8, 9))


def test_interface_carries_both_families_with_prefix_lengths():
    addresses = (ip_interface("10.9.0.2/24"), ip_interface("fd00:9::2/64"))
    message = interface(endpoint(addresses=addresses), "02/00")
    assert [(a.family, a.address, a.mask) for a in message.IPAddresses] == [
        (types_pb2.v4, "10.9.0.2", "24"),
        (types_pb2.v6, "fd00:9::2", "64"),
    ]
    assert (message.name, message.hwAddr, message.mtu) == ("eth0", MAC, 1450)
    assert (message.type, message.devicePath, message.raw_flags) == ("veth", "02/00", 0)


def test_interface_without_arp_says_so():
    assert interface(endpoint(has_arp=False)).raw_flags == 0x80


def test_default_route_has_no_destination_and_the_family_of_its_own():
    via = ip_address("fe80::1")
    (message,) = routes([endpoint(routes=(route("::/0", gateway=via),))])
    assert (message.dest, message.gateway, message.device) == ("", "fe80::1", "eth0")
    assert message.family == types_pb2.v6


def test_route_keeps_source_scope_mtu_and_on_link():
    given = route(
        "10.1.0.0/16",
        gateway=ip_address("169.254.1.1"),
        source=ip_address("10.9.0.2"),
        scope=253,
        is_on_link=True,
        mtu=1400,
    )
    (message,) = routes([endpoint(routes=(given,))])
    assert (message.dest, message.source, message.scope) == ("10.1.0.0/16", "10.9.0.2", 253)
    assert (message.flags, message.mtu) == (4, 1400)


def test_routes_without_gateway_come_first_over_all_endpoints():
    one = endpoint(routes=(route("0.0.0.0/0", gateway=ip_address("10.8.0.1")),))
    two = endpoint(name="net1", routes=(route("10.8.0.1/32", scope=253),))
    assert [message.dest for message in routes([one, two])] == ["10.8.0.1/32", ""]


def test_neighbours_are_named_with_their_device():
    known = Neighbour(link=7, address=ip_address("10.9.0.1"), mac=MAC, state=0x80, flags=0x80)
    (message,) = neighbours([endpoint(neighbours=(known,))])
    assert (message.toIPAddress.address, message.device) == ("10.9.0.1", "eth0")
    assert (message.lladdr, message.state, message.flags) == (MAC, 0x80, 0x80)
