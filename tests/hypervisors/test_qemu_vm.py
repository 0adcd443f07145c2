"""Real machines under QEMU: what only QEMU does. The rest is the contract's."""

from __future__ import annotations

import os

import pytest
import trio

from hypervisors.accel import kernel_vsock_usable
from hypervisors.machine import BlockDevice, KernelVsock

from . import machines
from .machines import says

pytestmark = [pytest.mark.e2e, pytest.mark.root]


def running(spec, records):
    return machines.running("qemu", spec, records)


async def test_vmm_has_its_own_filter_and_an_empty_root(make_spec, records):
    async with running(make_spec(), records) as machine:
        status = await trio.Path(f"/proc/{machine.pid}/status").read_text()
        assert "Seccomp:\t2" in status
        assert os.listdir(f"/proc/{machine.pid}/root") == ["dev"]
        assert os.listdir(f"/proc/{machine.pid}/root/dev") == ["null"]
        with pytest.raises(OSError, match="Read-only"):
            os.mkdir(f"/proc/{machine.pid}/root/new")


async def test_shutdown_lets_qemu_flush_its_disks(make_spec, records):
    async with running(make_spec(), records) as machine:
        ending = await machine.shutdown(0.1)
    assert "quit" in ending.reason


async def test_disks_are_behind_the_ports_in_order(make_spec, records, disk):
    async with running(make_spec(), records) as machine:
        for number, path in (("1", "10/00"), ("2", "11/00")):
            device = BlockDevice(id=f"disk{number}", path=disk, read_only=True)
            assert (await machine.attach(device)).pci_path == path


@pytest.mark.kvm
@pytest.mark.skipif(not kernel_vsock_usable(), reason="/dev/vhost-vsock does not open")
async def test_guest_finds_the_vsock_of_the_host_kernel(make_spec, records):
    vhost = os.open("/dev/vhost-vsock", os.O_RDWR | os.O_CLOEXEC)
    try:
        spec = make_spec(devices=(KernelVsock(id="vsock", cid=4242, vhost_fd=vhost),))
        async with running(spec, records) as machine:
            await says(machine, "VSOCK virtio:19")
    finally:
        os.close(vhost)
