"""Endpoints -> what to do to the namespace's links, each step with its inverse. Pure.

With tc (the default), for the pod's link L and the virtual machine's tap T:

    peer ──> L ingress ──u32 all──> mirred redirect ──> T egress ──> guest
    peer <── L egress  <── mirred redirect <──u32 all── T ingress <── guest

With macvtap, a macvtap in passthru mode on L takes what L receives. In both, the addresses stay on
L in the namespace: its own stack sees no frame any more (tc), or answers the same as the guest
(macvtap), and taking the plan back leaves the namespace as it was.

Taps have no step here: they go with their last descriptor. Only one that is let go of for a while,
for a virtual machine monitor that opens it by name, has a step of the way back.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple, TypeAlias, assert_never

from netns.model import Endpoint, Layout, RateLimits, Wiring

# Kata's name for them; the number keeps clear of what is there already.
_TAP_NAME: Final = "tap{}_kata"
_MACVTAP_NAME: Final = "mvt{}_kata"

# Of the filters on one link lower priorities go first. Far above what people choose by hand, so
# that a filter of somebody else's on the same hook keeps its turn.
PRIORITY_VLAN: Final = 0xBFFE
PRIORITY_REDIRECT: Final = 0xBFFF


class AddIngress(NamedTuple):
    """Give `link` an ingress qdisc."""

    link: int
    name: str


class DeleteIngress(NamedTuple):
    """Remove the ingress qdisc of `link`, and its filters with it."""

    link: int
    name: str


class Redirect(NamedTuple):
    """Send every frame that `link` (named `name`) receives out of the link named `target`.

    A link of ours has index 0 here: it is found by its name.
    """

    link: int
    name: str
    target: int
    target_name: str


class PassVlans(NamedTuple):
    """Let frames with a VLAN tag go on to the VLAN's own link."""

    link: int
    name: str


class DeleteFilter(NamedTuple):
    """Remove the filter of `priority` from `link`'s ingress."""

    link: int
    name: str
    priority: int


class Shape(NamedTuple):
    """Let `link` send at most `rate_bps` bits a second."""

    link: int
    name: str
    rate_bps: int


class Unshape(NamedTuple):
    """Take `Shape` back."""

    link: int
    name: str


class AddMacvtap(NamedTuple):
    """Make the macvtap `name` on `lower`, in passthru mode, and set it up."""

    name: str
    lower: int
    mtu: int


class DeleteMacvtap(NamedTuple):
    """Remove the macvtap `name`, if it is one."""

    name: str


class DeleteTap(NamedTuple):
    """Remove the tap `name`, if it is one."""

    name: str


Operation: TypeAlias = (
    AddIngress
    | DeleteIngress
    | Redirect
    | PassVlans
    | DeleteFilter
    | Shape
    | Unshape
    | AddMacvtap
    | DeleteMacvtap
    | DeleteTap
)


class Attachment(NamedTuple):
    """An endpoint and the link (`device`) whose descriptors the virtual machine gets."""

    endpoint: Endpoint
    device: str


def is_ours(name: str) -> bool:
    """Tell whether a link has a name as we give them."""
    stem = name.removesuffix("_kata")
    return stem != name and stem[:3] in ("tap", "mvt") and stem[3:].isdigit()


def attachments(
    layout: Layout, wiring: Wiring, taken: Iterable[str], *, known: Iterable[int] = ()
) -> tuple[Attachment, ...]:
    """Name a device for each endpoint whose index isn't `known`; `taken` are names in use.

    An endpoint that is a tap for a virtual machine is its own device, whatever the wiring.
    """
    if wiring is Wiring.NONE:
        return ()
    pattern = _MACVTAP_NAME if wiring is Wiring.MACVTAP else _TAP_NAME
    used, old = set(taken), set(known)
    chosen: list[Attachment] = []
    for endpoint in layout.endpoints:
        if endpoint.ifindex in old:
            continue
        device = endpoint.name if endpoint.tap is not None else _free(pattern, used)
        used.add(device)
        chosen.append(Attachment(endpoint=endpoint, device=device))
    return tuple(chosen)


def _free(pattern: str, used: set[str]) -> str:
    number = 0
    while pattern.format(number) in used:
        number += 1
    return pattern.format(number)


def wire(
    joined: Sequence[Attachment], wiring: Wiring, limits: RateLimits | None = None
) -> tuple[Operation, ...]:
    """Plan the steps that join each attachment's endpoint and device."""
    limits = limits or RateLimits()
    steps: list[Operation] = []
    for attachment in joined:
        endpoint, device = attachment.endpoint, attachment.device
        if endpoint.tap is None and wiring is Wiring.TC_FILTER:
            steps += _redirects(endpoint, device)
        elif endpoint.tap is None and wiring is Wiring.MACVTAP:
            steps.append(AddMacvtap(device, endpoint.ifindex, endpoint.mtu))
        if endpoint.tap is None and limits.from_guest_bps:
            steps.append(Shape(endpoint.ifindex, endpoint.name, limits.from_guest_bps))
        if wiring is Wiring.TC_FILTER and limits.to_guest_bps:
            own = 0 if endpoint.tap is None else endpoint.ifindex
            steps.append(Shape(own, device, limits.to_guest_bps))
    return tuple(steps)


def _redirects(endpoint: Endpoint, tap: str) -> list[Operation]:
    index, name = endpoint.ifindex, endpoint.name
    steps: list[Operation] = [AddIngress(0, tap), Redirect(0, tap, index, name)]
    if not endpoint.has_ingress:
        steps.append(AddIngress(index, name))
    if endpoint.carries_vlans:
        steps.append(PassVlans(index, name))
    # Last: from here on the namespace's own stack hears nothing on this link.
    steps.append(Redirect(index, name, 0, tap))
    return steps


def inverse(operation: Operation) -> Operation | None:
    """Give the step that takes `operation` back; None for one that only takes back."""
    match operation:
        case AddIngress(link, name):
            return DeleteIngress(link, name)
        case Redirect(link, name):
            return DeleteFilter(link, name, PRIORITY_REDIRECT)
        case PassVlans(link, name):
            return DeleteFilter(link, name, PRIORITY_VLAN)
        case Shape(link, name):
            return Unshape(link, name)
        case AddMacvtap(name):
            return DeleteMacvtap(name)
        case DeleteIngress() | DeleteFilter() | Unshape() | DeleteMacvtap() | DeleteTap():
            return None
        case _:
            assert_never(operation)


def undo(operations: Sequence[Operation]) -> tuple[Operation, ...]:
    """Plan the way back from `operations`, last first. Every step of it may find nothing to do."""
    steps = (inverse(operation) for operation in reversed(operations))
    return tuple(step for step in steps if step is not None)


def to_record(steps: Sequence[Operation]) -> list[list[str | int]]:
    """Write the steps of an undo as plain lists, for a journal. `from_record` reads them."""
    return [_written(step) for step in steps]


def _written(step: Operation) -> list[str | int]:
    match step:
        case DeleteIngress(link, name):
            return ["ingress", link, name]
        case Unshape(link, name):
            return ["shape", link, name]
        case DeleteFilter(link, name, priority):
            return ["filter", link, name, priority]
        case DeleteMacvtap(name):
            return ["macvtap", name]
        case DeleteTap(name):
            return ["tap", name]
        case _:
            raise TypeError(f"{step} is no step of an undo")


def from_record(record: object) -> tuple[Operation, ...]:
    """Read what `to_record` wrote.

    Raises:
        ValueError: it is something else.
    """
    if not isinstance(record, list):
        raise ValueError("not a list of steps")
    steps: list[Operation] = []
    for item in record:
        match item:
            case ["ingress", int(link), str(name)]:
                steps.append(DeleteIngress(link, name))
            case ["shape", int(link), str(name)]:
                steps.append(Unshape(link, name))
            case ["filter", int(link), str(name), int(priority)]:
                steps.append(DeleteFilter(link, name, priority))
            case ["macvtap", str(name)]:
                steps.append(DeleteMacvtap(name))
            case ["tap", str(name)]:
                steps.append(DeleteTap(name))
            case _:
                raise ValueError(f"{item!r} is no step of an undo")
    return tuple(steps)
