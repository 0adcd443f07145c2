"""A pod's network inside its virtual machine: addresses, routes, packets; nothing left after."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from tests.harness.ctr import Ctr, fresh_id
from tests.harness.parts import VMM, find_one, find_shims
from tests.harness.patience import patient

if TYPE_CHECKING:
    from tests.harness.node import Node

pytestmark = pytest.mark.usefixtures("kata_only")

POD = "ktpod"
# What a CNI plugin leaves: a link with addresses and routes, whose other end is the node's.
# IPv6 addresses are tentative for a second or two without `nodad`. The link has no link-local
# address of the kernel's making: that would come at a time of its own between two looks.
_MAKE = f"""
ip netns add {POD}
ip link add ktpeer mtu 1420 type veth peer name eth0 netns {POD}
ip addr add 10.77.0.1/24 dev ktpeer
ip addr add fd77::1/64 dev ktpeer nodad
ip link set ktpeer mtu 1420 up
ip -n {POD} link set lo up
ip -n {POD} link set eth0 mtu 1420 address 02:00:00:77:00:02 addrgenmode none
ip -n {POD} addr add 10.77.0.2/24 dev eth0
ip -n {POD} addr add fd77::2/64 dev eth0 nodad
ip -n {POD} link set eth0 up
ip -n {POD} route add default via 10.77.0.1
ip -n {POD} -6 route add default via fd77::1
"""
_LOOK = "ip -d addr; ip route; ip -6 route; tc qdisc; tc filter show dev eth0 ingress"
_WITH_POD = ["--with-ns", f"network:/run/netns/{POD}"]
_PING = "ping -c 2 -W 5"


@pytest.fixture
def pod(node: Node) -> Iterator[str]:
    """What is in a new pod's network namespace; it must be the same again after the test."""
    node.run(["sh", "-ec", _MAKE])
    before = look(node)
    yield before
    try:
        deadline = time.monotonic() + patient(10)
        while look(node) != before and time.monotonic() < deadline:
            time.sleep(0.1)  # no event tells that a shim's `delete` is done
        assert look(node) == before
    finally:
        node.run(["sh", "-c", f"ip link del ktpeer; ip netns del {POD}; umount /run/netns; true"])


def look(node: Node) -> str:
    """Show the pod's links, addresses, routes and traffic control, but for what time changes."""
    shown = node.run(["ip", "netns", "exec", POD, "sh", "-c", _LOOK]).stdout
    timed = r"(valid_lft|preferred_lft|expires|state) \S+|NO-CARRIER,|,LOWER_UP| linkdown"
    return re.sub(timed, "", shown)


def inside(ctr: Ctr, script: str) -> str:
    done = ctr.run(fresh_id("net"), "sh", "-c", script, options=["--rm", *_WITH_POD])
    assert done.returncode == 0, done
    return done.stdout


@pytest.mark.smoke
@pytest.mark.usefixtures("pod")
def test_guest_has_the_pod_s_addresses_routes_and_mtu_and_reaches_its_peer(ctr: Ctr) -> None:
    ask = f"ip addr show eth0; ip route; ip -6 route; {_PING} 10.77.0.1 && {_PING} fd77::1"
    shown = inside(ctr, ask)
    assert "mtu 1420" in shown
    assert "02:00:00:77:00:02" in shown
    assert "10.77.0.2/24" in shown
    assert "fd77::2/64" in shown
    assert "default via 10.77.0.1 dev eth0" in shown
    assert "default via fd77::1 dev eth0" in shown
    assert shown.count(" 0% packet loss") == 2


@pytest.mark.usefixtures("pod")
@pytest.mark.parametrize("address", ["10.77.0.2", "fd77::2"])
def test_peer_reaches_a_server_in_the_guest(node: Node, ctr: Ctr, address: str) -> None:
    container = fresh_id("server")
    serve = "nc -ll -p 8080 -e seq 20000"
    ctr.start(container, *serve.split(), options=_WITH_POD)
    ask = f"busybox nc -w 5 {address} 8080 || busybox sleep 0.2"
    answer = ""
    deadline = time.monotonic() + patient(10)
    while not answer and time.monotonic() < deadline:  # until the server listens
        answer = node.run(["sh", "-c", ask], timeout_s=20).stdout
    ctr.remove(container)
    assert answer.split() == [str(number) for number in range(1, 20001)]


def test_killed_vmm_leaves_the_pod_s_namespace_as_it_was(node: Node, ctr: Ctr, pod: str) -> None:
    container = fresh_id("vmm")
    ctr.start(container, "sleep", "1000", options=_WITH_POD)
    assert look(node) != pod
    node.signal(find_one(node, VMM).pid, "KILL")
    ctr.remove(container)


def test_killed_shim_leaves_the_pod_s_namespace_as_it_was(node: Node, ctr: Ctr, pod: str) -> None:
    container = fresh_id("shim")
    ctr.start(container, "sleep", "1000", options=_WITH_POD)
    assert look(node) != pod
    (shim,) = find_shims(ctr)
    node.signal(shim.pid, "KILL")
    ctr.remove(container)


@pytest.mark.usefixtures("pod")
def test_address_that_comes_later_reaches_the_guest(node: Node, ctr: Ctr) -> None:
    container = fresh_id("later")
    ctr.start(container, "sleep", "1000", options=_WITH_POD)
    node.run(["ip", "-n", POD, "addr", "add", "10.77.0.9/24", "dev", "eth0"])
    deadline = time.monotonic() + patient(10)
    shown = ""
    while "10.77.0.9/24" not in shown and time.monotonic() < deadline:
        shown = ctr.exec(container, "ip", "addr", "show", "eth0").stdout
    ctr.remove(container)
    node.run(["ip", "-n", POD, "addr", "del", "10.77.0.9/24", "dev", "eth0"])
    assert "10.77.0.9/24" in shown
