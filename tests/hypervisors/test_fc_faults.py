"""Firecracker as a program that talks like it: the conversation, and everything that fails."""

from __future__ import annotations

import os
import shutil
import socket
from functools import partial

import pytest
import trio

from hypervisors import accel, fc_config, fc_room, fc_start
from hypervisors.disk_lease import lease
from hypervisors.errors import (
    ControlError,
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
    UnixVsock,
    VmEventKind,
)
from hypervisors.registry import find_hypervisor
from tests.fakes import fake_fc
from tests.harness.limitations import documented

from . import machines, openapi

pytestmark = pytest.mark.root


@pytest.fixture
def sent(monkeypatch):
    """Every request, [(method, target, body)]; none may be unknown."""
    found = []
    request = HttpApi.request

    async def recording(self, method, target, body=None, **options):
        found.append((method, target, body))
        return await request(self, method, target, body, **options)

    monkeypatch.setattr(HttpApi, "request", recording)
    yield found
    if openapi.VARIABLE in os.environ:
        document = openapi.load("firecracker.swagger.yaml")
        for method, target, body in found:
            group = target.split("/")[1]
            path = {"drives": "/drives/{drive_id}"}.get(group, target)
            schema = openapi.request_schema(document, method, path)
            assert (schema is None) == (body is None), path
            assert schema is None or openapi.problems(document, schema, body) == []


@pytest.fixture
def make_spec(tmp_path, monkeypatch):
    monkeypatch.setattr(accel, "kvm_problem", lambda: None)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "kernel").write_bytes(_elf())
    (tmp_path / "run").mkdir()

    def make(scenario="", **changes):
        fields = {
            "id": "m", "kernel": tmp_path / "in" / "kernel", "initrd": None, "cmdline": "",
            "vcpus": 1, "max_vcpus": 2, "memory_mib": 256, "max_memory_mib": 1024,
            "binary": fake_fc.write_program(tmp_path / "in", scenario), "devices": (Rng(),),
            "run_dir": tmp_path / "run", "hotplug_ports": 1, "unprivileged": False,
        }  # fmt: skip
        return MachineSpec(**{**fields, **changes})

    return make


def _elf() -> bytes:
    """The head of an x86-64 ELF with a PVH entry note."""
    note = (4).to_bytes(4, "little") + (4).to_bytes(4, "little") + (18).to_bytes(4, "little")
    note += b"Xen\0" + bytes(4)
    head = bytearray(b"\x7fELF\x02\x01\x01" + bytes(9) + bytes(48))
    head[18:20] = (62).to_bytes(2, "little")
    head[32:40] = (64).to_bytes(8, "little")
    head[54:58] = (56).to_bytes(2, "little") + (1).to_bytes(2, "little")
    entry = bytearray(56)
    entry[0:4] = (4).to_bytes(4, "little")
    entry[8:16] = (120).to_bytes(8, "little")
    entry[32:40] = len(note).to_bytes(8, "little")
    return bytes(head + entry) + note + bytes(4096)


running = partial(machines.running_in_order, find_hypervisor("fc"))
refused = partial(machines.refused, find_hypervisor("fc"))


async def test_machine_is_described_and_started_and_its_sockets_are_where_they_belong(
    make_spec, sent, tmp_path
):
    run = tmp_path / "run"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "uds_1030"))
        listener.listen()
        spec = make_spec(devices=(HybridVsock(id="vsock", uds_path=tmp_path / "uds"), Rng()))
        async with running(spec) as machine:
            assert sorted(machine.addresses) == ["rng", "vsock"]
            # Nobody else finds the API.
            assert sorted(os.listdir(run / "fc")) == [
                "disks", "log", "metrics", "v.sock", "v.sock_1030",
            ]  # fmt: skip
            assert os.stat(run / "fc").st_mode & 0o777 == 0o700
            assert os.listdir(run / "fc" / "disks") == [fc_room.PLACEHOLDER]
            with socket.socket(socket.AF_UNIX) as to_guest:
                to_guest.connect(str(tmp_path / "uds"))
            with socket.socket(socket.AF_UNIX) as from_guest:
                from_guest.connect(str(run / "fc" / "v.sock_1030"))
                listener.accept()[0].close()
        assert not (tmp_path / "uds").exists()
        assert (tmp_path / "uds_1030").exists()
    assert [(method, target) for method, target, _ in sent] == [
        ("GET", "/version"), ("PUT", "/metrics"), ("PUT", "/machine-config"),
        ("PUT", "/boot-source"), ("PUT", "/drives/slot0"), ("PUT", "/drives/slot1"),
        ("PUT", "/vsock"), ("PUT", "/entropy"), ("PUT", "/actions"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("scenario", "kind", "reason"),
    [
        ("reboot", ExitKind.REBOOT, "the guest rebooted"),
        ("panic", ExitKind.PANIC, "the guest kernel panicked"),
        ("fault", ExitKind.CRASH, "seccomp filter forbids: 1 forbidden system calls | "),
    ],
)
async def test_end_is_told_by_status_console_and_metrics(make_spec, scenario, kind, reason):
    async with running(make_spec(scenario)) as machine:
        with trio.fail_after(5):
            ending = await machine.wait_exited()
    assert ending.kind is kind
    assert reason in ending.reason
    kinds = [one.kind async for one in machine.events]
    assert kinds[-1] is VmEventKind.EXITED
    assert (VmEventKind.PANICKED in kinds) == (scenario == "panic")


async def test_guest_is_asked_by_its_keyboard_and_its_reboot_is_a_clean_end(make_spec, sent):
    async with running(make_spec()) as machine:
        with trio.fail_after(5):
            ending = await machine.shutdown(5)
    assert (ending.kind, ending.reason) == (ExitKind.CLEAN, "the guest ended as it was asked to")
    assert sent[-1] == ("PUT", "/actions", {"action_type": "SendCtrlAltDel"})


async def test_an_old_vmm_is_refused_with_the_version_to_install(make_spec):
    text = documented("Firecracker …: its version is '…'; install version 1.12 or newer")
    assert text.search(said := await refused(make_spec("old")))
    assert "'1.11.0'" in said


@pytest.mark.parametrize(
    ("scenario", "words"),
    [
        (
            "refuses-boot",
            "firecracker refused /boot-source: Boot source error: The kernel file cannot be opened"
            " before it was ready",
        ),
        ("strange", "broke its control protocol: VMM command GET /version"),
        ("link", "has no vsock for"),
        ("early", "exited with 1 before it was ready: Failed to open the API socket"),
        ("file", "does not serve its API ("),
    ],
)
async def test_vmm_that_cannot_be_used_is_told_with_its_own_words(
    make_spec, tmp_path, monkeypatch, scenario, words
):
    monkeypatch.setattr(fc_start, "EXIT_GRACE_S", 0.2)
    devices = (HybridVsock(id="v", uds_path=tmp_path / "uds"),)
    assert words in await refused(make_spec(scenario, devices=devices))
    assert "uds" not in os.listdir(tmp_path)


@pytest.mark.parametrize("scenario", ["mute", "deaf"])
async def test_vmm_that_never_answers_is_given_up(make_spec, monkeypatch, scenario):
    monkeypatch.setattr(fc_start, "LAUNCH_DEADLINE_S", 2)
    text = await refused(make_spec(scenario))
    assert text.startswith("firecracker gave no answer within 2 s before it was ready")


async def test_log_and_metrics_that_nobody_can_read_cost_nothing(make_spec):
    async with running(make_spec("garbled")) as machine:
        await machine.pause()
        await machine.resume()
        assert machine._facts.faults == {}


async def test_slots_are_filled_and_emptied_and_the_longest_empty_is_next(make_spec, sent, disk):
    nodes = []
    async with running(make_spec(hotplug_ports=2)) as machine:
        for _ in range(3):
            address = await machine.attach(BlockDevice(id="d", path=disk, read_only=False))
            nodes.append(address.node)
            await machine.detach("d")
    assert nodes == ["/dev/vda", "/dev/vdb", "/dev/vda"]
    patched = [(target, body["path_on_host"]) for method, target, body in sent if method == "PATCH"]
    assert [target for target, _ in patched] == [
        f"/drives/slot{number}" for number in (0, 0, 1, 1, 0, 0)
    ]
    shown = {path.rpartition("/")[2] for _, path in patched}
    assert shown == {"d", fc_room.PLACEHOLDER}


async def test_full_slots_are_told_by_kind(make_spec, tmp_path, disk):
    def another(name, **fields):
        path = disk.with_name(name)
        path.write_bytes(bytes(4096))
        return BlockDevice(id=name, path=path, **fields)

    async with running(make_spec(hotplug_ports=3)) as machine:
        for number in range(fc_config.READ_ONLY_SLOTS):
            await machine.attach(another(f"ro{number}", read_only=True))
        text = documented(
            "firecracker cannot attach another read-only disk: all … slots of that kind are taken; "
            "use fewer, or another VMM ([hypervisor.qemu])"
        )
        with pytest.raises(Unsupported, match=text):
            await machine.attach(another("ro", read_only=True))
        for number in range(3):
            await machine.attach(another(f"rw{number}", read_only=False))
        with pytest.raises(Unsupported, match="all 3 hot-plug ports are taken; raise hotplug_port"):
            await machine.attach(another("rw", read_only=False))


async def test_disk_that_looks_like_an_empty_slot_is_refused(make_spec, tmp_path):
    path = tmp_path / "tiny"
    path.write_bytes(bytes(512))
    async with running(make_spec()) as machine:
        text = documented(
            "block device …: it has … bytes, which the guest cannot tell from an empty slot; give "
            "one of 1024 bytes or more"
        )
        with pytest.raises(PreconditionFailed, match=text):
            await machine.attach(BlockDevice(id="d", path=path, read_only=False))


async def test_disk_of_a_refused_request_is_free_again(make_spec, monkeypatch, disk):
    device = BlockDevice(id="d", path=disk, read_only=False)
    async with running(make_spec()) as machine:
        request = HttpApi.request

        async def failing(self, method, target, body=None, **options):
            if method == "PATCH" and not body["path_on_host"].endswith(fc_room.PLACEHOLDER):
                raise ControlError(target, "no answer")
            return await request(self, method, target, body, **options)

        with monkeypatch.context() as patch:
            patch.setattr(HttpApi, "request", failing)
            with pytest.raises(ControlError, match="no answer"):
                await machine.attach(device)
        assert sorted(machine.addresses) == ["rng"]
        await machine.attach(device)


async def test_disk_that_the_vmm_may_have_stays_the_machines(make_spec, monkeypatch, disk):
    device = BlockDevice(id="d", path=disk, read_only=False)
    async with running(make_spec()) as machine:
        request = HttpApi.request

        async def failing(self, method, target, body=None, **options):
            if method == "PATCH":
                raise ControlError(target, "no answer")
            return await request(self, method, target, body, **options)

        with monkeypatch.context() as patch:
            patch.setattr(HttpApi, "request", failing)
            with pytest.raises(ControlError, match="no answer"):
                await machine.attach(device)
        with pytest.raises(PreconditionFailed, match="in use by another device or machine"):
            lease(device)
        with pytest.raises(Unsupported, match="all 1 hot-plug ports are taken"):
            await machine.attach(BlockDevice(id="e", path=disk, read_only=False))
    lease(device).close()


async def test_what_it_has_not_is_refused_before_anything_is_taken(make_spec, tmp_path):
    tap = os.open("/dev/null", os.O_RDWR)
    net = NetDevice(id="n0", mac="02:00:00:00:00:01", tap_fds=(tap,), mtu=1500)
    share = SharedDirectory(id="fs", tag="t", socket=tmp_path / "fs.sock")
    vsock = UnixVsock(id="v", socket=tmp_path / "v", uds_path=tmp_path / "uds")
    image = tmp_path / "in" / "bzImage"
    image.write_bytes(bytes(0x202) + b"HdrS" + bytes(4096))
    cases = (
        ({"accelerator": "tcg"}, documented("firecracker cannot emulate a processor: …")),
        (
            {"devices": (net,)},
            documented(
                "network device …: Firecracker opens taps by name, and this is none (a macvtap?); "
                'set internetworking_model = "tcfilter"'
            ),
        ),
        (
            {"devices": (share,)},
            documented("firecracker cannot share …: it has no shared file system; …"),
        ),
        (
            {"devices": (vsock,)},
            documented(
                "cannot use a UnixVsock: its vsock device is its own; give it a HybridVsock"
            ),
        ),
        (
            {"prealloc": True},
            documented(
                "firecracker cannot take all of a machine's memory at its launch: its API has no "
                "word for it; set enable_mem_prealloc = false"
            ),
        ),
        (
            {"hotplug_ports": 14},
            documented(
                "firecracker cannot have … devices and … slots for disks: there are interrupt "
                "lines for 16 together; lower hotplug_ports"
            ),
        ),
        (
            {"vcpus": 33, "max_vcpus": 33},
            documented("firecracker cannot have 33 vCPUs: it ends at 32; …"),
        ),
        (
            {"kernel": image},
            documented(
                "guest kernel …: a bzImage, which Firecracker does not unpack; give its ELF "
                "vmlinux (make guest makes one)"
            ),
        ),
    )
    for changes, text in cases:
        assert text.search(said := await refused(make_spec(**changes))), said
    os.close(tap)


async def test_what_it_cannot_do_while_it_runs_names_the_alternative(make_spec):
    net = NetDevice(id="n0", mac="02:00:00:00:00:01", tap_fds=(0,), mtu=1500)
    async with running(make_spec()) as machine:
        text = documented(
            "firecracker cannot attach a NetDevice to a running machine: its devices are those of "
            "the start, only disks are exchanged; let the pod have it when it is created, or use "
            "another VMM ([hypervisor.qemu])"
        )
        with pytest.raises(Unsupported, match=text):
            await machine.attach(net)
        text = documented(
            "firecracker cannot run with … vCPUs: the machine was made with …; raise "
            "default_vcpus, or let the pod's limits be there when it is created "
            "(static_sandbox_resource_mgmt = true)"
        )
        with pytest.raises(Unsupported, match=text):
            await machine.resize_vcpus(2)
        text = documented(
            "firecracker cannot have … MiB: the machine was made with …; raise default_memory, or "
            "let the pod's limits be there when it is created (static_sandbox_resource_mgmt = true)"
        )
        with pytest.raises(Unsupported, match=text):
            await machine.resize_memory(512)


async def test_program_with_shared_libraries_is_refused_where_it_would_be_jailed(
    make_spec, tmp_path
):
    (tmp_path / "in" / "jailer").write_text("#!/bin/sh\n")
    (tmp_path / "in" / "jailer").chmod(0o755)
    text = documented(
        "Firecracker …: linked with shared libraries, which its jailer's directory has not; "
        "install its own release, which has none, or take the jailer beside it away"
    )
    program = tmp_path / "in" / "firecracker"
    shutil.copy("/bin/ls", program)
    program.chmod(0o755)
    assert text.search(await refused(make_spec(binary=program)))


async def test_jail_holds_the_hosts_files_and_the_sockets_and_leaves_nothing(make_spec, tmp_path):
    # A jailer that tells what it was given and where, and ends.
    jailer = tmp_path / "in" / "jailer"
    jailer.write_text(
        '#!/bin/sh\necho "$@" >&2\nwhile [ "$1" != --chroot-base-dir ]; do shift; done\n'
        "cd $2/*/m/root && ls -R . >&2; touch kernel >&2; exit 3\n"
    )
    jailer.chmod(0o755)
    said = await refused(make_spec(unprivileged=True))
    assert "firecracker exited with 3 before it was ready" in said
    # The last lines: what lies in the jail, and that the kernel cannot be written there.
    assert "touch: cannot touch 'kernel': Read-only file system" in said


async def test_disks_of_a_jail_are_where_its_user_can_make_nothing(make_spec, tmp_path):
    jailer = tmp_path / "in" / "jailer"
    jailer.write_text(
        '#!/bin/sh\nwhile [ "$1" != --chroot-base-dir ]; do shift; done\n'
        f"cd $2/*/m/root/disks && stat -c '%u %a %n' . {fc_room.PLACEHOLDER} >&2; exit 3\n"
    )
    jailer.chmod(0o755)
    said = await refused(make_spec(unprivileged=True))
    assert "0 710 ." in said
    assert f"0 660 {fc_room.PLACEHOLDER}" in said


async def test_directory_left_by_an_earlier_machine_is_made_anew(make_spec, tmp_path):
    old = tmp_path / "run" / "fc"
    (old / "deep").mkdir(parents=True)
    (old / "v.sock").symlink_to("/etc/passwd")
    (tmp_path / "run" / "fc-jail").mkdir()
    (tmp_path / "run" / "fc-jail").rmdir()
    async with running(make_spec()):
        assert "v.sock" not in os.listdir(old)
    assert "passwd" in os.listdir("/etc")
