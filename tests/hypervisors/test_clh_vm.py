"""Real machines under Cloud Hypervisor: needs its program and KVM (`python -m tests.kvm_node`)."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path

import pytest
import trio

from hypervisors.accel import KVM_DEVICE
from hypervisors.errors import HttpRejected
from hypervisors.isolation import has_landlock, machine_account
from hypervisors.machine import (
    BlockDevice,
    ExitKind,
    HybridVsock,
    NetDevice,
    Rng,
    SharedDirectory,
    VmEventKind,
)
from hypervisors.virtiofsd import start_virtiofsd
from tests.harness import vmm

from . import machines, scratch_guest
from .machines import (
    BOOT_DEADLINE_S,
    all_events,
    find,
    make_tap_elsewhere,
    processes_naming,
    says,
)

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.root,
    pytest.mark.kvm,
    pytest.mark.skipif(
        bool(vmm.missing("cloud-hypervisor")), reason=vmm.missing("cloud-hypervisor") or "-"
    ),
]


def running(spec, records):
    return machines.running("cloud-hypervisor", spec, records)


@pytest.fixture
def make_spec(make_spec):
    def make(*args, **changes):
        return make_spec(*args, **{"binary": vmm.find_program("cloud-hypervisor"), **changes})

    return make


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
    assert ending.kind is kind, machine.console.tail(60)
    assert reason in ending.reason
    events = await all_events(machine)
    assert events[-1].kind is VmEventKind.EXITED
    assert (VmEventKind.PANICKED in [event.kind for event in events]) == (scenario == "panic")
    if scenario == "panic":
        assert any("Kernel panic" in line for line in machine.console.tail(60))
    # One boot: a guest that reboots is not run a second time.
    assert sum("GUEST-READY" in line for line in machine.console.tail(1000)) == 1


async def test_killed_vmm_is_reported_within_a_second_and_owns_nothing(make_spec, records):
    async with running(make_spec(), records) as machine:
        status = await trio.Path(f"/proc/{machine.pid}/status").read_text()
        assert "NoNewPrivs:\t1" in status
        tasks = Path(f"/proc/{machine.pid}/task")
        threads = [path.read_text() for path in tasks.glob("*/status")]  # noqa: ASYNC240
        confined = [find(text, "Name:")[0] for text in threads if "Seccomp:\t2" in text]
        assert {"vmm", "vcpu0", "http-server"} <= set(confined)
        account = machine_account("test", "kvm")
        assert account is not None, f"only root may open this host's {KVM_DEVICE}"
        assert "CapEff:\t0000000000000000" in status
        assert {int(word) for word in find(status, "Uid:")} == {account.uid}
        for name in ("net", "ipc", "uts"):
            assert os.readlink(f"/proc/{machine.pid}/ns/{name}") != os.readlink(
                f"/proc/self/ns/{name}"
            )
        began = time.monotonic()
        os.kill(machine.pid, signal.SIGKILL)
        ending = await machine.wait_exited()
        assert time.monotonic() - began < 1
    assert ending.kind is ExitKind.KILLED
    assert "SIGKILL" in ending.reason


async def test_console_flood_is_bounded_and_printable(make_spec, records):
    async with running(make_spec("flood", console_bytes=16384), records) as machine:
        with trio.fail_after(BOOT_DEADLINE_S):
            ending = await machine.wait_exited()
    assert ending.kind is ExitKind.CLEAN
    assert machine.console.total_bytes > 50_000
    tail = machine.console.tail(100_000)
    assert sum(map(len, tail)) <= 4 * (16384 + 4096)
    assert all(line.isprintable() and line.isascii() for line in tail)


async def test_shutdown_without_an_answering_guest_ends_the_vmm(make_spec, records):
    async with running(make_spec(), records) as machine:
        ending = await machine.shutdown(0.1)
    assert ending.kind is ExitKind.KILLED
    assert "quit" in ending.reason


async def test_devices_vcpus_and_memory_come_and_go_while_it_runs(make_spec, records, disk):
    async with running(make_spec(), records) as machine:
        await says(machine, "GUEST-READY")
        await says(machine, "STATE disks=[ ] nets=[ ] cpus=1")

        block = BlockDevice(id="disk", path=disk, read_only=True, serial="abc")
        slot = (await machine.attach(block)).pci_path
        await says(machine, f"STATE disks=[ ../devices/pci0000:00/0000:00:{slot}.0/")
        tap = make_tap_elsewhere()
        mac = "02:00:00:00:00:01"
        await machine.attach(NetDevice(id="net", mac=mac, tap_fds=(tap,), mtu=1400))
        os.close(tap)
        await says(machine, f"nets=[ {mac} ]")

        assert await machine.resize_vcpus(2) == 2
        await says(machine, "cpus=2")
        assert await machine.resize_memory(500) == 512
        await says(machine, "mem128=3.")

        await machine.pause()
        with pytest.raises(HttpRejected):
            await machine.pause()
        await machine.resume()
        for device_id in ("disk", "net"):
            await machine.detach(device_id)
        await says(machine, "disks=[ ] nets=[ ] cpus=2")
        assert sorted(machine.addresses) == ["rng"]
        # The freed slot and the freed names serve again.
        again = await machine.attach(BlockDevice(id="disk", path=disk, read_only=False))
        assert again.pci_path == slot
        assert await machine.resize_vcpus(1) == 1
        await says(machine, "cpus=1")
        # The guest keeps what it has.
        assert await machine.resize_memory(256) == 512
        machine.kill()
    kinds = [event.kind for event in await all_events(machine)]
    assert VmEventKind.PAUSED in kinds
    assert VmEventKind.RESUMED in kinds
    assert kinds.count(VmEventKind.DEVICE_REMOVED) == 2


async def test_cold_devices_have_the_addresses_that_the_guest_sees(make_spec, records, disk):
    tap = make_tap_elsewhere()
    mac = "02:00:00:00:00:02"
    devices = (
        Rng(),
        BlockDevice(id="d0", path=disk, read_only=True),
        NetDevice(id="n0", mac=mac, tap_fds=(tap,), mtu=1500),
    )
    async with running(make_spec(devices=devices), records) as machine:
        os.close(tap)
        assert sorted(machine.addresses) == ["d0", "n0", "rng"]
        slot = machine.addresses["d0"].pci_path
        await says(machine, f"STATE disks=[ ../devices/pci0000:00/0000:00:{slot}.0/")
        await says(machine, f"nets=[ {mac} ]")


@pytest.mark.parametrize("virtiofsd", scratch_guest.VIRTIOFSDS, ids=str)
async def test_share_and_vsock_reach_a_vmm_that_may_enter_no_directory_of_ours(
    make_spec, records, tmp_path, virtiofsd
):
    share = tmp_path / "share"
    share.mkdir()
    (share / "hello").write_text("from the host\n")
    fs = await start_virtiofsd(virtiofsd, share, tmp_path / "fs.sock", record=records.append)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "uds_1030"))
        listener.listen()
        spec = make_spec(
            devices=(
                SharedDirectory(id="fs", tag="kataShared", socket=tmp_path / "fs.sock"),
                HybridVsock(id="vsock", uds_path=tmp_path / "uds"),
                Rng(),
            )
        )
        try:
            async with running(spec, records) as machine:
                await says(machine, "SHARE from the host")
                await says(machine, "VSOCK 1af4:1053")
                with socket.socket(socket.AF_UNIX) as guest:
                    guest.connect(str(tmp_path / "uds"))
                    guest.settimeout(5)
                    guest.send(b"CONNECT 1024\n")
                    # Nobody listens in this guest; the device answers by closing.
                    assert guest.recv(64) == b""
                os.kill(fs.pid, signal.SIGKILL)
                with trio.fail_after(1):
                    assert (await fs.run()).signal == signal.SIGKILL
                await machine.pause()
                assert machine.exit is None
        finally:
            await fs.aclose()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["share", "uds_1030"]
    assert processes_naming(str(tmp_path)) == []


@pytest.mark.skipif(not has_landlock(), reason="this kernel has no Landlock of version 3")
async def test_vmm_sees_no_file_that_it_was_not_told_of(make_spec, records, disk, tmp_path):
    async with running(make_spec(), records) as machine:
        with pytest.raises(HttpRejected):
            await machine._devices._plug(
                "vm.add-disk", "d", {"id": "d", "path": str(disk), "image_type": "Raw"}, ()
            )


async def test_cancelled_launch_leaves_nothing(make_spec, records, tmp_path):
    from hypervisors.registry import find_hypervisor

    for delay_s in (0.0, 0.01, 0.05):
        with trio.move_on_after(delay_s):
            await find_hypervisor("clh").launch(make_spec(), record=records.append)
            pytest.skip("the machine was launched before it could be cancelled")
    assert list(tmp_path.iterdir()) == []
