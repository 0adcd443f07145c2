"""Taps that a VMM opens by name: lent, taken back, abandoned. Needs root and /dev/net/tun."""

from __future__ import annotations

import fcntl
import os
import struct

import pytest

from hypervisors.errors import ControlError, PreconditionFailed
from hypervisors.lent_taps import LentTaps, check_tap
from hypervisors.machine import NetDevice
from tests.harness.limitations import documented

from .machines import make_tap_elsewhere, namespace_of

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(not os.path.exists("/dev/net/tun"), reason="no /dev/net/tun"),
]

CLONE_NEWNET = 0x40000000
TUNSETIFF = 0x400454CA
TAP_FLAGS = 0x0002 | 0x1000 | 0x4000  # TAP, NO_PI, VNET_HDR
MULTI_QUEUE = 0x0100


@pytest.fixture
def tap():
    fd = make_tap_elsewhere()
    yield fd
    os.close(fd)


@pytest.fixture
def namespace(tap):
    fd = namespace_of(tap)
    yield fd
    os.close(fd)


def device(*fds):
    return NetDevice(id="net2", mac="02:00:00:00:00:01", tap_fds=fds, mtu=1500)


class Opener:
    """A process in a tap's namespace that opens it by name, as Firecracker does."""

    def __init__(self, namespace, name, flags=TAP_FLAGS):
        told, tell = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            status = b"!"
            try:
                _setns(namespace)
                fd = os.open("/dev/net/tun", os.O_RDWR)
                fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
                status = b"+"
            finally:
                os.write(tell, status)
                os.read(os.pipe()[0], 1)  # until it is killed
                os._exit(0)
        os.close(tell)
        self.has_opened = os.read(told, 1) == b"+"
        os.close(told)

    def end(self):
        os.kill(self.pid, 9)
        os.waitpid(self.pid, 0)


def _setns(namespace):
    import ctypes

    assert ctypes.CDLL(None).setns(namespace, CLONE_NEWNET) == 0


def links(namespace):
    """The names of the links in a namespace, as a process inside reads them."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            _setns(namespace)
            with open("/proc/thread-self/net/dev", encoding="ascii") as stream:
                os.write(writing, stream.read().encode())
        finally:
            os._exit(0)
    os.close(writing)
    os.waitpid(pid, 0)
    with open(reading, encoding="ascii") as stream:
        return {line.partition(":")[0].strip() for line in stream if ":" in line}


async def test_tap_is_the_vmms_by_name_ours_again_and_gone_with_the_last(tap, namespace):
    taps = LentTaps("Firecracker", namespace)
    name = taps.lend(device(tap))
    assert name == "tap0"
    opener = Opener(namespace, name)
    try:
        assert opener.has_opened
        taps.take_back(opener.pid)
        # The same descriptor, of the tap again.
        assert check_tap("Firecracker", device(tap))[0] == "tap0"
        await taps.abandon()
        assert "tap0" in links(namespace)
    finally:
        opener.end()
    assert "tap0" in links(namespace)
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, tap)
    os.close(null)
    assert "tap0" not in links(namespace)


async def test_tap_of_a_vmm_that_never_opened_it_is_taken_away(tap, namespace):
    taps = LentTaps("Firecracker", namespace)
    taps.lend(device(tap))
    assert "tap0" in links(namespace)
    with pytest.raises(ControlError, match=f"process {os.getpid()} has no tap tap0"):
        taps.take_back(os.getpid())
    await taps.abandon()
    await taps.abandon()
    assert "tap0" not in links(namespace)


def test_interface_with_several_queues_is_refused(tap):
    text = documented(
        "network device …: Firecracker's interfaces have one queue; set network_queues = 1"
    )
    with pytest.raises(PreconditionFailed, match=text):
        check_tap("Firecracker", device(tap, tap))
