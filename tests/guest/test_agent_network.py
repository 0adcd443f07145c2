"""The network of the real agent's guest: here a namespace of its own."""

from __future__ import annotations

import socket
import struct
import subprocess
from pathlib import Path

import pytest

from agent_proto.errors import AgentStatus
from agent_proto.pb import agent_pb2, types_pb2
from tests.guest.agent_process import Guest, needs_agent, running_agent

pytestmark = [needs_agent, pytest.mark.root]

MAC = "02:00:00:00:00:09"
MAKE_LINK = f"ip link add before address {MAC} type veth peer name peer && ip link set peer up"


def run_inside(guest: Guest, script: str) -> str:
    """Run a shell's commands in the agent's network namespace."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(guest.socket_path))
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    pid = struct.unpack("3i", credentials)[0]
    argv = ["nsenter", f"--net=/proc/{pid}/ns/net", "sh", "-ec", script]
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout


def interface(third: int) -> agent_pb2.UpdateInterfaceRequest:
    address = types_pb2.IPAddress(family=types_pb2.v4, address=f"10.9.{third}.2", mask="24")
    return agent_pb2.UpdateInterfaceRequest(
        interface=types_pb2.Interface(
            name="eth0", device="eth0", hwAddr=MAC, mtu=1400, IPAddresses=[address]
        )
    )


def routes(third: int) -> agent_pb2.UpdateRoutesRequest:
    route = types_pb2.Route(gateway=f"10.9.{third}.1", device="eth0", family=types_pb2.v4)
    return agent_pb2.UpdateRoutesRequest(routes=agent_pb2.Routes(Routes=[route]))


async def test_requests_that_come_together_are_carried_out_in_their_order(tmp_path: Path) -> None:
    async with running_agent(tmp_path) as guest:
        run_inside(guest, MAKE_LINK)
        # No gateway is reachable but by the address that was asked for just before it.
        requests = [make(third) for third in range(20) for make in (interface, routes)]
        await guest.client.do_in_order(*requests)
        (route,) = (await guest.client.list_routes()).Routes
        assert (route.gateway, route.device) == ("10.9.19.1", "eth0")
        links = {link.name: link for link in (await guest.client.list_interfaces()).Interfaces}
        (address,) = [one for one in links["eth0"].IPAddresses if one.family == types_pb2.v4]
        assert (address.address, links["eth0"].mtu) == ("10.9.19.2", 1400)


async def test_addresses_and_routes_of_before_are_taken_away(tmp_path: Path) -> None:
    async with running_agent(tmp_path) as guest:
        run_inside(guest, f"{MAKE_LINK}; ip addr add 10.8.0.2/24 dev before; ip link set before up")
        run_inside(guest, "ip route add 10.7.0.0/16 via 10.8.0.1")
        await guest.client.do_in_order(interface(1), routes(1))
        shown = run_inside(guest, "ip addr; ip route")
        assert "10.8.0.2" not in shown
        assert "10.7.0.0" not in shown
        assert "default via 10.9.1.1 dev eth0" in shown


async def test_interface_that_is_not_there_is_named(tmp_path: Path) -> None:
    async with running_agent(tmp_path) as guest:
        with pytest.raises(AgentStatus, match=MAC):
            await guest.client.do_in_order(interface(1), routes(1))
