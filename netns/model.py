"""A pod's network as plain values. Pure: no I/O, no netlink, no VM.

Named tuples, not data classes: these are an eighth of the time to define, in every pod's shim.

`Scan` is what a namespace holds, as the kernel tells it; `Endpoint` is one interface of the pod
that a virtual machine is to get, with all that its guest must configure.
"""

from __future__ import annotations

from enum import Enum
from ipaddress import (
    IPv4Address,
    IPv4Interface,
    IPv4Network,
    IPv6Address,
    IPv6Interface,
    IPv6Network,
)
from typing import Final, NamedTuple, NewType, TypeAlias

Mac = NewType("Mac", str)  # six pairs of lower-case hex digits with colons
Ip: TypeAlias = IPv4Address | IPv6Address
Interface: TypeAlias = IPv4Interface | IPv6Interface
Network: TypeAlias = IPv4Network | IPv6Network

# A tap's limit: what fits 65535 with an Ethernet header. Observed: Linux 6.18, `ip -d link`.
MAX_TAP_MTU: Final = 65521


class Wiring(Enum):
    """How the pod's links are joined to the virtual machine's. Kata's names of them."""

    TC_FILTER = "tcfilter"
    MACVTAP = "macvtap"
    NONE = "none"


class TapMode(NamedTuple):
    """How a tap that somebody else has made must be opened."""

    is_multi_queue: bool
    has_vnet_header: bool
    has_packet_info: bool
    is_persistent: bool


class Link(NamedTuple):
    """A network device. `lower` and `master` are indexes in the same namespace, or 0."""

    ifindex: int
    name: str
    kind: str  # netlink's: veth, macvlan, …; empty for hardware
    mac: Mac
    mtu: int
    is_up: bool
    is_loopback: bool
    is_ethernet: bool
    has_arp: bool
    master: int = 0
    lower: int = 0
    tap: TapMode | None = None


class Address(NamedTuple):
    """An address of link `link`. `is_generated`: an IPv6 link-local one made from the MAC."""

    link: int
    interface: Interface
    is_generated: bool = False


class Route(NamedTuple):
    """A unicast route of the main table. `scope` is RT_SCOPE_*; `metric` orders rivals."""

    link: int
    destination: Network
    gateway: Ip | None = None
    source: Ip | None = None
    scope: int = 0
    is_on_link: bool = False
    mtu: int = 0
    metric: int = 0
    is_kernels: bool = False


class Neighbour(NamedTuple):
    """A permanent entry of the neighbour table. `state` is NUD_*, `flags` NTF_*."""

    link: int
    address: Ip
    mac: Mac
    state: int
    flags: int = 0


class Scan(NamedTuple):
    """All of a namespace that matters. `ingress_of`: links that have an ingress qdisc already.

    `notes` are sentences on what can't be carried over.
    """

    links: tuple[Link, ...] = ()
    addresses: tuple[Address, ...] = ()
    routes: tuple[Route, ...] = ()
    neighbours: tuple[Neighbour, ...] = ()
    ingress_of: frozenset[int] = frozenset()
    notes: tuple[str, ...] = ()


class Endpoint(NamedTuple):
    """One interface of the pod, as its virtual machine gets it.

    `mtu` is what a tap can do of the link's. `carries_vlans`: VLANs of this link are links of their
    own in the namespace, so that their frames must go on to them. `tap`: the link is a tap made for
    a virtual machine, to be opened instead of wired.
    """

    ifindex: int
    name: str
    kind: str
    mac: Mac
    mtu: int
    has_arp: bool = True
    addresses: tuple[Interface, ...] = ()
    routes: tuple[Route, ...] = ()
    neighbours: tuple[Neighbour, ...] = ()
    has_ingress: bool = False
    carries_vlans: bool = False
    tap: TapMode | None = None


class Layout(NamedTuple):
    """The endpoints of a pod in the order of their indexes, and what could not be carried over."""

    endpoints: tuple[Endpoint, ...] = ()
    notes: tuple[str, ...] = ()


class RateLimits(NamedTuple):
    """Bits a second towards the guest and from it; 0 is no limit."""

    to_guest_bps: int = 0
    from_guest_bps: int = 0


class Statistics(NamedTuple):
    """What went through the pod's interface `name`, as the pod sees it."""

    name: str
    rx_bytes: int
    rx_packets: int
    rx_errors: int
    rx_dropped: int
    tx_bytes: int
    tx_packets: int
    tx_errors: int
    tx_dropped: int
