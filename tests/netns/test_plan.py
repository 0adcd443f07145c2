"""Plans and their inverses on a model of the kernel: whatever the pod, undoing is exact."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netns.model import Endpoint, Layout, Mac, RateLimits, TapMode, Wiring
from netns.plan import (
    AddIngress,
    AddMacvtap,
    DeleteFilter,
    DeleteIngress,
    DeleteMacvtap,
    Operation,
    PassVlans,
    Redirect,
    Shape,
    Unshape,
    attachments,
    from_record,
    inverse,
    is_ours,
    to_record,
    undo,
    wire,
)

MODE = TapMode(is_multi_queue=True, has_vnet_header=True, has_packet_info=False, is_persistent=True)


@dataclass
class Kernel:
    """The part of a namespace that plans change. Refuses what the kernel would."""

    links: set[str]
    ingress: set[str] = field(default_factory=set)
    filters: set[tuple[str, int]] = field(default_factory=set)
    shaped: set[str] = field(default_factory=set)

    def take(self, step: Operation) -> None:
        match step:
            case AddIngress(_, name):
                assert name in self.links
                assert name not in self.ingress
                self.ingress.add(name)
            case DeleteIngress(_, name):
                self.ingress.discard(name)
                self.filters = {entry for entry in self.filters if entry[0] != name}
            case Redirect(_, name, _, target):
                self._add_filter(name, 0xBFFF)
                assert target in self.links
            case PassVlans(_, name):
                self._add_filter(name, 0xBFFE)
            case DeleteFilter(_, name, priority):
                self.filters.discard((name, priority))
            case Shape(_, name):
                assert name in self.links
                assert name not in self.shaped
                self.shaped.add(name)
            case Unshape(_, name):
                self.shaped.discard(name)
            case AddMacvtap(name):
                assert name not in self.links
                self.links.add(name)
            case DeleteMacvtap(name):
                self.links.discard(name)

    def _add_filter(self, name: str, priority: int) -> None:
        assert name in self.ingress
        assert (name, priority) not in self.filters
        self.filters.add((name, priority))


def endpoint(index: int, **changes) -> Endpoint:
    mac = Mac(f"02:00:00:00:00:{index:02x}")
    return Endpoint(ifindex=index, name=f"net{index}", kind="veth", mac=mac, mtu=1500)._replace(
        **changes
    )


endpoints = st.lists(
    st.builds(
        lambda index, ingress, vlans, tap: endpoint(
            index, has_ingress=ingress, carries_vlans=vlans, tap=MODE if tap else None
        ),
        st.integers(2, 60),
        st.booleans(),
        st.booleans(),
        st.booleans(),
    ),
    max_size=8,
    unique_by=lambda each: each.ifindex,
)
limits = st.builds(
    RateLimits,
    to_guest_bps=st.sampled_from([0, 1_000_000]),
    from_guest_bps=st.sampled_from([0, 2_000_000]),
)


def kernel_of(found: list[Endpoint], devices: set[str], wiring: Wiring) -> Kernel:
    made = devices if wiring is Wiring.TC_FILTER else set()
    has = {each.name for each in found if each.has_ingress}
    return Kernel({each.name for each in found} | made, set(has), {(name, 7) for name in has})


@given(endpoints, limits, st.sampled_from(Wiring), st.integers(0, 40))
def test_undo_after_any_number_of_steps_restores_the_kernel(found, limited, wiring, steps):
    joined = attachments(Layout(endpoints=tuple(found)), wiring, [each.name for each in found])
    plan = wire(joined, wiring, limited)
    devices = {each.device for each in joined}
    kernel = kernel_of(found, devices, wiring)
    taken = plan[:steps]
    for step in taken:
        kernel.take(step)
    for _ in range(2):  # and may be repeated
        for step in undo(taken):
            kernel.take(step)
        assert kernel == kernel_of(found, devices, wiring)


@given(endpoints, limits, st.sampled_from(Wiring))
def test_undo_survives_the_journal(found, limited, wiring):
    joined = attachments(Layout(endpoints=tuple(found)), wiring, ())
    steps = undo(wire(joined, wiring, limited))
    assert from_record(json.loads(json.dumps(to_record(steps)))) == steps
    assert all(inverse(step) is None for step in steps)


@given(endpoints, st.sampled_from(Wiring), st.sets(st.sampled_from(["tap0_kata", "mvt0_kata"])))
def test_devices_have_free_names_and_are_as_many_as_endpoints(found, wiring, taken):
    joined = attachments(Layout(endpoints=tuple(found)), wiring, taken)
    names = [each.device for each in joined]
    assert len(set(names)) == len(names) == (0 if wiring is Wiring.NONE else len(found))
    assert not set(names) & taken
    assert all(is_ours(each.device) for each in joined if each.endpoint.tap is None)


def test_the_namespace_s_own_stack_is_cut_off_last():
    (joined,) = attachments(Layout(endpoints=(endpoint(3),)), Wiring.TC_FILTER, ())
    plan = wire([joined], Wiring.TC_FILTER)
    assert plan == (
        AddIngress(0, "tap0_kata"),
        Redirect(0, "tap0_kata", 3, "net3"),
        AddIngress(3, "net3"),
        Redirect(3, "net3", 0, "tap0_kata"),
    )


def test_vlans_of_a_link_pass_before_the_rest_is_redirected():
    joined = attachments(Layout(endpoints=(endpoint(3, carries_vlans=True),)), Wiring.TC_FILTER, ())
    plan = wire(joined, Wiring.TC_FILTER)
    assert plan.index(PassVlans(3, "net3")) < plan.index(Redirect(3, "net3", 0, "tap0_kata"))


def test_known_endpoints_are_not_attached_again():
    both = Layout(endpoints=(endpoint(3), endpoint(4)))
    (late,) = attachments(both, Wiring.TC_FILTER, ["tap0_kata"], known=[3])
    assert (late.endpoint.ifindex, late.device) == (4, "tap1_kata")


@pytest.mark.parametrize("name", ["eth0", "tap0", "tapx_kata", "_kata", "br0_kata", "tap0_kata1"])
def test_name_that_is_not_ours_is_not_taken_for_ours(name):
    assert not is_ours(name)


@pytest.mark.parametrize("text", ["7", "[[]]", '[["ingress","eth0"]]', '[["rm","/"]]', "{}"])
def test_damaged_record_is_refused(text):
    with pytest.raises(ValueError, match="step"):
        from_record(json.loads(text))
