"""What `hypervisors/base.py` promises about a machine whose guest is up, on every backend here.

The other half of test_contract.py: real programs only, and one boot a test. The guest is
scratch_guest.py's, which says on its console what it sees. A test looks for what the backend says
it can (`Capabilities`), and nothing below knows which backend it is.
"""

from __future__ import annotations

import os
import signal
import socket
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest
import trio

from hypervisors.errors import DetachRefused
from hypervisors.isolation import machine_account
from hypervisors.machine import (
    BlockDevice,
    ExitKind,
    HybridVsock,
    KernelVsock,
    NetDevice,
    Rng,
    SharedDirectory,
    UnixVsock,
    VmEventKind,
)
from hypervisors.registry import find_hypervisor
from hypervisors.virtiofsd import start_virtiofsd
from hypervisors.vsock_device import start_vsock_device
from tests.harness import vmm
from tests.harness.patience import patient

from . import scratch_guest
from .machines import (
    BOOT_DEADLINE_S,
    all_events,
    disk_at,
    find,
    make_tap_elsewhere,
    namespace_of,
    processes_naming,
    running,
    says,
)

if TYPE_CHECKING:
    from hypervisors.helper import Helper

pytestmark = [pytest.mark.e2e, pytest.mark.root]

CID = 4242
# A guest that wants its machine to end has no other way everywhere but one of the two.
ENDED_BY_GUEST = (ExitKind.CLEAN, ExitKind.REBOOT)


@pytest.fixture(params=vmm.SETUPS)
def backend(request):
    if why := vmm.missing(request.param):
        pytest.skip(why)
    return find_hypervisor(request.param.partition(":")[0])


@pytest.fixture
def make_spec(backend, make_spec, request):
    """As the other tests' one, for this backend's program and machine type."""
    fields = vmm.fields_of(request.node.callspec.params["backend"])

    def make(*args, **changes):
        return make_spec(*args, **{**fields, **changes})

    return make


@pytest.mark.parametrize(
    ("scenario", "kind"),
    [
        ("poweroff", ExitKind.CLEAN),
        ("reboot", ExitKind.REBOOT),
        ("panic", ExitKind.PANIC),
    ],
)
async def test_ends_chosen_by_the_guest_are_told_apart(backend, make_spec, records, scenario, kind):
    spec = make_spec(scenario)
    if scenario == "poweroff" and not backend.capabilities(spec).power_off:
        pytest.skip(f"{backend.name} does not learn that its guest has switched itself off")
    tells_panic = backend.capabilities(spec).panic_event
    async with running(backend, spec, records) as machine:
        with trio.fail_after(BOOT_DEADLINE_S):
            ending = await machine.wait_exited()
    said = machine.console.tail(1000)
    if scenario == "panic":
        assert any("Kernel panic" in line for line in said)
    if scenario != "panic" or tells_panic:
        assert ending.kind is kind, said[-60:]
    else:
        assert ending.kind in ENDED_BY_GUEST
    events = await all_events(machine)
    assert events[-1].kind is VmEventKind.EXITED
    is_panic = scenario == "panic" and tells_panic
    assert (VmEventKind.PANICKED in [event.kind for event in events]) == is_panic
    # One boot: a guest that reboots is not run a second time, without its containers.
    assert sum("GUEST-READY" in line for line in said) == 1


async def test_killed_vmm_is_reported_within_a_second_and_owns_nothing(backend, make_spec, records):
    async with running(backend, make_spec(), records) as machine:
        status = await trio.Path(f"/proc/{machine.pid}/status").read_text()
        assert "NoNewPrivs:\t1" in status
        account = machine_account("test", machine.accelerator)
        # None: only root may open this host's KVM device.
        if account is not None:
            assert "CapEff:\t0000000000000000" in status
            assert {int(word) for word in find(status, "Uid:")} == {account.uid}
            assert set(map(int, find(status, "Groups:"))) <= set(account.groups)
        for name in ("net", "ipc", "uts", "mnt"):
            assert os.readlink(f"/proc/{machine.pid}/ns/{name}") != os.readlink(
                f"/proc/self/ns/{name}"
            )
        os.kill(machine.pid, signal.SIGKILL)
        with trio.fail_after(patient(30)):
            ending = await machine.wait_exited()
    assert ending.kind is ExitKind.KILLED
    assert ending.signal == signal.SIGKILL
    assert "SIGKILL" in ending.reason


async def test_console_flood_is_bounded_and_printable(backend, make_spec, records):
    async with running(backend, make_spec("flood", console_bytes=16384), records) as machine:
        with trio.fail_after(BOOT_DEADLINE_S):
            ending = await machine.wait_exited()
    assert ending.kind in ENDED_BY_GUEST
    # `reboot -f` loses what the guest still holds for its UART.
    assert machine.console.total_bytes > 50_000
    tail = machine.console.tail(100_000)
    assert sum(map(len, tail)) <= 4 * (16384 + 4096)  # one byte is up to 4 characters escaped
    assert all(line.isprintable() and line.isascii() for line in tail)


async def test_shutdown_without_an_answering_guest_ends_the_vmm(backend, make_spec, records):
    async with running(backend, make_spec(), records) as machine:
        with trio.fail_after(BOOT_DEADLINE_S):
            ending = await machine.shutdown(0.1)
    assert ending.kind is ExitKind.KILLED
    assert machine.exit == ending


async def test_devices_come_and_go_while_it_runs(backend, make_spec, records, disk):
    spec = make_spec()
    can = backend.capabilities(spec)
    if not can.block_hotplug:
        pytest.skip(f"{backend.name} takes no disks while it runs")
    async with running(backend, spec, records) as machine:
        await says(machine, "GUEST-READY")
        await says(machine, "STATE disks=[ ] nets=[ ]")
        first = await machine.attach(
            BlockDevice(id="disk", path=disk, read_only=True, serial="abc")
        )
        await says(machine, disk_at(first))
        if can.net_hotplug:
            tap = make_tap_elsewhere()
            mac = "02:00:00:00:00:01"
            await machine.attach(NetDevice(id="net", mac=mac, tap_fds=(tap,), mtu=1400))
            os.close(tap)
            await says(machine, f"nets=[ {mac} ]")
            await machine.detach("net")
        if not can.block_unplug:
            with pytest.raises(DetachRefused):
                await machine.detach("disk")
            return
        await machine.detach("disk")
        await says(machine, "STATE disks=[ ] nets=[ ]")
        assert sorted(machine.addresses) == ["rng"]
        # Freed places and freed names serve again.
        for _ in range(spec.hotplug_ports):
            await machine.attach(BlockDevice(id="disk", path=disk, read_only=True))
            await machine.detach("disk")
        again = await machine.attach(BlockDevice(id="disk", path=disk, read_only=False))
        await says(machine, disk_at(again))
        machine.kill()
    removed = [event for event in await all_events(machine) if "REMOVED" in event.kind.name]
    assert len(removed) >= 1 + can.net_hotplug


async def test_vcpus_and_memory_come_while_it_runs_and_it_pauses(backend, make_spec, records):
    spec = make_spec()
    can = backend.capabilities(spec)
    async with running(backend, spec, records) as machine:
        await says(machine, "cpus=1")
        if can.vcpu_hotplug:
            assert await machine.resize_vcpus(2) == 2
            await says(machine, "cpus=2")
        if can.memory_hotplug:
            assert await machine.resize_memory(500) == 512
            await says(machine, "mem128=3.")
            # A guest that keeps pages of its own in every block says no at once.
            with trio.fail_after(patient(30)):
                assert await machine.resize_memory(256) in (256, 512)
        if can.vcpu_hotplug:
            assert await machine.resize_vcpus(1) == (1 if can.vcpu_unplug else 2)
        if can.pause:
            await machine.pause()
            await machine.resume()
        machine.kill()
    kinds = [event.kind for event in await all_events(machine)]
    assert (VmEventKind.PAUSED in kinds) == (VmEventKind.RESUMED in kinds) == can.pause


@dataclass
class Beside:
    """What a machine has beside its VMM."""

    devices: list = field(default_factory=list)
    helpers: list[Helper] = field(default_factory=list)


@asynccontextmanager
async def daemons(can, directory, virtiofsd, records):
    """Give a machine what its backend can have: a share of `share` and a vsock device."""
    beside = Beside()
    vhost = -1
    try:
        if can.shared_directory:
            path = directory / "fs.sock"
            helper = await start_virtiofsd(
                virtiofsd, directory / "share", path, record=records.append
            )
            beside.helpers.append(helper)
            beside.devices.append(SharedDirectory(id="fs", tag="kataShared", socket=path))
        if can.hybrid_vsock:
            beside.devices.append(HybridVsock(id="vsock", uds_path=directory / "uds"))
        elif can.unix_vsock:
            path, uds = directory / "vs.sock", directory / "uds"
            beside.helpers.append(
                await start_vsock_device(
                    scratch_guest.VSOCK_DEVICE, path, uds, record=records.append
                )
            )
            beside.devices.append(UnixVsock(id="vsock", socket=path, uds_path=uds))
        elif can.kernel_vsock:
            vhost = os.open("/dev/vhost-vsock", os.O_RDWR | os.O_CLOEXEC)
            beside.devices.append(KernelVsock(id="vsock", cid=CID, vhost_fd=vhost))
        yield beside
    finally:
        for helper in beside.helpers:
            await helper.aclose()
        if vhost >= 0:
            os.close(vhost)


@pytest.mark.parametrize("virtiofsd", scratch_guest.VIRTIOFSDS, ids=str)
async def test_cold_devices_are_where_it_says_and_it_outlives_its_daemons(
    backend, make_spec, records, tmp_path, disk, virtiofsd
):
    share = tmp_path / "share"
    share.mkdir()
    (share / "hello").write_text("from the host\n")
    can = backend.capabilities(make_spec())
    tap = make_tap_elsewhere()
    mac = "02:00:00:00:00:02"
    own = (
        Rng(),
        BlockDevice(id="d0", path=disk, read_only=True),
        NetDevice(id="n0", mac=mac, tap_fds=(tap,), mtu=1500),
    )
    async with daemons(can, tmp_path, virtiofsd, records) as beside:
        namespace = namespace_of(tap)
        spec = make_spec(devices=(*beside.devices, *own), network_namespace=namespace)
        async with running(backend, spec, records) as machine:
            os.close(namespace)
            os.close(tap)
            assert sorted(machine.addresses) == sorted(device.id for device in spec.devices)
            await says(machine, disk_at(machine.addresses["d0"]))
            await says(machine, f"nets=[ {mac} ]")
            await says(machine, "VSOCK virtio:19")
            if can.shared_directory:
                await says(machine, "SHARE from the host")
            if can.hybrid_vsock:
                _dial_nobody(tmp_path / "uds")
            for helper in beside.helpers:
                os.kill(helper.pid, signal.SIGKILL)
                with trio.fail_after(patient(30)):
                    assert (await helper.run()).signal == signal.SIGKILL
            if can.pause:
                await machine.pause()
            assert machine.exit is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["share"]
    assert processes_naming(str(tmp_path)) == []


def _dial_nobody(path):
    with socket.socket(socket.AF_UNIX) as guest:
        guest.connect(str(path))
        guest.settimeout(5)
        guest.send(b"CONNECT 1024\n")
        # Nobody listens in this guest; the device answers by closing.
        assert guest.recv(64) == b""
