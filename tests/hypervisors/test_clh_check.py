"""What the Cloud Hypervisor backend refuses before anything is taken, and in which words."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path

import pytest

from hypervisors import accel, isolation
from hypervisors.child_exec import Account
from hypervisors.errors import PreconditionFailed, Unsupported
from hypervisors.machine import (
    HybridVsock,
    KernelVsock,
    MachineSpec,
    NetDevice,
    Rng,
    UnixVsock,
)
from hypervisors.registry import find_hypervisor
from tests.harness.limitations import documented

CLH = find_hypervisor("clh")


@pytest.fixture
def spec(tmp_path, monkeypatch):
    """One that passes, on a host with KVM."""
    monkeypatch.setattr(accel, "kvm_problem", lambda: None)
    monkeypatch.setattr(isolation, "machine_account", lambda *_: None)
    program = tmp_path / "cloud-hypervisor"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    (tmp_path / "bzImage").write_bytes(bytes(0x202) + b"HdrS" + bytes(4096))
    (tmp_path / "initrd").write_bytes(b"070701" + bytes(100))
    return MachineSpec(
        id="m", kernel=tmp_path / "bzImage", initrd=tmp_path / "initrd", cmdline="", vcpus=1,
        max_vcpus=2, memory_mib=256, max_memory_mib=512, binary=program, run_dir=tmp_path,
        devices=(Rng(),), hotplug_ports=2,
    )  # fmt: skip


def refusal(spec):
    with pytest.raises((PreconditionFailed, Unsupported)) as caught:
        CLH.check(spec)
    return str(caught.value)


def net(queues):
    return NetDevice(id="n0", mac="02:00:00:00:00:01", tap_fds=tuple(range(queues)), mtu=1500)


def test_machine_that_can_be_built_passes(spec):
    CLH.check(spec)
    vsock = HybridVsock(id="v", uds_path=Path("/run/uds"))
    CLH.check(replace(spec, devices=(Rng(), vsock, net(1)), accelerator="kvm"))


def test_missing_program_says_where_it_was_looked_for(spec):
    text = refusal(replace(spec, binary=Path("/usr/bin/no-such-vmm")))
    assert text == (
        "Cloud Hypervisor /usr/bin/no-such-vmm: cannot be opened (errno 2, No such file or"
        " directory); install cloud-hypervisor, or correct the hypervisor path"
    )


def test_host_without_kvm_is_told_of_the_vmm_that_emulates(spec, monkeypatch):
    monkeypatch.setattr(accel, "kvm_problem", lambda: "/dev/kvm does not open: No such file")
    text = documented(
        "KVM, without which Cloud Hypervisor runs nothing: …; load kvm_intel or kvm_amd, or use "
        "QEMU, which emulates ([hypervisor.qemu])"
    )
    assert text.fullmatch(refusal(spec))
    text = documented(
        "cloud-hypervisor cannot emulate a processor: it runs guests on KVM only; set "
        'accelerator to "auto", or use QEMU ([hypervisor.qemu])'
    )
    assert text.fullmatch(refusal(replace(spec, accelerator="tcg")))


def test_devices_that_this_vmm_has_otherwise_are_refused(spec):
    vsock = UnixVsock(id="v", socket=Path("/a"), uds_path=Path("/b"))
    text = documented("cannot use a UnixVsock: its vsock device is its own; give it a HybridVsock")
    assert text.search(refusal(replace(spec, devices=(vsock,))))
    text = documented(
        "cannot give … 4 queues: the machine starts with 1 vCPUs; lower network_queues"
    )
    assert text.search(refusal(replace(spec, devices=(net(4),))))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"devices": (KernelVsock(id="v", cid=3, vhost_fd=9),)}, "cannot use a KernelVsock"),
        (
            {"devices": tuple(HybridVsock(id=n, uds_path=Path("/u")) for n in "ab")},
            "cannot have 2 vsock devices: it has room for one",
        ),
        ({"devices": (Rng(), Rng(id="r2"))}, "cannot have 2 entropy sources"),
        ({"hotplug_ports": 30}, "the bus has 30 slots for them; lower hotplug_ports"),
        ({"hotplug_ports": -1}, "the bus has 30 slots"),
        ({"max_vcpus": 300}, "cannot have 300 vCPUs: it ends at 254; lower the maximum"),
        ({"cmdline": "x" * 2048}, "keep it below 2048 bytes"),
        ({"kernel": Path("/nowhere/k")}, "/nowhere/k"),
        ({"initrd": Path("/nowhere/i")}, "/nowhere/i"),
    ],
)
def test_refusal_names_thing_value_and_fix(spec, changes, words):
    assert words in refusal(replace(spec, **changes))


def test_program_that_the_vmms_user_may_not_reach_is_refused(spec, tmp_path, monkeypatch):
    monkeypatch.setattr(isolation, "machine_account", lambda *_: Account(uid=77, gid=77))
    tmp_path.chmod(0o700)
    assert "closed to the VMM's user" in refusal(spec)


def test_capabilities_follow_the_room_that_was_left(spec):
    roomy = CLH.capabilities(spec)
    assert roomy.hybrid_vsock
    assert not roomy.kernel_vsock
    assert roomy.block_hotplug
    assert roomy.vcpu_hotplug
    assert roomy.memory_hotplug
    tight = CLH.capabilities(replace(spec, hotplug_ports=0, max_vcpus=1, max_memory_mib=300))
    assert not any(
        (tight.block_hotplug, tight.net_hotplug, tight.vcpu_hotplug, tight.memory_hotplug)
    )


def test_kernel_of_another_machine_is_refused(spec, tmp_path):
    arm = tmp_path / "arm"
    arm.write_bytes(b"\x7fELF\x02" + bytes(13) + struct.pack("<H", 183) + bytes(100))
    assert "another machine than x86-64" in refusal(replace(spec, kernel=arm))
