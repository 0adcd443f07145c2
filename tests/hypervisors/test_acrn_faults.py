"""acrn-dm as a program that talks like it: how a machine is made and ends, and what fails."""

from __future__ import annotations

import fcntl
import os
import re
import struct
from functools import partial

import pytest
import trio

from hypervisors import accel, acrn
from hypervisors.accel import kernel_vsock_usable
from hypervisors.errors import CommandRejected, DetachRefused, Unsupported
from hypervisors.lent_taps import check_tap
from hypervisors.machine import (
    BlockDevice,
    ExitKind,
    KernelVsock,
    MachineSpec,
    NetDevice,
    Rng,
    VmEventKind,
)
from hypervisors.registry import find_hypervisor
from tests.fakes import fake_acrn
from tests.harness.limitations import documented
from tests.harness.patience import patient

from . import machines
from .machines import all_events, make_tap_elsewhere, namespace_of, says

pytestmark = pytest.mark.root


@pytest.fixture
def disk(tmp_path):
    # A name that would be options, were it passed on.
    path = tmp_path / "in" / "disk,ro,range=0"
    path.write_bytes(bytes(1 << 20))
    return path


@pytest.fixture
def make_spec(tmp_path, monkeypatch):
    monkeypatch.setattr(accel, "acrn_problem", lambda: None)
    (tmp_path / "in").mkdir()
    (tmp_path / "run").mkdir()

    def make(scenario="", **changes):
        fields = {
            "id": "m", "kernel": fake_acrn.write_kernel(tmp_path / "in"), "initrd": None,
            "cmdline": "", "vcpus": 1, "max_vcpus": 2, "memory_mib": 256, "max_memory_mib": 1024,
            "binary": fake_acrn.write_program(tmp_path / "in", scenario), "devices": (Rng(),),
            "run_dir": tmp_path / "run", "hotplug_ports": 2, "unprivileged": False,
        }  # fmt: skip
        return MachineSpec(**{**fields, **changes})

    return make


running = partial(machines.running_in_order, find_hypervisor("acrn"))
refused = partial(machines.refused, find_hypervisor("acrn"))


async def test_empty_disks_are_filled_once_each_and_keep_their_file(make_spec, disk):
    async with running(make_spec()) as machine:
        block = BlockDevice(id="d", path=disk, read_only=False)
        assert (await machine.attach(block)).pci_path == "04"
        await says(machine, "slot 4 has 1048576 bytes rw")
        small = disk.with_name("small")
        small.write_bytes(bytes(512))
        block = BlockDevice(id="e", path=small, read_only=True)
        assert (await machine.attach(block)).pci_path == "05"
        await says(machine, "slot 5 has 512 bytes ro")
        text = documented(
            "device … was not released by the guest: acrn-dm keeps a disk until the machine ends"
        )
        with pytest.raises(DetachRefused, match=text):
            await machine.detach("d")
        text = documented(
            "acrn cannot attach another disk: all … hot-plug ports have had one, and they take one "
            "each; raise hotplug_ports in the configuration"
        )
        with pytest.raises(Unsupported, match=text):
            await machine.attach(BlockDevice(id="f", path=small, read_only=True))
        assert sorted(machine.addresses) == ["d", "e", "rng"]


async def test_disk_of_the_specification_is_there_from_the_start(make_spec, disk):
    block = BlockDevice(id="d", path=disk, read_only=True)
    async with running(make_spec(devices=(block, Rng()))) as machine:
        await says(machine, "slot 3 has 1048576 bytes ro")
        assert machine.addresses["d"].pci_path == "03"


async def test_what_the_machine_cannot_do_is_unsupported(make_spec):
    async with running(make_spec()) as machine:
        text = documented(
            "acrn cannot pause a machine: acrn-dm has no command for it; use another VMM "
            "([hypervisor.qemu])"
        )
        with pytest.raises(Unsupported, match=text):
            await machine.pause()
        text = documented(
            "acrn cannot run with … vCPUs: the machine was made with …; raise default_vcpus, or "
            "let the pod's limits be there when it is created (static_sandbox_resource_mgmt = true)"
        )
        with pytest.raises(Unsupported, match=text):
            await machine.resize_vcpus(2)


async def test_answer_behind_an_event_and_in_pieces_is_found(make_spec, disk):
    async with running(make_spec("late")) as machine:
        await machine.attach(BlockDevice(id="d", path=disk, read_only=True))
        assert machine.exit is None


async def test_refused_disk_leaves_its_slot_empty(make_spec, disk):
    async with running(make_spec("refuses")) as machine:
        block = BlockDevice(id="d", path=disk, read_only=False)
        for _ in range(3):
            with pytest.raises(CommandRejected, match="blkrescan: ack -1"):
                await machine.attach(block)
        assert sorted(machine.addresses) == ["rng"]
        await says(machine, "Replacing valid backend file not supported!")


@pytest.mark.parametrize(
    ("scenario", "kind", "reason", "detail"),
    [
        ("poweroff", ExitKind.CLEAN, "the guest powered off", "guest-shutdown"),
        (
            "triple-fault",
            ExitKind.REBOOT,
            documented("the guest rebooted, or its kernel panicked").pattern,
            "guest-reset",
        ),
        ("reset", ExitKind.REBOOT, "the guest rebooted", "guest-reset"),
    ],
)
async def test_ends_chosen_by_the_guest_are_told_apart(make_spec, scenario, kind, reason, detail):
    async with running(make_spec(scenario)) as machine:
        with trio.fail_after(patient(20)):
            ending = await machine.wait_exited()
    assert ending.kind is kind
    assert re.fullmatch(reason, ending.reason)
    told = [(event.kind, event.detail) for event in await all_events(machine)]
    assert told == [(VmEventKind.SHUTDOWN, detail), (VmEventKind.EXITED, ending.reason)]


async def test_shutdown_lets_acrn_dm_end_by_itself(make_spec):
    async with running(make_spec()) as machine:
        ending = await machine.shutdown(1)
    assert ending.kind is ExitKind.KILLED
    assert (ending.code, ending.reason) == (0, "the VMM was told to quit")


@pytest.mark.parametrize(
    ("scenario", "words"),
    [
        ("dies", "acrn exited with 1 before it was ready: pci virtio-rnd init failed"),
        (
            "garbled",
            "command register_vm_event_client: it sent no JSON object before it was",
        ),
        (
            "mute",
            "command register_vm_event_client: no answer within 5 s before it was",
        ),
        ("nothing", "made no machine within 1 s before it was ready"),
    ],
)
async def test_launch_that_fails_says_why(make_spec, monkeypatch, scenario, words):
    if scenario == "nothing":
        monkeypatch.setattr(acrn, "LAUNCH_DEADLINE_S", 1.0)
    text = await refused(make_spec(scenario))
    assert words in text


@pytest.mark.skipif(not os.path.exists("/dev/net/tun"), reason="no /dev/net/tun")
@pytest.mark.parametrize("scenario", ["", "no-tap"])
async def test_tap_is_opened_by_name_and_ours_again(make_spec, scenario):
    tap = make_tap_elsewhere()
    namespace = namespace_of(tap)
    net = NetDevice(id="n", mac="02:00:00:00:00:01", tap_fds=(tap,), mtu=1500)
    spec = make_spec(scenario, devices=(net, Rng()), network_namespace=namespace)
    try:
        if scenario:
            assert "cannot be controlled: VMM command open tap tap0" in await refused(spec)
        else:
            async with running(spec) as machine:
                await says(machine, "tap0 is opened for 02:00:00:00:00:01")
                assert machine.addresses["n"].pci_path == "03"
                assert check_tap("acrn-dm", net)[0] == "tap0"
    finally:
        os.close(tap)
        os.close(namespace)


@pytest.mark.kvm
@pytest.mark.skipif(not kernel_vsock_usable(), reason="/dev/vhost-vsock does not open")
async def test_acrn_dm_can_take_the_context_id_that_was_kept_for_it(make_spec):
    cid = 0x10FFEE
    vhost = os.open("/dev/vhost-vsock", os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(vhost, acrn.SET_GUEST_CID, struct.pack("<Q", cid))
        spec = make_spec(devices=(KernelVsock(id="v", cid=cid, vhost_fd=vhost), Rng()))
        async with running(spec) as machine:
            await says(machine, f"cid {cid} is taken")
    finally:
        os.close(vhost)
