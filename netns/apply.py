"""Carries out a plan inside of the namespace, with pyroute2.

Runs in a helper process only: the library is 30 MB and tens of milliseconds of imports, which must
not become the shim's. See docs/decisions/0007.
"""

from __future__ import annotations

import errno
import importlib.util
import sys
import types
from collections.abc import Mapping, Sequence
from typing import Final, Protocol, Self, assert_never

from netns.inside import WorkFailed
from netns.plan import (
    PRIORITY_REDIRECT,
    PRIORITY_VLAN,
    AddIngress,
    AddMacvtap,
    DeleteFilter,
    DeleteIngress,
    DeleteMacvtap,
    DeleteTap,
    Operation,
    PassVlans,
    Redirect,
    Shape,
    Unshape,
    undo,
)
from netns.revert import find, revert

# Source: linux/pkt_sched.h TC_H_CLSACT with TC_H_MIN_INGRESS; an ingress qdisc takes it as well.
_INGRESS: Final = 0xFFFF_FFF2
# Source: linux/if_ether.h
_ETH_P_ALL: Final = 0x0003
_ETH_P_8021Q: Final = 0x8100
# u32's way to say "anything".
_ANYTHING: Final = ["0x0/0x0+0"]

# A class that ingress does not have; naming one makes a filter's match final.
_ANY_CLASS: Final = 1

# What a token bucket may let through at once: 10 ms of its rate, at least two of the largest
# packets that segmentation offload hands down; more than 50 ms of it are dropped.
_BURST_S: Final = 0.01
_LEAST_BURST_BYTES: Final = 2 * 65_536
_QUEUE_S: Final = 0.05
_MOST_BYTES_A_SECOND: Final = 0xFFFF_FFFF  # tc_ratespec.rate, linux/pkt_sched.h


Action = Mapping[str, str | int]


class Netlink(Protocol):
    """What is used of pyroute2's IPRoute, which has no types."""

    def __init__(self) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, *args: object) -> None: ...
    def tc(self, command: str, kind: str, index: int, **fields: object) -> object: ...
    def link(self, command: str, **fields: object) -> object: ...


def apply(operations: Sequence[Operation]) -> None:
    """Take all steps, or none: those taken are taken back when one fails.

    Raises:
        WorkFailed: the step that failed.
    """
    iproute, refused = _load()
    taken: list[Operation] = []
    with iproute() as netlink:
        for operation in operations:
            taken.append(operation)  # also one that fails in its middle
            try:
                _take(netlink, operation)
            except (refused, OSError) as error:
                code = getattr(error, "code", None) or getattr(error, "errno", None) or errno.EIO
                raise WorkFailed(f"{operation}", code, _give_back(taken)) from error
            except BaseException:
                _give_back(taken)
                raise


def _give_back(taken: Sequence[Operation]) -> str:
    # The step that failed took nothing: what it found in its way is not ours to remove.
    steps = undo(taken[:-1])
    if isinstance(taken[-1], AddMacvtap):
        steps = undo(taken)
    try:
        revert(steps)
    except WorkFailed as error:
        return f"could not be undone: {error.operation}: errno {error.errno}"
    return ""


def _load() -> tuple[type[Netlink], type[Exception]]:
    """Import the parts of pyroute2 that are needed, without the rest.

    The package's own __init__ loads 239 modules whatever one asks for. An empty package of its name
    in front of it saves 40 % of the time; this process ends before anybody could miss the rest.
    """
    spec = importlib.util.find_spec("pyroute2")
    if "pyroute2" not in sys.modules and spec is not None:
        shell = types.ModuleType("pyroute2")
        shell.__path__ = list(spec.submodule_search_locations or ())
        sys.modules["pyroute2"] = shell
        try:
            return _import()
        except ImportError:  # another version of it, cut in another way
            for name in [name for name in sys.modules if name.split(".")[0] == "pyroute2"]:
                del sys.modules[name]
    return _import()


def _import() -> tuple[type[Netlink], type[Exception]]:
    from pyroute2.iproute.linux import IPRoute  # type: ignore[import-untyped]  # has none
    from pyroute2.netlink.exceptions import (  # type: ignore[import-untyped]  # has none
        NetlinkError,
    )

    return IPRoute, NetlinkError


def _take(netlink: Netlink, operation: Operation) -> None:
    match operation:
        case AddIngress(link, name):
            netlink.tc("add", "ingress", find(link, name))
        case Redirect(link, name, target, target_name):
            redirect: Action = {
                "kind": "mirred",
                "direction": "egress",
                "action": "redirect",
                "ifindex": find(target, target_name),
            }
            _add_filter(netlink, find(link, name), PRIORITY_REDIRECT, _ETH_P_ALL, [redirect])
        case PassVlans(link, name):
            # Having matched without an action ends the search: the frame goes on to the stack.
            _add_filter(netlink, find(link, name), PRIORITY_VLAN, _ETH_P_8021Q, [])
        case Shape(link, name, rate_bps):
            _shape(netlink, find(link, name), rate_bps)
        case AddMacvtap(name, lower, mtu):
            netlink.link("add", ifname=name, kind="macvtap", link=lower, macvtap_mode="passthru")
            netlink.link("set", index=find(0, name), mtu=mtu, state="up")
        case DeleteIngress() | DeleteFilter() | Unshape() | DeleteMacvtap() | DeleteTap():
            revert([operation])
        case _:
            assert_never(operation)


def _add_filter(
    netlink: Netlink, index: int, priority: int, protocol: int, actions: list[Action]
) -> None:
    netlink.tc(
        "add-filter", "u32", index, parent=_INGRESS, prio=priority, protocol=protocol,
        target=_ANY_CLASS, keys=_ANYTHING, action=actions,
    )  # fmt: skip


def _shape(netlink: Netlink, index: int, rate_bps: int) -> None:
    rate = min(rate_bps // 8, _MOST_BYTES_A_SECOND)
    burst = max(_LEAST_BURST_BYTES, int(rate * _BURST_S))
    limit = burst + int(rate * _QUEUE_S)
    netlink.tc("add", "tbf", index, rate=rate, burst=burst, limit=limit)
