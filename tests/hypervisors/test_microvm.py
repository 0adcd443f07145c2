"""QEMU's microvm: how its command line differs from q35's, and what it refuses, without a QEMU."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest

from hypervisors import accel
from hypervisors.errors import PreconditionFailed, Unsupported
from hypervisors.machine import BlockDevice, NetDevice, Rng
from hypervisors.qemu import Qemu
from hypervisors.qemu_argv import OpenBlock, build_command, kernel_cmdline
from hypervisors.qemu_devices import QemuDevices
from tests.harness.limitations import documented
from tests.hypervisors.test_qemu_argv import HOST, SPEC, comparable

MICROVM = replace(SPEC, machine_type="microvm")
GOLDEN = r"""
-machine microvm,accel=tcg,memory-backend=mem,pit=off,pic=off,rtc=on,acpi=on
-smp cpus=1,maxcpus=2
-m size=256M
-global virtio-mmio.force-legacy=false
-device {"driver":"pvpanic","id":"pvpanic"}
-device {"id":"share","chardev":"c-share","driver":"vhost-user-fs-device","tag":"kataShared","queue-size":1024,"bus":"virtio-mmio-bus.23"}
-device {"id":"vsock","chardev":"c-vsock","driver":"vhost-user-vsock-device","bus":"virtio-mmio-bus.22"}
-device {"driver":"virtio-net-device","id":"net0","netdev":"n-net0","mac":"02:00:00:00:00:01","host_mtu":1450,"mq":true,"bus":"virtio-mmio-bus.21"}
-device {"driver":"virtio-blk-device","id":"disk0","drive":"b-disk0","serial":"s1","bus":"virtio-mmio-bus.20"}
-device {"driver":"virtio-rng-device","id":"rng","rng":"s-rng","bus":"virtio-mmio-bus.19"}
"""  # noqa: E501
DISKS = tuple(BlockDevice(id=f"d{n}", path=Path("/img"), read_only=True) for n in range(2))


def pairs(argv):
    return [(option, comparable(value)) for option, value in itertools.pairwise(argv)]


def test_golden_differences_from_q35():
    """Nothing of PCI is left, and nothing that could grow."""
    argv = build_command(MICROVM, HOST).argv
    found = pairs(argv)
    for line in GOLDEN.strip().splitlines():
        option, _, value = line.partition(" ")
        assert (option, comparable(value)) in found, line
    assert not [argument for argument in argv if "-pci" in argument or "pcie" in argument]
    assert build_command(MICROVM, HOST).pass_fds == build_command(SPEC, HOST).pass_fds
    assert "pcie_ports" not in kernel_cmdline(MICROVM, "kvm")


def test_disks_are_named_in_the_order_of_the_specification():
    host = replace(HOST, blocks={disk.id: OpenBlock(20, "file") for disk in DISKS})
    command = build_command(replace(MICROVM, devices=(Rng(), *DISKS)), host)
    assert [command.addresses[disk.id].node for disk in DISKS] == ["/dev/vda", "/dev/vdb"]
    assert (command.addresses["rng"].node, command.addresses["rng"].pci_path) == ("", "")
    # The guest finds the last slot first.
    slots = [json.loads(a)["bus"] for a in command.argv if "virtio-blk-device" in a]
    assert slots == ["virtio-mmio-bus.22", "virtio-mmio-bus.21"]


def test_capabilities_promise_nothing_that_comes_later(monkeypatch):
    monkeypatch.setattr(accel, "kvm_problem", lambda: None)
    can = Qemu().capabilities(MICROVM)
    assert can.shared_directory
    assert can.pause
    assert can.panic_event
    assert not any((can.block_hotplug, can.net_hotplug, can.memory_hotplug))
    assert not any((can.vcpu_hotplug, can.vcpu_unplug))
    assert can.instead
    assert not Qemu().capabilities(SPEC).instead


async def test_what_would_come_later_is_refused_with_the_way_out():
    devices = QemuDevices(MICROVM, "tcg", None, {})  # type: ignore[arg-type]  # never reached
    net = NetDevice(id="net1", mac="02:00:00:00:00:01", tap_fds=(20,), mtu=1500)
    attach = documented(
        "qemu cannot attach … to a running microvm: it has no bus for devices that come later; "
        'set machine_type = "q35"'
    )
    for device in (net, DISKS[0]):
        with pytest.raises(Unsupported, match=attach):
            await devices.attach(device)
    memory = documented(
        "qemu cannot have … MiB: a microvm keeps what it was started with, …; set machine_type "
        '= "q35"'
    )
    with pytest.raises(Unsupported, match=memory):
        await devices.resize_memory(300)
    with pytest.raises(Unsupported, match="run with 2 vCPUs"):
        await devices.resize_vcpus(2)
    # What it has is not taken away, and that is no failure.
    assert await devices.resize_memory(100) == 256
    assert await devices.resize_vcpus(1) == 1


def test_emulating_one_is_refused_where_the_host_does_not_tell_its_counters_frequency(
    monkeypatch, tmp_path
):
    program = tmp_path / "qemu"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    spec = replace(MICROVM, binary=program, accelerator="tcg", devices=())
    text = documented(
        "the clock of an emulated microvm /proc/cpuinfo: it does not tell the frequency of this "
        'host\'s time stamp counter for sure; set machine_type = "q35", or use a host with KVM'
    )
    monkeypatch.setattr(accel, "tsc_khz", lambda: None)
    with pytest.raises(PreconditionFailed, match=text):
        Qemu().check(spec)
    with pytest.raises(PreconditionFailed, match="/guest/vmlinux"):
        Qemu().check(replace(spec, machine_type="q35"))
    monkeypatch.setattr(accel, "tsc_khz", lambda: 2300000)
    with pytest.raises(PreconditionFailed, match="/guest/vmlinux"):
        Qemu().check(spec)
