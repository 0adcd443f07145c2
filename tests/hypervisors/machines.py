"""What tests of real machines share, whichever VMM runs them."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import socket
import struct
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from hypervisors.errors import HypervisorError
from hypervisors.registry import find_hypervisor
from tests.harness.patience import patient

BOOT_DEADLINE_S = patient(60)
CHANGE_DEADLINE_S = patient(30)


@asynccontextmanager
async def running(backend, spec, records):
    """Launch and supervise a machine of a backend, which may be its name; at the end it is gone."""
    if isinstance(backend, str):
        backend = find_hypervisor(backend)
    machine = await backend.launch(spec, record=records.append)
    async with trio.open_nursery() as nursery:
        await nursery.start(machine.run)
        try:
            yield machine
        finally:
            machine.kill()


@asynccontextmanager
async def running_in_order(backend, spec):
    """Launch and supervise a machine; at its end nothing of it is left in its directory."""
    async with running(backend, spec, []) as machine:
        yield machine
    assert list(spec.run_dir.iterdir()) == []


async def refused(backend, spec):
    """Return what a launch that fails says; nothing of it is left."""
    with pytest.raises(HypervisorError) as caught, trio.fail_after(patient(20)):
        await backend.launch(spec, record=lambda _: None)
    assert list(spec.run_dir.iterdir()) == []
    return str(caught.value)


async def says(machine, needle):
    """Wait until the guest has written a line with `needle`; fail with its last lines."""
    with trio.move_on_after(CHANGE_DEADLINE_S) as scope:
        await machine.console.wait_for(needle.encode())
    assert not scope.cancelled_caught, (needle, machine.console.tail(20))


def disk_at(address):
    """What the guest says of its one disk at this address: a glimpse of the path in sysfs."""
    if address.pci_path:
        slot, _, behind_a_port = address.pci_path.partition("/")
        below = "0000:" if behind_a_port else "virtio"
        return f"STATE disks=[ ../devices/pci0000:00/0000:00:{slot}.0/{below}"
    return f"{Path(address.node).name} ]"


async def all_events(machine):
    return [event async for event in machine.events]


def find(status, field):
    """The words behind `field` in a /proc/<pid>/status."""
    return next(line.split()[1:] for line in status.splitlines() if line.startswith(field))


def processes_naming(text):
    """Living processes with `text` in their arguments: a daemon's own children are not recorded."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if text in (entry / "cmdline").read_text():
                found.append(entry.name)
    return found


def make_tap_elsewhere():
    """A tap descriptor of a network namespace that nothing else is in."""
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        ctypes.CDLL(None).unshare(0x40000000)
        tun = os.open("/dev/net/tun", os.O_RDWR)
        fcntl.ioctl(tun, 0x400454CA, struct.pack("16sH22x", b"tap0", 0x0002 | 0x1000 | 0x4000))
        socket.send_fds(theirs, [b"x"], [tun])
        os._exit(0)
    with ours, theirs:
        _, fds, _, _ = socket.recv_fds(ours, 1, 1)
    os.waitpid(pid, 0)
    return fds[0]


def namespace_of(tap):
    """A descriptor of the network namespace that a tap is in. Source: linux/if_tun.h."""
    return fcntl.ioctl(tap, 0x54E3)
