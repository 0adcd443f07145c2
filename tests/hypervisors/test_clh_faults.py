"""Cloud Hypervisor as a program that talks like it: the conversation, and everything that fails."""

from __future__ import annotations

import os
import socket
from functools import partial

import pytest
import trio
import trio.testing

from hypervisors import accel, clh_devices, cloud_hypervisor, isolation
from hypervisors.errors import (
    ControlError,
    DetachRefused,
    HttpRejected,
    PreconditionFailed,
    Unsupported,
)
from hypervisors.http_api import HttpApi
from hypervisors.machine import (
    BlockDevice,
    ExitKind,
    HybridVsock,
    MachineSpec,
    NetDevice,
    Rng,
    SharedDirectory,
    VmEventKind,
)
from hypervisors.registry import find_hypervisor
from tests.fakes import fake_clh
from tests.harness.limitations import documented

from . import machines, openapi

API = "/api/v1"


@pytest.fixture
def sent(monkeypatch):
    """Every request, [(method, action, body, number of descriptors)]; none may be unknown."""
    found = []
    request = HttpApi.request

    async def recording(self, method, target, body=None, *, fds=(), **options):
        found.append((method, target.removeprefix(API), body, len(fds)))
        return await request(self, method, target, body, fds=fds, **options)

    monkeypatch.setattr(HttpApi, "request", recording)
    yield found
    if openapi.VARIABLE in os.environ:
        document = openapi.load("cloud-hypervisor.openapi.yaml")
        for method, path, body, _ in found:
            schema = openapi.request_schema(document, method, path)
            assert (schema is None) == (body is None), path
            assert schema is None or openapi.problems(document, schema, body) == []


@pytest.fixture
def make_spec(tmp_path, monkeypatch):
    monkeypatch.setattr(accel, "kvm_problem", lambda: None)
    monkeypatch.setattr(isolation, "has_landlock", lambda: False)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "kernel").write_bytes(bytes(0x202) + b"HdrS" + bytes(4096))
    (tmp_path / "run").mkdir()

    def make(scenario="", **changes):
        fields = {
            "id": "m", "kernel": tmp_path / "in" / "kernel", "initrd": None, "cmdline": "",
            "vcpus": 1, "max_vcpus": 2, "memory_mib": 256, "max_memory_mib": 1024,
            "binary": fake_clh.write_program(tmp_path / "in", scenario), "devices": (Rng(),),
            "run_dir": tmp_path / "run", "hotplug_ports": 2, "unprivileged": False,
        }  # fmt: skip
        return MachineSpec(**{**fields, **changes})

    return make


running = partial(machines.running_in_order, find_hypervisor("clh"))
refused = partial(machines.refused, find_hypervisor("clh"))


async def test_machine_is_built_in_the_order_the_vmm_wants(make_spec, sent, tmp_path):
    run = tmp_path / "run"
    left, right = os.pipe()
    with socket.socket(socket.AF_UNIX) as daemon, socket.socket(socket.AF_UNIX) as listener:
        daemon.bind(str(tmp_path / "fs.sock"))
        listener.bind(str(tmp_path / "uds_1030"))
        listener.listen()
        (tmp_path / "uds_x").touch()
        spec = make_spec(
            devices=(
                SharedDirectory(id="fs", tag="t", socket=tmp_path / "fs.sock"),
                HybridVsock(id="vsock", uds_path=tmp_path / "uds"),
                NetDevice(id="n0", mac="02:00:00:00:00:01", tap_fds=(left,), mtu=1500),
                Rng(),
            )
        )
        async with running(spec) as machine:
            assert sorted(machine.addresses) == ["fs", "n0", "rng", "vsock"]
            # The VMM's own directory, and no API socket by name.
            assert sorted(path.name for path in run.iterdir()) == ["clh"]
            assert sorted(os.listdir(run / "clh")) == ["v.sock", "v.sock_1030"]
            assert os.stat(run / "clh").st_mode & 0o777 == 0o700
            with socket.socket(socket.AF_UNIX) as to_guest:
                to_guest.connect(str(tmp_path / "uds"))
            with socket.socket(socket.AF_UNIX) as from_guest:
                from_guest.connect(str(run / "clh" / "v.sock_1030"))
                listener.accept()[0].close()
        assert not (tmp_path / "uds").exists()
        assert (tmp_path / "uds_1030").exists()
    os.close(left)
    os.close(right)
    assert [(path, fds) for _, path, _, fds in sent] == [
        ("/vmm.ping", 0), ("/vm.create", 0), ("/vm.add-net", 1), ("/vm.boot", 0), ("/vm.info", 0),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("scenario", "kind", "reason", "event"),
    [
        ("reboot", ExitKind.REBOOT, "the guest rebooted", VmEventKind.SHUTDOWN),
        ("panic", ExitKind.PANIC, "the guest kernel panicked", VmEventKind.PANICKED),
        ("poweroff", ExitKind.CLEAN, "the guest powered off", VmEventKind.EXITED),
    ],
)
async def test_guest_that_reboots_or_panics_is_not_booted_again(
    make_spec, scenario, kind, reason, event
):
    async with running(make_spec(scenario)) as machine:
        with trio.fail_after(30):
            ending = await machine.wait_exited()
    assert ending.kind is kind
    assert ending.reason == reason
    assert event in [one.kind async for one in machine.events]
    assert (scenario == "panic") == any("panic" in line for line in machine.console.tail(9))


async def test_an_old_vmm_is_refused_with_the_version_to_install(make_spec):
    text = documented("Cloud Hypervisor …: its version is '…'; install version 52 or newer")
    assert text.search(said := await refused(make_spec("old")))
    assert "'v51.1'" in said


@pytest.mark.parametrize(
    ("scenario", "words"),
    [
        (
            "refuses-create",
            "cloud-hypervisor refused /api/v1/vm.create: Error from API: The VM could not be"
            " created: no such kernel before it was ready",
        ),
        ("strange", "broke its control protocol: VMM command GET /api/v1/vmm.ping"),
        ("link", "has no vsock for"),
    ],
)
async def test_vmm_that_cannot_be_used_is_told_with_its_own_words(
    make_spec, tmp_path, scenario, words
):
    devices = (HybridVsock(id="v", uds_path=tmp_path / "uds"),)
    assert words in await refused(make_spec(scenario, devices=devices))
    assert "uds" not in os.listdir(tmp_path)


async def test_vmm_that_never_answers_is_given_up(make_spec, monkeypatch):
    monkeypatch.setattr(cloud_hypervisor, "LAUNCH_DEADLINE_S", 0.5)
    text = await refused(make_spec("mute"))
    assert text == "cloud-hypervisor gave no answer within 0.5 s before it was ready"


async def test_vmm_that_closes_its_api_socket_is_told_from_a_silent_one(make_spec, monkeypatch):
    monkeypatch.setattr(cloud_hypervisor, "EXIT_GRACE_S", 0.2)
    spec = make_spec()
    # Descriptors in order: kernel, its directory, the API's socket, the monitor's.
    spec.binary.write_text("#!/bin/sh\nexec 3>&- 4>&- 5>&- 6>&-\nexec sleep 60\n")
    assert "does not serve its API (" in await refused(spec)


async def test_missing_daemon_and_missing_program_take_nothing(make_spec, tmp_path):
    share = SharedDirectory(id="fs", tag="t", socket=tmp_path / "nobody.sock")
    text = await refused(make_spec(devices=(share,)))
    assert text.startswith(f"the daemon of fs refused {tmp_path}/nobody.sock (No such file")
    assert "install cloud-hypervisor" in await refused(make_spec(binary=tmp_path / "none"))


async def test_cut_and_foreign_events_cost_nothing_but_themselves(make_spec):
    async with running(make_spec("garbled")) as machine:
        await machine.resume()
        async for event in machine.events:
            if event.kind is VmEventKind.RESUMED:
                break
            assert event.kind is VmEventKind.PAUSED
        assert machine.dropped_monitor_events == 3


async def test_device_that_the_guest_keeps_may_be_asked_for_again(
    make_spec, sent, monkeypatch, disk
):
    monkeypatch.setattr(clh_devices, "DETACH_DEADLINE_S", 0.1)
    async with running(make_spec("keeps-devices")) as machine:
        await machine.attach(BlockDevice(id="d", path=disk, read_only=True))
        for _ in range(2):
            with pytest.raises(DetachRefused, match=r"no answer within 0\.1 s"):
                await machine.detach("d")
        assert "d" in machine.addresses
        # Its answer came when nobody waited.
        machine._devices.on_removed("d")
        await machine.detach("d")
        assert "d" not in machine.addresses
    assert [path for _, path, _, _ in sent].count("/vm.remove-device") == 2


async def test_those_who_wait_for_a_device_learn_of_the_machines_end(make_spec, disk, monkeypatch):
    monkeypatch.setattr(clh_devices, "DETACH_DEADLINE_S", 1000)
    async with running(make_spec("keeps-devices")) as machine:
        await machine.attach(BlockDevice(id="d", path=disk, read_only=True))

        async def detach():
            with pytest.raises(ControlError), trio.fail_after(30):
                await machine.detach("d")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(detach)
            await trio.testing.wait_all_tasks_blocked(0.05)
            machine.kill()


async def test_disk_without_an_address_is_taken_out_again(make_spec, sent, disk):
    async with running(make_spec("no-address")) as machine:
        with pytest.raises(ControlError, match="no usable address"):
            await machine.attach(BlockDevice(id="d", path=disk, read_only=True))
        assert sorted(machine.addresses) == ["rng"]
    assert sent[-1][1] == "/vm.remove-device"


@pytest.mark.root
async def test_vcpus_come_and_go_and_the_number_is_that_of_the_threads(make_spec):
    async with running(make_spec()) as machine:
        assert await machine.resize_vcpus(2) == 2
        assert await machine.resize_vcpus(1) == 1
        assert await machine.resize_vcpus(2) == 2
        with pytest.raises(Unsupported, match="made for 1 to 2; raise default_maxvcpus"):
            await machine.resize_vcpus(3)


@pytest.mark.root
async def test_vcpu_on_its_way_out_delays_the_next_change_until_it_is_gone(
    make_spec, sent, monkeypatch
):
    async with running(make_spec("slow")) as machine:
        assert await machine.resize_vcpus(2) == 2
        monkeypatch.setattr(clh_devices, "DETACH_DEADLINE_S", 0.05)
        assert await machine.resize_vcpus(1) == 2  # as it is: the guest is slow
        with pytest.raises(HttpRejected) as caught:
            await machine.resize_vcpus(2)
        assert caught.value.status == 429
        monkeypatch.setattr(clh_devices, "DETACH_DEADLINE_S", 1000)
        with trio.fail_after(30):
            assert await machine.resize_vcpus(2) == 2
    # Refused, waited for, asked again: not once more.
    assert [path for _, path, _, _ in sent].count("/vm.resize") == 5


async def test_memory_grows_by_whole_steps_and_never_shrinks(make_spec, sent):
    async with running(make_spec()) as machine:
        assert await machine.resize_memory(300) == 384
        assert await machine.resize_memory(256) == 384
        assert await machine.resize_memory(1000) == 1024
        with pytest.raises(Unsupported, match="made for up to 1024; raise default_maxmemory"):
            await machine.resize_memory(1025)
    sizes = [body["desired_ram"] >> 20 for _, path, body, _ in sent if path == "/vm.resize"]
    assert sizes == [384, 1024]


@pytest.mark.root
async def test_disk_is_shown_to_a_confined_vmm_while_it_opens_it_and_no_longer(
    make_spec, monkeypatch, sent, disk
):
    monkeypatch.setattr(isolation, "has_landlock", lambda: True)
    # Nobody but root can reach it, and the VMM is told of a name of its own.
    disk.chmod(0o600)
    disk.parent.chmod(0o700)
    cold = BlockDevice(id="cold", path=disk, read_only=True)
    async with running(make_spec(devices=(Rng(), cold))) as machine:
        await machine.attach(BlockDevice(id="hot", path=disk, read_only=True))
        with pytest.raises(PreconditionFailed, match="in use by another device or machine"):
            await machine.attach(BlockDevice(id="rw", path=disk, read_only=False))
        await machine.detach("hot")
    create = next(body for _, path, body, _ in sent if path == "/vm.create")
    add = next(body for _, path, body, _ in sent if path == "/vm.add-disk")
    own = create["landlock_rules"][0]["path"]
    assert own.startswith("/proc/self/fd/")
    assert create["disks"][0]["path"] == f"{own}/disks/cold"
    assert add["path"] == f"{own}/disks/hot"
    # What the machine had is free for the next one.
    async with running(make_spec()) as machine:
        await machine.attach(BlockDevice(id="rw", path=disk, read_only=False))


@pytest.mark.root
async def test_disk_of_a_refused_request_is_free_again(make_spec, monkeypatch, disk):
    monkeypatch.setattr(isolation, "has_landlock", lambda: True)
    device = BlockDevice(id="d", path=disk, read_only=False)
    async with running(make_spec("no-address")) as machine:
        for _ in range(2):
            with pytest.raises(ControlError, match="no usable address"):
                await machine.attach(device)


async def test_power_button_first_and_the_vmms_own_end_after_the_grace(make_spec, sent):
    async with running(make_spec()) as machine:
        ending = await machine.shutdown(0.1)
    assert ending.kind is ExitKind.KILLED
    assert ending.reason == "the VMM was told to quit"
    assert [path for _, path, _, _ in sent][-2:] == ["/vm.power-button", "/vmm.shutdown"]


async def test_directory_left_by_an_earlier_machine_is_made_anew(make_spec, tmp_path):
    old = tmp_path / "run" / "clh"
    (old / "deep").mkdir(parents=True)
    (old / "v.sock").symlink_to("/etc/passwd")
    async with running(make_spec()):
        assert list(old.iterdir()) == []
    assert "passwd" in os.listdir("/etc")
