"""Dumps of the kernel, made by hand where this machine's kernel can't make them."""

from __future__ import annotations

import errno
import os
import struct
from ipaddress import ip_address, ip_interface, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netns import rtnetlink
from netns.errors import UnsupportedLink
from netns.model import Layout, Scan
from netns.scan import layout, parse, read, statistics_of

UP, NOARP, LOOPBACK = 0x1, 0x80, 0x8
V4, V6 = 2, 10


def attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def word(kind: int, value: int) -> bytes:
    return attribute(kind, struct.pack("=I", value))


def message(kind: int, *parts: bytes) -> bytes:
    body = b"".join(parts)
    return struct.pack("=IHHII", 16 + len(body), kind, 2, 1, 0) + body + bytes(-len(body) % 4)


def link(
    index: int, name: str, *extra: bytes, kind="veth", flags=UP, hardware=1, mac=None, mtu=1500
):
    info = attribute(18, attribute(1, kind.encode()) + b"".join(extra)) if kind else b""
    return message(
        16,
        struct.pack("=BxHiII", 0, hardware, index, flags, 0),
        attribute(1, bytes([2, 0, 0, 0, 0, index]) if mac is None else mac),
        attribute(3, name.encode() + b"\0"),
        word(4, mtu),
        info,
    )


def lower(raw: bytes, index: int, *, elsewhere: bool = False) -> bytes:
    """Add what a link lies on to the message of a link."""
    body = raw[16:] + word(5, index) + (word(37, 0) if elsewhere else b"")
    return message(16, body)


def address(index: int, text: str, *, flags: int = 0, protocol: int = 0) -> bytes:
    interface = ip_interface(text)
    family = V6 if interface.version == 6 else V4
    return message(
        20,
        struct.pack("=BBBBI", family, interface.network.prefixlen, flags & 0xFF, 0, index),
        attribute(1, interface.ip.packed),
        attribute(2, interface.ip.packed) if family == V4 else b"",
        word(8, flags),
        attribute(11, bytes([protocol])) if protocol else b"",
    )


def route(index: int, to: str, *extra: bytes, kind=1, table=254, protocol=3, scope=0, flags=0):
    network = ip_network(to)
    family = V6 if network.version == 6 else V4
    return message(
        24,
        struct.pack(
            "=BBBBBBBBI", family, network.prefixlen, 0, 0, table, protocol, scope, kind, flags
        ),
        attribute(1, network.network_address.packed) if network.prefixlen else b"",
        word(4, index),
        *extra,
    )


def via(text: str) -> bytes:
    return attribute(5, ip_address(text).packed)


def chosen(*messages: bytes) -> Layout:
    return layout(parse(b"".join(messages)))


def names(found: Layout) -> list[str]:
    return [endpoint.name for endpoint in found.endpoints]


def test_ipvlan_without_arp_is_an_endpoint_of_its_kind():
    raw = lower(link(3, "eth0", kind="ipvlan", flags=UP | NOARP), 9, elsewhere=True)
    found = chosen(raw, address(3, "10.1.0.2/32"))
    (endpoint,) = found.endpoints
    assert (endpoint.kind, endpoint.has_arp) == ("ipvlan", False)
    assert endpoint.addresses == (ip_interface("10.1.0.2/32"),)


def test_vlan_from_outside_is_wired_like_any_link():
    raw = lower(link(3, "eth0.5", kind="vlan"), 2, elsewhere=True)
    assert names(chosen(link(2, "eth0"), raw)) == ["eth0", "eth0.5"]
    assert not any(endpoint.carries_vlans for endpoint in chosen(link(2, "eth0"), raw).endpoints)


def test_vlan_on_a_link_of_the_pod_makes_that_let_tagged_frames_pass():
    found = chosen(link(2, "eth0"), lower(link(3, "eth0.5", kind="vlan"), 2))
    assert [endpoint.carries_vlans for endpoint in found.endpoints] == [True, False]


def test_macvlan_on_a_link_of_the_pod_is_refused_because_its_frames_would_be_taken():
    with pytest.raises(UnsupportedLink, match=r"eth0.*macvlan0.*lies on it"):
        chosen(link(2, "eth0"), lower(link(3, "macvlan0", kind="macvlan"), 2))


def test_two_interfaces_with_one_hardware_address_are_refused():
    mac = bytes.fromhex("0200000000aa")
    with pytest.raises(UnsupportedLink, match=r"ipvl1.*hardware address of ipvl0"):
        chosen(link(2, "ipvl0", mac=mac), link(3, "ipvl1", mac=mac))


@pytest.mark.parametrize(
    "ignored",
    [
        link(1, "lo", kind="", flags=UP | LOOPBACK, hardware=772),
        link(2, "tunl0", kind="ipip", flags=0, hardware=768),
        link(2, "sit0", kind="sit", flags=0, hardware=776),
        link(2, "gretap0", kind="gretap", flags=0, mac=bytes(6)),
        link(2, "dummy0", kind="dummy", flags=0),
    ],
)
def test_link_that_is_no_interface_of_the_pod_is_left_alone(ignored):
    assert chosen(ignored) == Layout()


def test_port_of_a_bridge_is_left_alone_and_the_bridge_wired():
    port = message(16, link(2, "port0")[16:] + word(10, 3))
    assert names(chosen(port, link(3, "bridge0", kind="bridge"))) == ["bridge0"]


def test_interface_without_address_is_wired_when_it_is_up():
    assert names(chosen(link(2, "net1"), link(3, "net2", flags=0))) == ["net1"]


def test_interface_that_is_down_but_has_an_address_is_wired_and_told():
    found = chosen(link(2, "eth0", flags=0), address(2, "10.0.0.1/8"))
    assert names(found) == ["eth0"]
    assert any("eth0 is down" in note for note in found.notes)


def test_tunnel_with_an_address_is_refused():
    with pytest.raises(UnsupportedLink, match="no Ethernet frames"):
        chosen(link(2, "wg0", kind="wireguard", hardware=65534), address(2, "10.0.0.1/8"))


@pytest.mark.parametrize(("number", "is_tap"), [(1, False), (2, True)])
def test_only_a_persistent_tap_is_opened_instead_of_wired(number, is_tap):
    data = attribute(2, attribute(3, bytes([number])) + attribute(5, b"\1") + attribute(6, b"\1"))
    (endpoint,) = chosen(link(2, "eth0", data, kind="tun"), address(2, "10.0.0.1/8")).endpoints
    assert (endpoint.tap is not None) is is_tap
    assert endpoint.tap is None or (endpoint.tap.has_vnet_header, endpoint.tap.is_multi_queue) == (
        True,
        False,
    )


def test_generated_link_local_address_is_left_to_the_guest():
    # Observed: IFA_PROTO of the kernel's own is 3 (IFAPROT_KERNEL_LL, Linux 5.18).
    found = chosen(
        link(2, "eth0"),
        address(2, "fe80::ff:fe00:2/64"),
        address(2, "fe80::1234/64", protocol=3),
        address(2, "fe80::9/64"),
        address(2, "fd00::2/64"),
    )
    assert found.endpoints[0].addresses == (ip_interface("fe80::9/64"), ip_interface("fd00::2/64"))


def test_temporary_and_duplicate_ipv6_addresses_do_not_go_to_the_guest():
    found = chosen(
        link(2, "eth0"), address(2, "fd00::1/64", flags=0x01), address(2, "fd00::2/64", flags=0x08)
    )
    assert found.endpoints[0].addresses == ()


def test_secondary_ipv4_address_does_and_in_order():
    found = chosen(link(2, "eth0"), address(2, "10.0.0.1/8"), address(2, "10.0.0.2/8", flags=0x01))
    assert found.endpoints[0].addresses == (ip_interface("10.0.0.1/8"), ip_interface("10.0.0.2/8"))


def test_route_the_guest_makes_by_itself_is_left_out_and_that_to_a_peer_is_kept():
    found = chosen(
        link(2, "eth0"),
        address(2, "10.0.0.1/24"),
        route(2, "10.0.0.0/24", protocol=2, scope=253),
        route(2, "10.9.9.9/32", protocol=2, scope=253),
        route(2, "fe80::/64", protocol=2),
    )
    (kept,) = found.endpoints[0].routes
    assert (kept.destination, kept.scope) == (ip_network("10.9.9.9/32"), 253)


def test_of_rival_routes_the_one_with_the_least_metric_is_kept_and_the_other_told():
    found = chosen(
        link(2, "eth0"),
        route(2, "::/0", via("fd00::9"), word(6, 1024)),
        route(2, "::/0", via("fd00::1"), word(6, 100)),
    )
    (kept,) = found.endpoints[0].routes
    assert kept.gateway == ip_address("fd00::1")
    assert any("metric 1024" in note for note in found.notes)


def test_on_link_flag_survives_and_the_kernel_s_state_bits_do_not():
    found = chosen(link(2, "eth0"), route(2, "0.0.0.0/0", via("169.254.1.1"), flags=0x4 | 0x10))
    assert found.endpoints[0].routes[0].is_on_link


@pytest.mark.parametrize(
    ("given_route", "said"),
    [
        (route(2, "10.5.0.0/16", kind=6), "not unicast"),
        (route(2, "10.5.0.0/16", attribute(9, bytes(16))), "several next hops"),
        (route(2, "10.5.0.0/16", attribute(18, bytes(18))), "another family"),
    ],
)
def test_route_that_cannot_be_carried_over_is_told(given_route, said):
    found = chosen(link(2, "eth0"), given_route)
    assert found.endpoints[0].routes == ()
    assert any(said in note and "10.5.0.0/16" in note for note in found.notes)


@pytest.mark.parametrize("table", [255, 100])
def test_routes_of_other_tables_stay_outside(table):
    assert chosen(link(2, "eth0"), route(2, "10.5.0.0/16", table=table)).endpoints[0].routes == ()


def test_statistics_are_read_by_column():
    shown = (
        "Inter-|   Receive                                                |  Transmit\n"
        " face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets\n"
        "    lo:      1       2    3    4    5     6          7         8  9 10 11 12 13 14 15 16\n"
        "  eth0:    100      20    3    4    5     6          7         8 90 10 11 12 13 14 15 16\n"
    )
    (counted,) = statistics_of(shown, ["eth0", "gone"])
    assert (counted.rx_bytes, counted.rx_packets, counted.rx_errors, counted.rx_dropped) == (
        100, 20, 3, 4,
    )  # fmt: skip
    assert (counted.tx_bytes, counted.tx_packets, counted.tx_errors, counted.tx_dropped) == (
        90, 10, 11, 12,
    )  # fmt: skip


@given(st.binary(max_size=200))
def test_framing_of_any_bytes_ends(data):
    for found in rtnetlink.messages(data):
        rtnetlink.attributes(found.body)
    rtnetlink.attributes(data)


@given(st.integers(0, 10_000))
def test_dump_cut_anywhere_gives_its_whole_messages(cut):
    whole = link(2, "eth0") + address(2, "10.0.0.1/8") + route(2, "0.0.0.0/0", via("10.0.0.9"))
    found = parse(whole[:cut])
    assert len(found.links) <= 1
    assert found == parse(whole) or cut < len(whole)


def test_refusal_is_an_errno():
    refused = struct.pack("=i", -errno.EPERM)
    assert rtnetlink.refusal(rtnetlink.Message(2, 0, refused)) == errno.EPERM


@pytest.mark.skipif(not os.path.exists("/proc/self/ns/net"), reason="no namespaces here")
def test_own_namespace_can_be_read_without_privileges():
    found = parse(read())
    assert isinstance(found, Scan)
    assert any(each.is_loopback and each.name == "lo" for each in found.links)
