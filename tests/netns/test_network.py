"""A pod's network wired for real: packets, tear-down, failures, late interfaces."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import sys
from functools import partial
from ipaddress import ip_address, ip_interface, ip_network
from pathlib import Path

import pytest
import trio
import trio.testing

from netns.errors import (
    HelperLost,
    HostNamespace,
    KernelRefused,
    NamespaceGone,
    UnsupportedLink,
)
from netns.inside import Outcome, run_inside
from netns.model import RateLimits, Wiring
from netns.network import PodNetwork, UndoRecord, undo_recorded, undo_recorded_live
from netns.plan import AddIngress, attachments, wire
from tests.harness.limitations import documented
from tests.harness.own_process import open_descriptors
from tests.netns.pod import NEEDS_TAPS, OUTSIDE, POD, ROUTES, Holder

pytestmark = NEEDS_TAPS

MAC = "02:00:00:00:00:07"
ETHERTYPE = 0x88B5  # for local experiments: IEEE 802
VNET_HEADER = bytes(12)
WIRINGS = [Wiring.TC_FILTER, Wiring.MACVTAP]
TUNSETPERSIST = 0x400454CB


def unrecorded(_: UndoRecord) -> None:
    """Throw the record away."""


def frame(text: bytes, to: bytes = b"\xff" * 6, sender: bytes = b"\x02\0\0\0\0\x01") -> bytes:
    return to + sender + struct.pack("!H", ETHERTYPE) + text.ljust(50, b".")


async def packet_socket(inside: Holder, link: str) -> socket.socket:
    """A raw socket on a link of another namespace."""

    def make() -> Outcome:
        kind = socket.SOCK_RAW | socket.SOCK_NONBLOCK
        sock = socket.socket(socket.AF_PACKET, kind, socket.htons(ETHERTYPE))
        sock.bind((link, ETHERTYPE))
        return Outcome(fds=[sock.detach()])

    (fd,) = (await run_inside(inside.path, "packet socket", make)).fds
    return socket.socket(fileno=fd)


async def next_frame(fd: int, text: bytes, skip: int) -> bytes:
    """Read from a tap or packet socket until the frame with `text` comes."""
    with trio.fail_after(30):
        while True:
            await trio.lowlevel.wait_readable(fd)
            data = os.read(fd, 65536)[skip:]
            if text in data:
                return data


@pytest.mark.parametrize("wiring", WIRINGS)
async def test_frames_pass_between_tap_and_peer_both_ways(pod, outside, wiring):
    network = await PodNetwork.open(pod.path, unrecorded, wiring=wiring)
    try:
        await network.wire()
        (tap,) = network.attached[0].fds
        with await packet_socket(outside, "peer") as peer:
            os.write(
                tap, VNET_HEADER + frame(b"from the guest", sender=bytes.fromhex("020000000007"))
            )
            assert b"from the guest" in await next_frame(peer.fileno(), b"from the guest", 0)
            peer.send(frame(b"to the guest", to=bytes.fromhex("020000000007")))
            assert b"to the guest" in await next_frame(tap, b"to the guest", len(VNET_HEADER))
        (counted,) = network.statistics()
        assert counted.name == "eth0"
        assert counted.rx_packets >= 1
        assert counted.tx_packets >= 1
    finally:
        assert await network.aclose() == []


@pytest.mark.parametrize("wiring", WIRINGS)
@pytest.mark.parametrize("queues", [1, 3])
async def test_tear_down_leaves_the_namespace_as_it_was(pod, outside, wiring, queues):
    pod.run(ROUTES)
    before, fds = pod.everything(), open_descriptors()
    records: list[UndoRecord] = []
    network = await PodNetwork.open(pod.path, records.append, wiring=wiring, queues=queues)
    await network.wire()
    assert len(network.attached[0].fds) == queues
    assert pod.everything() != before
    assert await network.aclose() == []
    assert pod.everything() == before
    assert await network.aclose() == []
    assert undo_recorded(records[-1]._asdict()) is None
    assert pod.everything() == before
    assert open_descriptors() <= fds


@pytest.mark.parametrize("is_wired", [False, True])
async def test_tap_that_is_lent_and_stays_is_taken_away_by_the_record(pod, outside, is_wired):
    before = pod.everything()
    records: list[UndoRecord] = []
    network = await PodNetwork.open(pod.path, records.append, lends_taps=True)
    fcntl.ioctl(network.attached[0].fds[0], TUNSETPERSIST, 1)
    if is_wired:
        await network.wire()
    network.close_taps()  # as a shim that was killed
    assert pod.everything() != before
    assert undo_recorded(records[-1]._asdict()) is None
    assert pod.everything() == before
    assert await network.aclose() == []


async def test_everything_of_the_pod_is_found(pod, outside):
    pod.run(ROUTES)
    network = await PodNetwork.open(pod.path, unrecorded, wiring=Wiring.NONE)
    await network.aclose()
    (endpoint,) = network.layout.endpoints
    assert (endpoint.name, endpoint.kind, endpoint.mac) == ("eth0", "veth", MAC)
    assert (endpoint.mtu, endpoint.has_arp) == (1450, True)
    assert set(endpoint.addresses) == {ip_interface("10.9.0.2/24"), ip_interface("fd00:9::2/64")}
    routes = {route.destination: route for route in endpoint.routes}
    assert set(routes) == {
        ip_network("0.0.0.0/0"),
        ip_network("10.7.0.0/16"),
        ip_network("169.254.1.1/32"),
        ip_network("::/0"),
    }
    assert endpoint.routes[0].gateway is None
    special = routes[ip_network("10.7.0.0/16")]
    assert (special.gateway, special.source) == (ip_address("10.9.0.9"), ip_address("10.9.0.2"))
    assert special.mtu == 1400
    assert routes[ip_network("169.254.1.1/32")].scope == 253
    (neighbour,) = endpoint.neighbours
    assert (neighbour.address, neighbour.mac) == (ip_address("10.9.0.1"), "02:00:00:00:00:01")
    assert network.notes == ()
    assert network.attached == ()


async def test_link_local_address_somebody_chose_is_kept(pod, outside):
    pod.run("ip addr add fe80::7/64 dev eth0 nodad")
    network = await PodNetwork.open(pod.path, unrecorded)
    await network.aclose()
    (endpoint,) = network.layout.endpoints
    assert ip_interface("fe80::7/64") in endpoint.addresses
    assert len(endpoint.addresses) == 3


async def test_each_of_ten_interfaces_has_its_own_tap(pod, outside):
    for number in range(1, 10):
        pod.run(
            f"ip link add net{number} type veth peer name peer{number} netns {outside.pid}; "
            f"ip addr add 10.8.{number}.2/24 dev net{number}; "
            f"ip link set net{number} addrgenmode none up"
        )
        outside.run(f"ip link set peer{number} up")
    before = pod.everything()
    network = await PodNetwork.open(pod.path, unrecorded)
    await network.wire()
    assert [each.attachment.device for each in network.attached] == [
        f"tap{number}_kata" for number in range(10)
    ]
    with await packet_socket(outside, "peer7") as peer:
        peer.send(frame(b"for seven"))
        await next_frame(network.attached[7].fds[0], b"for seven", len(VNET_HEADER))
    await network.aclose()
    assert pod.everything() == before


async def test_macvlan_in_the_pod_is_wired(holder, outside):
    outside.run(
        "ip link add under type veth peer name far; ip link set under up; ip link set far up; "
        f"ip link add link under name eth0 netns {holder.pid} type macvlan mode bridge"
    )
    holder.run("ip addr add 10.9.0.2/24 dev eth0; ip link set eth0 addrgenmode none up")
    before = holder.everything()
    network = await PodNetwork.open(holder.path, unrecorded)
    try:
        assert network.layout.endpoints[0].kind == "macvlan"
        await network.wire()
        (tap,) = network.attached[0].fds
        with await packet_socket(outside, "far") as far:
            mac = bytes.fromhex(network.layout.endpoints[0].mac.replace(":", ""))
            os.write(tap, VNET_HEADER + frame(b"hello", sender=mac))
            await next_frame(far.fileno(), b"hello", 0)
            far.send(frame(b"answer", to=mac))
            await next_frame(tap, b"answer", len(VNET_HEADER))
    finally:
        await network.aclose()
    assert holder.everything() == before


async def test_tap_made_for_a_virtual_machine_is_opened_as_it_is(holder):
    holder.run("ip tuntap add dev eth0 mode tap vnet_hdr; ip addr add 10.9.0.2/24 dev eth0")
    holder.run("ip link set eth0 up")
    # Not more: the carrier that a holder brings makes the kernel's IPv6 wake up.
    shown = "ip -o -4 addr; tc qdisc; ip -o link | wc -l"
    before = holder.run(shown)
    network = await PodNetwork.open(holder.path, unrecorded, queues=2)
    await network.wire()
    (attached,) = network.attached
    assert attached.attachment.device == "eth0"
    assert len(attached.fds) == 1
    await network.aclose()
    assert holder.run(shown) == before


async def test_namespace_without_interfaces_is_fine(holder):
    network = await PodNetwork.open(holder.path, unrecorded)
    await network.wire()
    assert network.attached == ()
    assert network.statistics() == ()
    assert await network.aclose() == []


async def test_host_s_own_namespace_is_refused_by_any_name(tmp_path):
    (tmp_path / "link").symlink_to("/proc/self/ns/net")
    paths = [Path("/proc/self/ns/net"), Path(f"/proc/{os.getpid()}/ns/net"), tmp_path / "link"]
    if os.access("/proc/1/ns/net", os.R_OK):
        paths.append(Path("/proc/1/ns/net"))
    for path in paths:
        with pytest.raises(HostNamespace, match="host's network namespace"):
            await PodNetwork.open(path, unrecorded)


async def test_missing_namespace_and_other_kinds_are_named(tmp_path):
    for path in (tmp_path / "gone", Path("/proc/self/ns/mnt"), Path("/dev/null")):
        with pytest.raises(NamespaceGone, match=str(path)):
            await PodNetwork.open(path, unrecorded)


async def test_namespace_outlives_the_process_it_was_named_by(outside):
    short = Holder()
    short.run(POD.format(outside=outside.pid))
    network = await PodNetwork.open(short.path, unrecorded)
    short.close()
    await network.wire()
    assert len(network.statistics()) == 1
    assert await network.aclose() == []


async def test_undo_of_a_namespace_that_is_gone_is_fine(outside):
    short = Holder()
    short.run(POD.format(outside=outside.pid))
    records: list[UndoRecord] = []
    network = await PodNetwork.open(short.path, records.append)
    await network.wire()
    await network.aclose()
    short.close()
    assert undo_recorded(records[-1]._asdict()) is None
    assert await undo_recorded_live(records[-1]._asdict()) is None


@pytest.mark.parametrize("is_live", [False, True])
async def test_killed_shim_s_wiring_is_undone_from_its_record(pod, outside, is_live):
    async def undo(fields):
        return await undo_recorded_live(fields) if is_live else undo_recorded(fields)

    before = pod.everything()
    records: list[UndoRecord] = []
    network = await PodNetwork.open(pod.path, records.append)
    await network.wire()
    network.close_taps()  # as the kernel does for the dead
    assert pod.everything() != before
    other = records[-1]._asdict() | {"inode": 1}
    assert await undo(other) is None
    assert pod.everything() != before
    assert await undo(records[-1]._asdict()) is None
    assert await undo(records[-1]._asdict()) is None
    assert pod.everything() == before
    await network.aclose()


async def test_ingress_qdisc_that_was_there_stays_with_its_filters(pod, outside):
    pod.run(
        "tc qdisc add dev eth0 clsact; tc filter add dev eth0 ingress prio 7 protocol ip "
        "u32 match ip dst 10.9.0.77 flowid :1"
    )
    before = pod.everything()
    network = await PodNetwork.open(pod.path, unrecorded)
    await network.wire()
    assert "mirred" in pod.everything()
    await network.aclose()
    assert pod.everything() == before


async def test_failure_in_the_middle_is_undone_and_keeps_what_was_in_the_way(pod, outside):
    network = await PodNetwork.open(pod.path, unrecorded)
    pod.run("tc qdisc add dev eth0 ingress")  # behind our back
    before = pod.everything()
    with pytest.raises(KernelRefused, match=r"AddIngress.*eth0"):
        await network.wire()
    assert pod.everything() == before
    await network.aclose()
    assert "ingress" in pod.run("tc qdisc show dev eth0")


async def test_cancelled_wiring_is_undone(pod, outside):
    before = pod.everything()
    network = await PodNetwork.open(pod.path, unrecorded)
    with trio.move_on_after(0.02):
        await network.wire()
    assert await network.aclose() == []
    assert pod.everything() == before


async def test_cancelled_opening_leaves_nothing(pod, outside):
    before, fds = pod.everything(), open_descriptors()
    with trio.CancelScope() as scope:
        scope.cancel()
        await PodNetwork.open(pod.path, unrecorded)
    assert scope.cancelled_caught
    assert pod.everything() == before
    assert open_descriptors() <= fds


async def test_foreign_tap_with_our_name_is_left_alone(pod, outside):
    pod.run("ip tuntap add dev tap0_kata mode tap; ip link set tap0_kata up")
    before = pod.everything()
    network = await PodNetwork.open(pod.path, unrecorded)
    await network.wire()
    assert [each.attachment.device for each in network.attached] == ["tap1_kata"]
    await network.aclose()
    assert pod.everything() == before


async def test_link_of_the_largest_mtu_is_cut_to_a_tap_s(holder, outside):
    holder.run(POD.format(outside=outside.pid).replace("1450", "65535"))
    outside.run(OUTSIDE.replace("1450", "65535"))
    network = await PodNetwork.open(holder.path, unrecorded)
    await network.aclose()
    assert network.layout.endpoints[0].mtu == 65521
    assert any("65521" in note for note in network.notes)


async def test_link_without_ethernet_frames_is_refused(holder):
    fds = open_descriptors()
    holder.run("ip tuntap add dev vpn mode tun; ip addr add 10.1.0.1/24 dev vpn")
    with pytest.raises(
        UnsupportedLink,
        match=documented("network interface … cannot be given to a virtual machine: …"),
    ):
        await PodNetwork.open(holder.path, unrecorded)
    assert open_descriptors() <= fds


async def test_rate_limits_shape_both_directions_and_go_again(pod, outside):
    before = pod.everything()
    limits = RateLimits(to_guest_bps=80_000_000, from_guest_bps=8_000_000)
    network = await PodNetwork.open(pod.path, unrecorded, limits=limits)
    await network.wire()
    assert "rate 8Mbit" in pod.run("tc qdisc show dev eth0")
    assert "rate 80Mbit" in pod.run("tc qdisc show dev tap0_kata")
    await network.aclose()
    assert pod.everything() == before


async def test_late_interface_is_told_and_wired(holder, outside):
    network = await PodNetwork.open(holder.path, unrecorded)
    await network.wire()
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(network.wait_changed)
            await trio.testing.wait_all_tasks_blocked()
            holder.run(POD.format(outside=outside.pid))
            outside.run(OUTSIDE)
    (late,) = await network.rescan()
    assert late.attachment.endpoint.name == "eth0"
    await network.wire()
    with await packet_socket(outside, "peer") as peer:
        peer.send(frame(b"late"))
        await next_frame(late.fds[0], b"late", len(VNET_HEADER))
    assert await network.rescan() == ()
    await network.aclose()
    assert "tc filter" not in (shown := holder.everything())
    assert "mirred" not in shown
    assert "tap0_kata" not in shown


async def test_our_own_taps_do_not_count_as_a_change(pod, outside):
    network = await PodNetwork.open(pod.path, unrecorded)
    with trio.move_on_after(0.3):  # the veth's own carrier may still be coming up
        await network.wait_changed()
    await network.wire()
    with trio.move_on_after(0.2) as quiet:
        await network.wait_changed()
    assert quiet.cancelled_caught
    await network.aclose()


async def test_caller_does_not_load_pyroute2(pod, outside):
    loaded = {name for name in sys.modules if name.startswith("pyroute2")}
    network = await PodNetwork.open(pod.path, unrecorded)
    await network.wire()
    await network.aclose()
    assert {name for name in sys.modules if name.startswith("pyroute2")} == loaded


async def test_thousands_of_routes_are_read_whole(pod, outside):
    count = 3000
    batch = "\n".join(
        f"route add 10.{64 + number // 256}.{number % 256}.0/24 via 10.9.0.1"
        for number in range(count)
    )
    pod.run(f"ip -batch - <<'EOF'\n{batch}\nEOF")
    network = await PodNetwork.open(pod.path, unrecorded)
    await network.aclose()
    assert len(network.layout.endpoints[0].routes) == count


async def test_helper_that_is_killed_while_it_answers_leaves_no_descriptor(pod):
    def half() -> Outcome:
        os.write(1, b"")
        return Outcome(bytes(1 << 20), [os.open("/dev/null", os.O_RDONLY)])

    fds = open_descriptors()
    outcome = await run_inside(pod.path, "much", half)
    assert len(outcome.payload) == 1 << 20
    os.close(outcome.fds[0])
    with pytest.raises(HelperLost):
        await run_inside(pod.path, "much", partial(half), timeout_s=0.0)
    assert open_descriptors() <= fds


async def test_plan_of_the_real_pod_adds_no_second_ingress(pod, outside):
    pod.run("tc qdisc add dev eth0 ingress")
    network = await PodNetwork.open(pod.path, unrecorded, wiring=Wiring.NONE)
    await network.aclose()
    joined = attachments(network.layout, Wiring.TC_FILTER, ())
    steps = wire(joined, Wiring.TC_FILTER)
    assert [step.name for step in steps if isinstance(step, AddIngress)] == ["tap0_kata"]
