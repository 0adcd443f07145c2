"""What the ACRN backend refuses before anything is taken, in the words of docs/limitations.md."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from hypervisors import accel
from hypervisors.errors import PreconditionFailed, Unsupported
from hypervisors.machine import (
    BlockDevice,
    HybridVsock,
    KernelVsock,
    MachineSpec,
    Rng,
    SharedDirectory,
)
from hypervisors.registry import find_hypervisor
from tests.fakes import fake_acrn
from tests.harness.limitations import documented

ACRN = find_hypervisor("acrn")


@pytest.fixture
def spec(tmp_path, monkeypatch):
    """One that passes, on a host that is a Service VM."""
    monkeypatch.setattr(accel, "acrn_problem", lambda: None)
    monkeypatch.setattr(accel, "kernel_vsock_usable", lambda: True)
    (tmp_path / "initrd").write_bytes(b"070701" + bytes(100))
    return MachineSpec(
        id="m", kernel=fake_acrn.write_kernel(tmp_path), initrd=tmp_path / "initrd", cmdline="",
        vcpus=1, max_vcpus=2, memory_mib=256, max_memory_mib=512, unprivileged=False,
        binary=fake_acrn.write_program(tmp_path), run_dir=tmp_path, devices=(Rng(),),
        hotplug_ports=2,
    )  # fmt: skip


def refusal(spec):
    with pytest.raises((PreconditionFailed, Unsupported)) as caught:
        ACRN.check(spec)
    return str(caught.value)


def test_machine_that_can_be_built_passes(spec):
    ACRN.check(spec)
    ACRN.check(replace(spec, devices=(Rng(), KernelVsock(id="v", cid=3, vhost_fd=-1))))


def test_host_without_acrn_is_told_of_other_vmms(spec, monkeypatch):
    monkeypatch.setattr(accel, "acrn_problem", lambda: "/dev/acrn_hsm does not open: No such file")
    text = documented(
        "ACRN: …; boot this host as its Service VM, or use another VMM ([hypervisor.qemu])"
    )
    assert text.fullmatch(refusal(spec))


def test_vmm_that_only_root_can_run_must_be_allowed_to(spec):
    text = documented(
        "acrn cannot run acrn-dm as a user of its own: the hypervisor's device and the host's huge "
        "pages are root's; set rootless = false, or use another VMM ([hypervisor.qemu])"
    )
    assert text.fullmatch(refusal(replace(spec, unprivileged=True)))


def test_accelerator_cannot_be_chosen(spec):
    text = documented(
        "acrn cannot run guests on …: it is the hypervisor below this host; set accelerator = "
        '"auto", or use another VMM ([hypervisor.qemu])'
    )
    assert text.fullmatch(refusal(replace(spec, accelerator="kvm")))


def test_kernel_must_be_a_bzimage(spec, tmp_path):
    from . import scratch_guest

    if not scratch_guest.KERNEL.exists():
        pytest.skip("needs `make guest`")
    text = documented(
        "guest kernel …: no bzImage, and acrn-dm loads nothing else; set kernel to the bzImage "
        "beside it (make guest makes one)"
    )
    assert text.fullmatch(refusal(replace(spec, kernel=scratch_guest.KERNEL)))


def test_host_without_the_kernels_vsock_is_refused(spec, monkeypatch):
    monkeypatch.setattr(accel, "kernel_vsock_usable", lambda: False)
    text = documented(
        "vsock of the host's kernel /dev/vhost-vsock: does not open; load vhost_vsock, or use "
        "another VMM ([hypervisor.qemu])"
    )
    vsock = KernelVsock(id="v", cid=3, vhost_fd=-1)
    assert text.fullmatch(refusal(replace(spec, devices=(vsock,))))


def test_more_vcpus_than_the_host_has_processors_are_refused(spec):
    text = documented(
        "vCPUs: … were asked for, and ACRN gives each a processor of the … here; lower "
        "default_vcpus, or the pod's limits"
    )
    assert text.fullmatch(refusal(replace(spec, vcpus=5000, max_vcpus=5000)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"devices": (SharedDirectory(id="fs", tag="t", socket=Path("/s")),)},
            'cannot share /s: it has no shared file system; give containers disks (shared_fs = "no',
        ),
        (
            {"devices": (HybridVsock(id="v", uds_path=Path("/u")),)},
            "cannot have the HybridVsock v: acrn-dm has no such device; use another VMM",
        ),
        (
            {"devices": (BlockDevice(id="d", path=Path("/d"), read_only=True, serial="s"),)},
            "cannot give a disk a serial number",
        ),
        ({"hotplug_ports": 28}, "the bus has 28 slots for them; lower hotplug_ports"),
        ({"memory_mib": 100}, "cannot have 100 MiB: it begins at 128; raise default_memory"),
        ({"binary": Path("/usr/bin/no-acrn")}, "install acrn-dm, or correct the hypervisor path"),
        ({"cmdline": "x" * 2048}, "keep it below 2048 bytes"),
        ({"initrd": Path("/nowhere/i")}, "/nowhere/i"),
    ],
)
def test_refusal_names_thing_value_and_fix(spec, changes, words):
    assert words in refusal(replace(spec, **changes))


def test_capabilities_are_those_of_a_machine_that_keeps_what_it_has(spec):
    can = ACRN.capabilities(spec)
    assert (can.block_hotplug, can.block_unplug) == (True, False)
    assert can.kernel_vsock
    assert not any(
        (can.shared_directory, can.net_hotplug, can.vcpu_hotplug, can.memory_hotplug, can.pause)
    )
    assert can.instead == "another VMM ([hypervisor.qemu])"
    without = ACRN.capabilities(replace(spec, hotplug_ports=0))
    assert (without.block_hotplug, without.instead) == (False, "")
