"""Real machines under QEMU: how they end, what can be plugged, what their helpers' death does."""

from __future__ import annotations

import os
import signal
import time

import pytest
import trio

from hypervisors.accel import kernel_vsock_usable
from hypervisors.isolation import machine_account
from hypervisors.machine import (
    BlockDevice,
    ExitKind,
    KernelVsock,
    NetDevice,
    SharedDirectory,
    UnixVsock,
    VmEventKind,
)
from hypervisors.registry import find_hypervisor
from hypervisors.virtiofsd import start_virtiofsd
from hypervisors.vsock_device import start_vsock_device

from . import machines, scratch_guest
from .machines import (
    BOOT_DEADLINE_S,
    all_events,
    find,
    make_tap_elsewhere,
    processes_naming,
    says,
)

pytestmark = [pytest.mark.e2e, pytest.mark.root]


def running(spec, records):
    return machines.running("qemu", spec, records)


@pytest.mark.parametrize(
    ("scenario", "kind", "reason"),
    [
        ("poweroff", ExitKind.CLEAN, "powered off"),
        ("reboot", ExitKind.REBOOT, "rebooted"),
        ("panic", ExitKind.PANIC, "panicked"),
    ],
)
async def test_ends_chosen_by_the_guest_are_told_apart(make_spec, records, scenario, kind, reason):
    async with running(make_spec(scenario), records) as machine:
        with trio.fail_after(BOOT_DEADLINE_S):
            ending = await machine.wait_exited()
    assert ending.kind is kind
    assert reason in ending.reason
    assert ending.code == 0
    events = await all_events(machine)
    assert events[-1].kind is VmEventKind.EXITED
    assert (VmEventKind.PANICKED in [event.kind for event in events]) == (scenario == "panic")
    if scenario == "panic":
        assert any("Kernel panic" in line for line in machine.console.tail(60))


async def test_killed_vmm_is_reported_within_a_second_and_owns_nothing(make_spec, records):
    async with running(make_spec(), records) as machine:
        status = await trio.Path(f"/proc/{machine.pid}/status").read_text()
        assert "Seccomp:\t2" in status
        assert "NoNewPrivs:\t1" in status
        account = machine_account("test", machine.accelerator)
        # None: only root may open this host's KVM device.
        if account is not None:
            assert "CapEff:\t0000000000000000" in status
            assert {int(word) for word in find(status, "Uid:")} == {account.uid}
            assert tuple(map(int, find(status, "Groups:"))) == account.groups
        assert os.listdir(f"/proc/{machine.pid}/root") == ["dev"]
        assert os.listdir(f"/proc/{machine.pid}/root/dev") == ["null"]
        with pytest.raises(OSError, match="Read-only"):
            os.mkdir(f"/proc/{machine.pid}/root/new")
        for name in ("net", "ipc", "uts", "mnt"):
            assert os.readlink(f"/proc/{machine.pid}/ns/{name}") != os.readlink(
                f"/proc/self/ns/{name}"
            )
        began = time.monotonic()
        os.kill(machine.pid, signal.SIGKILL)
        ending = await machine.wait_exited()
        assert time.monotonic() - began < 1
    assert ending.kind is ExitKind.KILLED
    assert ending.signal == signal.SIGKILL
    assert "SIGKILL" in ending.reason


@pytest.mark.kvm
@pytest.mark.skipif(not kernel_vsock_usable(), reason="/dev/vhost-vsock does not open")
async def test_guest_finds_the_vsock_of_the_host_kernel(make_spec, records):
    vhost = os.open("/dev/vhost-vsock", os.O_RDWR | os.O_CLOEXEC)
    try:
        spec = make_spec(devices=(KernelVsock(id="vsock", cid=4242, vhost_fd=vhost),))
        async with running(spec, records) as machine:
            await says(machine, "VSOCK 1af4:1053")
    finally:
        os.close(vhost)


async def test_console_flood_is_bounded_and_printable(make_spec, records):
    async with running(make_spec("flood", console_bytes=16384), records) as machine:
        with trio.fail_after(BOOT_DEADLINE_S):
            ending = await machine.wait_exited()
    assert ending.kind is ExitKind.CLEAN
    # `poweroff -f` loses what the guest still holds for its UART.
    assert machine.console.total_bytes > 50_000
    tail = machine.console.tail(100_000)
    assert sum(map(len, tail)) <= 4 * (16384 + 4096)  # one byte is up to 4 characters escaped
    assert all(line.isprintable() and line.isascii() for line in tail)


async def test_shutdown_without_an_answering_guest_ends_the_vmm(make_spec, records):
    async with running(make_spec(), records) as machine:
        ending = await machine.shutdown(0.1)
    assert ending.kind is ExitKind.KILLED
    assert "quit" in ending.reason


async def test_devices_vcpus_and_memory_come_and_go_while_it_runs(make_spec, records, tmp_path):
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(1 << 20))
    async with running(make_spec(), records) as machine:
        await says(machine, "GUEST-READY")
        await says(machine, "STATE disks=[ ] nets=[ ] cpus=1")

        address = await machine.attach(
            BlockDevice(id="disk", path=disk, read_only=True, serial="abc")
        )
        assert address.pci_path == "10/00"
        await says(machine, "STATE disks=[ ../devices/pci0000:00/0000:00:10.0/0000:")
        tap = make_tap_elsewhere()
        mac = "02:00:00:00:00:01"
        address = await machine.attach(NetDevice(id="net", mac=mac, tap_fds=(tap,), mtu=1400))
        os.close(tap)
        assert address.pci_path == "11/00"
        await says(machine, f"nets=[ {mac} ]")

        assert await machine.resize_vcpus(2) == 2
        await says(machine, "cpus=2")
        assert await machine.resize_memory(500) == 512
        await says(machine, "mem128=3.")

        await machine.pause()
        await machine.resume()
        for device_id in ("disk", "net"):
            await machine.detach(device_id)
        await says(machine, "disks=[ ] nets=[ ] cpus=2")
        assert sorted(machine.addresses) == ["rng"]
        # The freed port and the freed names serve again.
        again = await machine.attach(BlockDevice(id="disk", path=disk, read_only=False))
        assert again.pci_path == "10/00"
        # Under TCG this QEMU must not be asked for a vCPU back.
        assert await machine.resize_vcpus(1) == (2 if machine.accelerator == "tcg" else 1)
        # The guest keeps pages of its own in every block: it says no at once.
        with trio.fail_after(3):
            assert await machine.resize_memory(256) in (256, 512)
        machine.kill()
    kinds = [event.kind for event in await all_events(machine)]
    assert VmEventKind.PAUSED in kinds
    assert VmEventKind.RESUMED in kinds
    assert kinds.count(VmEventKind.DEVICE_REMOVED) >= 2


@pytest.mark.parametrize("virtiofsd", scratch_guest.VIRTIOFSDS, ids=str)
async def test_death_of_a_helper_is_reported_and_the_machine_still_obeys(
    make_spec, records, tmp_path, virtiofsd
):
    share = tmp_path / "share"
    share.mkdir()
    (share / "hello").write_text("from the host\n")
    fs = await start_virtiofsd(virtiofsd, share, tmp_path / "fs.sock", record=records.append)
    vsock = await start_vsock_device(
        scratch_guest.VSOCK_DEVICE, tmp_path / "vs.sock", tmp_path / "uds", record=records.append
    )
    spec = make_spec(
        devices=(
            SharedDirectory(id="fs", tag="kataShared", socket=tmp_path / "fs.sock"),
            UnixVsock(id="vsock", socket=tmp_path / "vs.sock", uds_path=tmp_path / "uds"),
        )
    )
    try:
        async with running(spec, records) as machine:
            await says(machine, "SHARE from the host")
            for helper in (fs, vsock):
                os.kill(helper.pid, signal.SIGKILL)
                with trio.fail_after(1):
                    assert (await helper.run()).signal == signal.SIGKILL
            await machine.pause()
            assert machine.exit is None
    finally:
        await fs.aclose()
        await vsock.aclose()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["share"]
    assert processes_naming(str(tmp_path)) == []


async def test_cancelled_launch_leaves_nothing(make_spec, records):
    for delay_s in (0.0, 0.01, 0.05):
        with trio.move_on_after(delay_s):
            await find_hypervisor("qemu").launch(make_spec(), record=records.append)
            pytest.skip("the machine was launched before it could be cancelled")
