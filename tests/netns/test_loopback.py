"""Connections to a namespace's loopback, taken for the guest."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import trio

from netns.errors import KernelRefused
from netns.inside import Outcome, run_inside
from netns.loopback import Steering, steer
from tests.harness.own_process import open_descriptors
from tests.netns.pod import NEEDS_TAPS

pytestmark = NEEDS_TAPS


async def steered(path: Path) -> Steering:
    try:
        return await steer(path)
    except KernelRefused as error:
        pytest.skip(f"this kernel gives no socket-lookup programs: {error}")


def connect(address: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    sock = socket.socket(family)
    sock.settimeout(30)
    sock.connect((address, port))
    return sock


async def connected(path: Path, address: str, port: int) -> socket.socket:
    def work() -> Outcome:
        return Outcome(fds=[connect(address, port).detach()])

    (fd,) = (await run_inside(path, "connect", work)).fds
    return socket.socket(fileno=fd)


async def test_connection_to_any_port_of_the_loopback_is_taken_and_its_port_known(holder):
    holder.run("ip link set lo up")
    steering = await steered(holder.path)
    with socket.socket(fileno=steering.listener) as listener:
        for port in (80, 65535):
            with await connected(holder.path, "127.0.0.1", port) as client:
                with trio.fail_after(30):
                    await trio.lowlevel.wait_readable(listener)
                taken, _ = listener.accept()
                with taken:
                    assert taken.getsockname() == ("127.0.0.1", port)
                    taken.sendall(b"taken")
                assert client.recv(8) == b"taken"
        os.close(steering.link)


async def test_closing_the_descriptors_ends_it_and_leaves_nothing(holder):
    holder.run("ip link set lo up")
    before = open_descriptors()
    steering = await steered(holder.path)
    os.close(steering.link)
    os.close(steering.listener)
    with pytest.raises(KernelRefused):
        await connected(holder.path, "127.0.0.1", 80)
    assert open_descriptors() <= before


async def test_connections_over_other_interfaces_are_left_alone(pod, outside):
    outside.run("ip addr add 10.9.0.1/24 dev peer")
    steering = await steered(pod.path)
    with pytest.raises(KernelRefused, match="refused"):
        await connected(outside.path, "10.9.0.2", 80)
    os.close(steering.link)
    os.close(steering.listener)
