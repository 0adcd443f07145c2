"""What the kernel tells of a network namespace -> the pod's endpoints.

`read` asks in the caller's own namespace and returns the answers as they came: they travel from the
helper process as bytes. `parse` and `layout` are pure, and give the same on both sides.

Attribute numbers. Source: linux/if_link.h, if_addr.h, rtnetlink.h, neighbour.h, if_tun.h.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
import struct
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv6Address
from typing import Final

from netns import rtnetlink
from netns.errors import UnsupportedLink
from netns.model import (
    MAX_TAP_MTU,
    Address,
    Endpoint,
    Interface,
    Ip,
    Layout,
    Link,
    Mac,
    Neighbour,
    Network,
    Route,
    Scan,
    Statistics,
    TapMode,
)
from netns.rtnetlink import attributes, number, text

RTM_NEWLINK, RTM_GETLINK = 16, 18
RTM_NEWADDR, RTM_GETADDR = 20, 22
RTM_NEWROUTE, RTM_GETROUTE = 24, 26
RTM_NEWNEIGH, RTM_GETNEIGH = 28, 30
RTM_NEWQDISC, RTM_GETQDISC = 36, 38

_IFF_UP, _IFF_LOOPBACK, _IFF_NOARP = 0x1, 0x8, 0x80
_ARPHRD_ETHER: Final = 1
_IFA_F_SECONDARY_OR_TEMPORARY, _IFA_F_DADFAILED = 0x01, 0x08
_IFAPROT_KERNEL_LL: Final = 3
_RT_TABLE_MAIN: Final = 254
_RTN_UNICAST: Final = 1
_RTPROT_KERNEL: Final = 2
_RTNH_F_ONLINK: Final = 0x4
_NUD_PERMANENT: Final = 0x80
_INGRESS_HANDLE: Final = 0xFFFF_0000

_LINK: Final = struct.Struct("=BxHiII")
_ADDRESS: Final = struct.Struct("=BBBBI")
_ROUTE: Final = struct.Struct("=BBBBBBBBI")
_NEIGHBOUR: Final = struct.Struct("=BxxxiHBB")
_QDISC: Final = struct.Struct("=BxxxiIII")

_DUMPS: Final = (
    (RTM_GETLINK, _LINK),
    (RTM_GETADDR, _ADDRESS),
    (RTM_GETROUTE, _ROUTE),
    (RTM_GETNEIGH, _NEIGHBOUR),
    (RTM_GETQDISC, _QDISC),
)

# A dump that changes under the reader is marked so and read again.
_ATTEMPTS: Final = 5
_READ_BYTES: Final = 256 << 10

# What a fresh namespace may be full of, where tunnel modules are loaded: never a pod's.
_FALLBACK_DEVICES: Final = {"gre0", "gretap0", "erspan0", "ip6gre0", "sit0", "tunl0", "ip6tnl0"}


def read() -> bytes:
    """Return all dumps of the calling process's namespace. Blocks; for helper processes.

    Raises:
        OSError: the kernel refused, or the namespace would not hold still.
    """
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as netlink:
        return b"".join(_dump(netlink, kind, header) for kind, header in _DUMPS)


def _dump(netlink: socket.socket, kind: int, header: struct.Struct) -> bytes:
    for _ in range(_ATTEMPTS):
        netlink.send(rtnetlink.request(kind, bytes(header.size), flags=rtnetlink.NLM_F_DUMP))
        answer = _answer(netlink)
        if answer is not None:
            return answer
    raise OSError(errno.EAGAIN, "the namespace changes faster than it can be read")


def _answer(netlink: socket.socket) -> bytes | None:
    """Return the messages up to the end of the dump; None if it was interrupted."""
    parts: list[bytes] = []
    is_whole = True
    while True:
        part = netlink.recv(_READ_BYTES)
        parts.append(part)
        for message in rtnetlink.messages(part):
            is_whole = is_whole and not message.flags & rtnetlink.NLM_F_DUMP_INTR
            if message.type == rtnetlink.NLMSG_ERROR:
                raise OSError(rtnetlink.refusal(message), "netlink dump")
            if message.type == rtnetlink.NLMSG_DONE:
                return b"".join(parts) if is_whole else None


def parse(dumps: bytes) -> Scan:
    """Put the dumps of one namespace, joined, into typed values."""
    links: list[Link] = []
    addresses: list[Address] = []
    routes: list[Route] = []
    neighbours: list[Neighbour] = []
    ingress: set[int] = set()
    notes: list[str] = []
    for message in rtnetlink.messages(dumps):
        if message.type == RTM_NEWLINK and message.body[0] == socket.AF_UNSPEC:
            links.append(link_of(message.body))
        elif message.type == RTM_NEWADDR:
            addresses.extend(_address(message.body))
        elif message.type == RTM_NEWROUTE:
            routes.extend(_route(message.body, notes))
        elif message.type == RTM_NEWNEIGH:
            neighbours.extend(_neighbour(message.body))
        elif message.type == RTM_NEWQDISC:
            _, index, handle, _, _ = _QDISC.unpack_from(message.body)
            if handle == _INGRESS_HANDLE:
                ingress.add(index)
    return Scan(
        links=tuple(links),
        addresses=tuple(addresses),
        routes=tuple(routes),
        neighbours=tuple(neighbours),
        ingress_of=frozenset(ingress),
        notes=tuple(notes),
    )


def link_of(body: bytes) -> Link:
    """Read one RTM_NEWLINK."""
    _, hardware, index, flags, _ = _LINK.unpack_from(body)
    found = attributes(body, _LINK.size)
    info = attributes(found.get(18, b""))  # IFLA_LINKINFO
    kind = text(info.get(1))
    is_elsewhere = 37 in found  # IFLA_LINK_NETNSID: what is below lies in another namespace
    return Link(
        ifindex=index,
        name=text(found.get(3)),
        kind=kind,
        mac=_mac(found.get(1, b"")),
        mtu=number(found.get(4)),
        is_up=bool(flags & _IFF_UP),
        is_loopback=bool(flags & _IFF_LOOPBACK),
        is_ethernet=hardware == _ARPHRD_ETHER,
        has_arp=not flags & _IFF_NOARP,
        master=number(found.get(10)),
        lower=0 if is_elsewhere or kind == "veth" else number(found.get(5)),
        tap=_tap_mode(attributes(info.get(2, b""))) if kind == "tun" else None,
    )


def _tap_mode(data: dict[int, bytes]) -> TapMode | None:
    if number(data.get(3)) != 2:  # IFLA_TUN_TYPE: IFF_TAP
        return None
    return TapMode(
        has_packet_info=bool(number(data.get(4))),
        has_vnet_header=bool(number(data.get(5))),
        is_persistent=bool(number(data.get(6))),
        is_multi_queue=bool(number(data.get(7))),
    )


def _address(body: bytes) -> Iterable[Address]:
    family, prefix, flags, _, index = _ADDRESS.unpack_from(body)
    found = attributes(body, _ADDRESS.size)
    flags |= number(found.get(8))  # IFA_FLAGS holds more bits than the header
    raw = found.get(2) or found.get(1)  # IFA_LOCAL; on IPv6 without peer only IFA_ADDRESS
    is_v6 = family == socket.AF_INET6
    unusable = _IFA_F_DADFAILED | _IFA_F_SECONDARY_OR_TEMPORARY if is_v6 else 0
    if raw is None or flags & unusable:
        return
    interface = ipaddress.ip_interface((raw, prefix))
    # IFA_PROTO tells since Linux 5.18 which address is the kernel's own link-local one; on older
    # kernels it is recognised by what the guest would generate from the same MAC.
    is_generated = number(found.get(11)) == _IFAPROT_KERNEL_LL
    yield Address(link=index, interface=interface, is_generated=is_generated)


def _route(body: bytes, notes: list[str]) -> Iterable[Route]:
    family, prefix, _, _, table, protocol, scope, kind, flags = _ROUTE.unpack_from(body)
    found = attributes(body, _ROUTE.size)
    if (number(found.get(15)) or table) != _RT_TABLE_MAIN or not _is_ip(family):
        return
    zero = bytes(4 if family == socket.AF_INET else 16)
    destination = ipaddress.ip_network((found.get(1, zero), prefix), strict=False)
    if kind != _RTN_UNICAST and protocol == _RTPROT_KERNEL:
        return
    if kind != _RTN_UNICAST:
        notes.append(f"route {destination} is not unicast and does not exist in the guest")
    elif 9 in found or 30 in found:  # RTA_MULTIPATH, RTA_NH_ID
        notes.append(f"route {destination} has several next hops and does not exist in the guest")
    elif 18 in found:  # RTA_VIA
        notes.append(f"route {destination} has a gateway of another family: not in the guest")
    else:
        yield Route(
            link=number(found.get(4)),
            destination=destination,
            gateway=_ip(found.get(5)),
            source=_ip(found.get(7)),
            scope=scope,
            is_on_link=bool(flags & _RTNH_F_ONLINK),
            mtu=number(attributes(found.get(8, b"")).get(2)),  # RTA_METRICS, RTAX_MTU
            metric=number(found.get(6)),
            is_kernels=protocol == _RTPROT_KERNEL,
        )


def _neighbour(body: bytes) -> Iterable[Neighbour]:
    family, index, state, flags, _ = _NEIGHBOUR.unpack_from(body)
    found = attributes(body, _NEIGHBOUR.size)
    address, mac = _ip(found.get(1)), found.get(2, b"")
    # The others are the kernel's own discoveries, which the guest makes for itself.
    if _is_ip(family) and state & _NUD_PERMANENT and address is not None and len(mac) == 6:
        yield Neighbour(link=index, address=address, mac=_mac(mac), state=state, flags=flags)


def layout(scan: Scan, *, without: frozenset[str] = frozenset()) -> Layout:
    """Choose what the virtual machine gets; links named in `without` are our own.

    Left alone are the loopback, what belongs to a bridge or bond, the kernel's fallback tunnels,
    and links that are down and have no address.

    Raises:
        UnsupportedLink: a link that the pod uses can't be wired.
    """
    notes = list(scan.notes)
    uppers = {link.lower: link for link in scan.links if link.lower and link.name not in without}
    endpoints: list[Endpoint] = []
    for link in sorted(scan.links, key=lambda link: link.ifindex):
        if link.name in without or not _is_used(link, scan):
            continue
        if reason := _hindrance(link, uppers.get(link.ifindex)):
            raise UnsupportedLink(link.name, reason)
        endpoints.append(_endpoint(link, uppers.get(link.ifindex), scan, notes))
    seen: dict[Mac, str] = {}
    for endpoint in endpoints:
        other = seen.setdefault(endpoint.mac, endpoint.name)
        if other != endpoint.name:
            reason = f"it has the hardware address of {other}, by which the guest tells them apart"
            raise UnsupportedLink(endpoint.name, reason)
    return Layout(endpoints=tuple(endpoints), notes=tuple(notes))


def _is_used(link: Link, scan: Scan) -> bool:
    if link.is_loopback or link.master or link.name in _FALLBACK_DEVICES:
        return False
    if any(_counts(address, link) for address in scan.addresses):
        return True
    # Without an address it may still be a pod's second, pure layer-2 interface.
    return link.is_ethernet and (link.is_up or (link.tap is not None and link.tap.is_persistent))


def _counts(address: Address, link: Link) -> bool:
    return address.link == link.ifindex and not _is_generated(address, link.mac)


def _hindrance(link: Link, upper: Link | None) -> str:
    if not link.is_ethernet:
        return f"a link of kind {link.kind or 'hardware'!r} carries no Ethernet frames"
    if upper is not None and upper.kind != "vlan":
        return f"{upper.name} of kind {upper.kind!r} lies on it in the same namespace"
    return ""


def _endpoint(link: Link, upper: Link | None, scan: Scan, notes: list[str]) -> Endpoint:
    addresses = tuple(a.interface for a in scan.addresses if _counts(a, link))
    if link.mtu > MAX_TAP_MTU:
        notes.append(f"{link.name} has an MTU of {link.mtu}; the guest has {MAX_TAP_MTU}")
    if not link.is_up:
        notes.append(f"{link.name} is down: nothing passes until it is set up in its namespace")
    return Endpoint(
        ifindex=link.ifindex,
        name=link.name,
        kind=link.kind,
        mac=link.mac,
        mtu=min(link.mtu, MAX_TAP_MTU),
        has_arp=link.has_arp,
        addresses=addresses,
        routes=_routes_of(link, addresses, scan, notes),
        neighbours=tuple(n for n in scan.neighbours if n.link == link.ifindex),
        has_ingress=link.ifindex in scan.ingress_of,
        carries_vlans=upper is not None,
        tap=link.tap if link.tap is not None and link.tap.is_persistent else None,
    )


def _routes_of(
    link: Link, addresses: tuple[Interface, ...], scan: Scan, notes: list[str]
) -> tuple[Route, ...]:
    """Choose the routes that the guest's kernel does not make by itself; of rivals the first."""
    own = {interface.network for interface in addresses}
    chosen: dict[Network, Route] = {}
    for route in sorted(scan.routes, key=lambda route: route.metric):
        if route.link != link.ifindex or (route.is_kernels and _is_automatic(route, own)):
            continue
        if route.destination in chosen:
            notes.append(f"route {route.destination} of metric {route.metric} has a better rival")
        else:
            chosen[route.destination] = route
    # Those without a gateway come first: a gateway must be reachable when its route is added.
    return tuple(sorted(chosen.values(), key=lambda route: route.gateway is not None))


def _is_automatic(route: Route, own: set[Network]) -> bool:
    destination = route.destination
    return destination in own or destination.is_link_local or destination.is_multicast


def _is_generated(address: Address, mac: Mac) -> bool:
    ip = address.interface.ip
    if not isinstance(ip, IPv6Address) or not ip.is_link_local:
        return False
    return address.is_generated or ip == _eui64(mac)


def _eui64(mac: Mac) -> IPv6Address | None:
    """Make the link-local address of a MAC. Source: RFC 4291, appendix A."""
    raw = bytes.fromhex(mac.replace(":", ""))
    if len(raw) != 6:
        return None
    low = bytes([raw[0] ^ 2]) + raw[1:3] + b"\xff\xfe" + raw[3:]
    return IPv6Address(b"\xfe\x80" + bytes(6) + low)


def statistics_of(text_of_dev: str, names: Iterable[str]) -> tuple[Statistics, ...]:
    """Read /proc/net/dev. Source: net/core/net-procfs.c, the order of its columns."""
    wanted = set(names)
    found = []
    for line in text_of_dev.splitlines()[2:]:
        name, _, columns = line.strip().partition(":")
        if name in wanted:
            value = [int(column) for column in columns.split()]
            found.append(Statistics(
                name=name,
                rx_bytes=value[0], rx_packets=value[1], rx_errors=value[2], rx_dropped=value[3],
                tx_bytes=value[8], tx_packets=value[9], tx_errors=value[10], tx_dropped=value[11],
            ))  # fmt: skip
    return tuple(found)


def _is_ip(family: int) -> bool:
    return family in (socket.AF_INET, socket.AF_INET6)


def _ip(raw: bytes | None) -> Ip | None:
    if raw is None:
        return None
    return IPv4Address(raw) if len(raw) == 4 else IPv6Address(raw)


def _mac(raw: bytes) -> Mac:
    return Mac(raw.hex(":"))
