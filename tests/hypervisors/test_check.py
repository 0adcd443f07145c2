"""Refusals before anything is taken: path, errno and fix, for everything that can be missing."""

from __future__ import annotations

import os
import struct
from dataclasses import replace
from pathlib import Path

import pytest

from hypervisors import accel, isolation
from hypervisors.errors import PreconditionFailed, Unsupported
from hypervisors.machine import BlockDevice, KernelVsock, MachineSpec, NetDevice, Rng
from hypervisors.qemu import Qemu
from hypervisors.registry import BUILT_IN, find_hypervisor
from hypervisors.virtiofsd import (
    check_share,
    check_virtiofsd,
    flavour_of,
    start_virtiofsd,
    virtiofsd_argv,
)
from hypervisors.vsock_device import check_vsock_device, vsock_device_argv
from tests.harness.limitations import documented


def elf(machine=62, note=18, word=2):
    """A vmlinux with nothing but one note segment."""
    header = b"\x7fELF" + bytes([word, 1, 1]) + bytes(9)
    header += struct.pack("<HHIQQQIHHHHHH", 2, machine, 1, 0, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    notes = struct.pack("<III", 4, 5, 6) + b"Xen\x00linux\x00\x00\x00"
    notes += struct.pack("<III", 4, 4, note) + b"Xen\x00" + bytes(4)
    segment = struct.pack("<IIQQQQQQ", 4, 0, 120, 0, 0, len(notes), len(notes), 4)
    return header + segment + notes


@pytest.fixture
def spec(tmp_path):
    (tmp_path / "vmlinux").write_bytes(elf())
    (tmp_path / "initrd").write_bytes(b"070701" + bytes(100))
    (tmp_path / "qemu").write_text("#!/bin/sh\n")
    (tmp_path / "qemu").chmod(0o755)
    return MachineSpec(
        id="x",
        kernel=tmp_path / "vmlinux",
        initrd=tmp_path / "initrd",
        cmdline="",
        vcpus=1,
        max_vcpus=1,
        memory_mib=256,
        max_memory_mib=256,
        binary=tmp_path / "qemu",
        run_dir=tmp_path,
        accelerator="tcg",
        unprivileged=False,
    )


def refused(spec, **changes):
    with pytest.raises(PreconditionFailed) as caught:
        Qemu().check(replace(spec, **changes))
    assert caught.value.fix
    return caught.value


def test_complete_specification_is_accepted(spec):
    Qemu().check(spec)
    Qemu().check(replace(spec, initrd=None, devices=(Rng(),), hotplug_ports=14))


@pytest.mark.parametrize("field", ["kernel", "initrd", "binary"])
def test_missing_file_is_named_with_errno(spec, field):
    error = refused(spec, **{field: Path("/nowhere/file")})
    assert error.errno == 2
    assert "/nowhere/file" in str(error)
    assert "No such file" in str(error)


@pytest.mark.parametrize("field", ["kernel", "initrd", "binary"])
def test_directory_or_fifo_instead_of_a_file_is_refused_without_blocking(spec, field, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path, tmp_path / "fifo"):
        assert "not a regular file" in str(refused(spec, **{field: path}))


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "neither a bzImage nor an ELF"),
        (b"text", "neither a bzImage nor an ELF"),
        (elf(machine=183), "another machine"),
        (elf(word=1), "another machine"),
        (elf(note=17), "no PVH entry"),
        (elf()[:80], "damaged"),
    ],
)
def test_kernel_that_cannot_start_is_refused(spec, content, why):
    spec.kernel.write_bytes(content)
    assert why in str(refused(spec))


def test_compressed_kernel_image_is_accepted(spec):
    spec.kernel.write_bytes(bytes(0x202) + b"HdrS" + bytes(100))
    Qemu().check(spec)


def test_initrd_and_program_of_another_kind_are_refused(spec):
    spec.initrd.write_bytes(b"hsqs")
    assert "not a cpio archive" in str(refused(spec))
    spec.initrd.write_bytes(b"070701")
    spec.binary.write_bytes(b"text")
    assert "not a program" in str(refused(spec))
    spec.binary.chmod(0o644)
    assert refused(spec).errno == 13


@pytest.mark.parametrize(
    "changes",
    [
        {"id": "a,b"},
        {"vcpus": 0},
        {"vcpus": 2},
        {"memory_mib": 8, "max_memory_mib": 8},
        {"max_memory_mib": 128},
        {"cmdline": "a" * 2048},
        {"cmdline": "a\nb"},
        {"devices": (Rng(id="a,b"),)},
        {"devices": (Rng(id="x" * 29),)},
        {"devices": (Rng(), Rng())},
        {"devices": (NetDevice(id="n", mac="nonsense", tap_fds=(1,), mtu=1500),)},
        {"devices": (NetDevice(id="n", mac="02:00:00:00:00:01", tap_fds=(), mtu=1500),)},
        {"devices": (NetDevice(id="n", mac="02:00:00:00:00:01", tap_fds=(1,), mtu=9),)},
        {"devices": (BlockDevice(id="b", path=Path("/nowhere"), read_only=True),)},
        {"devices": (BlockDevice(id="b", path=Path("/dev/null"), read_only=True),)},
        {"devices": (BlockDevice(id="b", path=Path("/"), read_only=True, serial="s" * 21),)},
    ],
)
def test_value_out_of_range_is_refused(spec, changes):
    refused(spec, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"machine_type": "virt"},
        {"machine_type": "microvm", "devices": tuple(Rng(id=f"r{n}") for n in range(24))},
        {"hotplug_ports": 15},
        {"max_vcpus": 300},
        {"devices": tuple(Rng(id=f"r{n}") for n in range(16))},
    ],
)
def test_what_the_backend_never_can_is_unsupported_with_a_hint(spec, changes):
    with pytest.raises(Unsupported) as caught:
        Qemu().check(replace(spec, **changes))
    assert caught.value.backend == "qemu"
    assert caught.value.hint


def test_machine_type_that_is_not_offered_is_refused_with_those_that_are(spec):
    text = documented(
        "qemu cannot build a machine of type 'pc': only q35 takes devices while it runs, and only "
        'microvm goes without PCI; set machine_type = "q35" or "microvm"'
    )
    with pytest.raises(Unsupported, match=text):
        Qemu().check(replace(spec, machine_type="pc"))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root changes users")
def test_file_the_vmms_user_cannot_use_is_refused_with_the_fix(spec, tmp_path):
    for directory in (tmp_path, *tmp_path.parents):
        if not directory.stat().st_mode & 1:
            assert f" {directory}:" in str(refused(spec, unprivileged=True))
            break
    usable = {"binary": Path("/bin/true"), "unprivileged": True}
    spec.kernel.chmod(0o640)
    spec.initrd.chmod(0o644)
    assert "not readable for the VMM's user" in str(refused(spec, **usable))
    spec.kernel.chmod(0o644)
    Qemu().check(replace(spec, **usable))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root changes users")
def test_machines_get_users_of_their_own_and_the_kvm_group_only_for_kvm(tmp_path):
    kvm = tmp_path / "kvm"
    kvm.touch()
    first, second = (isolation.machine_account(name, "tcg") for name in ("a", "b"))
    assert first is not None
    assert second is not None
    assert first == isolation.machine_account("a", "tcg") != second
    assert isolation.FIRST_UID <= first.uid == first.gid != second.uid
    for mode, group, groups in ((0o660, 104, (104,)), (0o666, 0, ())):
        os.chown(kvm, 0, group)
        kvm.chmod(mode)
        account = isolation.machine_account("a", "kvm", kvm)
        assert account == replace(first, groups=groups)
    # Nobody but root may open it: the VMM has to stay root.
    for mode, group in ((0o600, 104), (0o660, 0)):
        os.chown(kvm, 0, group)
        kvm.chmod(mode)
        assert isolation.machine_account("a", "kvm", kvm) is None


@pytest.mark.skipif(accel.kernel_vsock_usable(), reason="this host has the kernel's vsock")
def test_kernel_vsock_without_its_device_is_unsupported(spec):
    with pytest.raises(Unsupported, match="vhost-vsock"):
        Qemu().check(replace(spec, devices=(KernelVsock(id="v", cid=3, vhost_fd=9),)))


def test_kvm_needs_a_device_that_opens_and_a_cpu_that_shows_it(tmp_path):
    device, cpuinfo = tmp_path / "kvm", tmp_path / "cpuinfo"
    cpuinfo.write_text("processor : 0\nflags : fpu vmx sse\n")
    assert "No such file" in str(accel.kvm_problem(device, cpuinfo))
    device.touch()
    assert accel.kvm_problem(device, cpuinfo) is None
    cpuinfo.write_text("processor : 0\nflags : fpu svm\n")
    assert accel.kvm_problem(device, cpuinfo) is None
    cpuinfo.write_text("processor : 0\nmodel name : svm vmx\nflags : fpu vmxoff\n")
    assert "neither vmx nor svm" in str(accel.kvm_problem(device, cpuinfo))


@pytest.mark.skipif(accel.kvm_problem() is None, reason="this host has KVM")
def test_kvm_by_name_is_refused_where_it_does_not_work_and_auto_emulates():
    with pytest.raises(PreconditionFailed, match="KVM"):
        accel.choose_accelerator("kvm")
    assert accel.choose_accelerator("auto") == "tcg"


def test_capabilities_follow_the_specification(spec):
    none = Qemu().capabilities(spec)
    assert not any((none.block_hotplug, none.vcpu_hotplug, none.memory_hotplug))
    grown = Qemu().capabilities(replace(spec, hotplug_ports=1, max_vcpus=2, max_memory_mib=512))
    assert grown.block_hotplug
    assert grown.net_hotplug
    assert grown.vcpu_hotplug
    assert grown.memory_hotplug
    assert not grown.vcpu_unplug


def test_unknown_hypervisor_is_refused_with_the_known_ones():
    assert find_hypervisor("qemu").name == "qemu"
    with pytest.raises(
        Unsupported,
        match=documented("… cannot be used: no such hypervisor is installed; choose one of: …"),
    ) as caught:
        find_hypervisor("bhyve")
    assert str(caught.value).endswith(", ".join(BUILT_IN))


def test_virtiofsd_flavours_are_told_apart_and_get_their_own_arguments(tmp_path):
    c, rust = tmp_path / "c", tmp_path / "rust"
    c.write_bytes(bytes(1 << 20))
    # The mark lies across two read chunks.
    rust.write_bytes(bytes((1 << 18) - 3) + b"RUST_BACKTRACE" + bytes(9))
    assert flavour_of(c) == "c"
    assert flavour_of(rust) == "rust"
    assert virtiofsd_argv(rust, Path("/s"), "rust", cache="never", xattr=True)[1:] == [
        "--fd=3",
        "--shared-dir=/s",
        "--cache=never",
        "--sandbox=namespace",
        "--seccomp=kill",
        "--announce-submounts",
        "--log-level=warn",
        "--xattr",
    ]
    argv = virtiofsd_argv(c, Path("/s"), "c", cache="never")
    assert argv[1:3] == ["-f", "--fd=3"]
    assert {"source=/s", "cache=none", "sandbox=namespace", "announce_submounts"} <= set(argv)


@pytest.mark.parametrize(("cache", "spelled"), [("none", "none"), ("never", "none")])
def test_a_cache_is_spelled_as_the_c_virtiofsd_does(cache, spelled):
    assert f"cache={spelled}" in virtiofsd_argv(Path("/v"), Path("/s"), "c", cache=cache)
    assert "--cache=never" in virtiofsd_argv(Path("/v"), Path("/s"), "rust", cache=cache)


def test_a_cache_that_this_virtiofsd_lacks_is_refused_with_what_it_has(tmp_path):
    binary = tmp_path / "virtiofsd"
    binary.write_bytes(b"\x7fELF" + bytes(64))
    binary.chmod(0o755)
    check_virtiofsd(binary, "always")
    with pytest.raises(PreconditionFailed, match=r'virtio_fs_cache .*"metadata".*"auto"'):
        check_virtiofsd(binary, "metadata")
    binary.write_bytes(b"\x7fELF" + b"RUST_BACKTRACE")
    check_virtiofsd(binary, "metadata")


async def test_virtiofsd_that_cannot_start_leaves_no_socket(tmp_path):
    binary = tmp_path / "virtiofsd"
    binary.write_text("#!/nowhere/interpreter\n")
    binary.chmod(0o755)
    for shared in (tmp_path / "missing", tmp_path / "a,b"):
        with pytest.raises(PreconditionFailed):
            check_share(shared)
    with pytest.raises(Exception, match="No such file"):
        await start_virtiofsd(binary, tmp_path, tmp_path / "sock", record=lambda _: None)
    assert not (tmp_path / "sock").exists()


def test_vsock_device_arguments_and_reserved_cid():
    argv = vsock_device_argv(Path("/bin/v"), Path("/s"), Path("/u"), 3)
    assert argv == ["/bin/v", "--guest-cid=3", "--socket=/s", "--uds-path=/u"]
    with pytest.raises(PreconditionFailed, match="reserved"):
        check_vsock_device(Path("/bin/true"), 2)
