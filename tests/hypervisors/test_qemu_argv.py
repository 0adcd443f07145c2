"""MachineSpec → command line: one golden command, then the rules that hold for every one."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest

from hypervisors import qemu_argv
from hypervisors.machine import (
    BlockDevice,
    KernelVsock,
    MachineSpec,
    NetDevice,
    Rng,
    SharedDirectory,
    UnixVsock,
)
from hypervisors.qemu_argv import HostSide, OpenBlock, build_command, kernel_cmdline
from hypervisors.qemu_board import Q35

SPEC = MachineSpec(
    id="sandbox",
    kernel=Path("/guest/vmlinux"),
    initrd=Path("/guest/initrd.img"),
    cmdline="kata.ready_port=1030",
    vcpus=1,
    max_vcpus=4,
    memory_mib=256,
    max_memory_mib=2048,
    binary=Path("/usr/bin/qemu-system-x86_64"),
    run_dir=Path("/run/x"),
    devices=(
        SharedDirectory(id="share", tag="kataShared", socket=Path("/run/x/fs.sock")),
        UnixVsock(id="vsock", socket=Path("/run/x/vs.sock"), uds_path=Path("/run/x/uds")),
        NetDevice(id="net0", mac="02:00:00:00:00:01", tap_fds=(20, 21), mtu=1450),
        BlockDevice(id="disk0", path=Path("/img,a=b"), read_only=True, serial="s1"),
        Rng(),
    ),
    hotplug_ports=1,
)
HOST = HostSide(
    accelerator="tcg",
    qmp_fd=10,
    console_fd=11,
    kernel_fd=14,
    initrd_fd=15,
    vhost_user_fds={"share": 12, "vsock": 13},
    blocks={"disk0": OpenBlock(16, "file")},
)
GOLDEN = r"""
/usr/bin/qemu-system-x86_64
-name guest=sandbox,debug-threads=on
-no-user-config
-nodefaults
-no-reboot
-display none
-sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny
-machine q35,accel=tcg,memory-backend=mem,sata=off,usb=off,smbus=off,hpet=off,i8042=off,vmport=off
-cpu qemu64,+ssse3,+sse4.1,+sse4.2,+popcnt
-smp cpus=1,maxcpus=4
-m size=256M,slots=4,maxmem=2048M
-object {"qom-type":"memory-backend-memfd","id":"mem","size":268435456,"share":true}
-bios qboot.rom
-append {cmdline}
-kernel /proc/self/fd/3
-initrd /proc/self/fd/4
-chardev socket,id=qmp,fd=5
-mon chardev=qmp,mode=control
-chardev socket,id=console,fd=6
-serial chardev:console
-device {"driver":"pvpanic-pci","id":"pvpanic","bus":"pcie.0","addr":"0x1e"}
-chardev socket,id=c-share,fd=7
-device {"id":"share","chardev":"c-share","driver":"vhost-user-fs-pci","tag":"kataShared","queue-size":1024,"bus":"pcie.0","addr":"0x01"}
-chardev socket,id=c-vsock,fd=8
-device {"id":"vsock","chardev":"c-vsock","driver":"vhost-user-vsock-pci","bus":"pcie.0","addr":"0x02"}
-netdev tap,id=n-net0,fds=9:10
-device {"driver":"virtio-net-pci","id":"net0","netdev":"n-net0","mac":"02:00:00:00:00:01","host_mtu":1450,"romfile":"","mq":true,"vectors":6,"bus":"pcie.0","addr":"0x03"}
-add-fd fd=11,set=3
-blockdev {"driver":"file","node-name":"b-disk0","filename":"/dev/fdset/3","read-only":true,"discard":"unmap","locking":"off"}
-device {"driver":"virtio-blk-pci","id":"disk0","drive":"b-disk0","serial":"s1","bus":"pcie.0","addr":"0x04"}
-object {"qom-type":"rng-random","id":"s-rng","filename":"/dev/urandom"}
-device {"driver":"virtio-rng-pci","id":"rng","rng":"s-rng","bus":"pcie.0","addr":"0x05"}
-device {"driver":"pcie-root-port","id":"rp0","chassis":1,"slot":1,"bus":"pcie.0","addr":"0x10"}
"""  # noqa: E501


def comparable(argument):
    """JSON by content: the order of members means nothing."""
    return json.loads(argument) if argument.startswith("{") else argument


def test_golden_command_line():
    cmdline = kernel_cmdline(SPEC, "tcg")
    expected = []
    for line in GOLDEN.strip().splitlines():
        option, _, value = line.partition(" ")
        expected += [option] if not value else [option, value.replace("{cmdline}", cmdline)]
    command = build_command(SPEC, HOST)
    assert [*map(comparable, command.argv)] == [*map(comparable, expected)]
    assert command.pass_fds == dict(enumerate([14, 15, 10, 11, 12, 13, 20, 21, 16], 3))
    paths = {name: address.pci_path for name, address in command.addresses.items()}
    assert paths == {"share": "01", "vsock": "02", "net0": "03", "disk0": "04", "rng": "05"}


def test_emulation_only_parameters_never_reach_a_kvm_guest():
    assert " tsc_early_khz=2300000" in kernel_cmdline(SPEC, "tcg", 2300000)
    assert "tsc_early_khz" not in kernel_cmdline(SPEC, "kvm", 2300000)
    tcg, kvm = kernel_cmdline(SPEC, "tcg"), kernel_cmdline(SPEC, "kvm")
    for parameter in ("nokaslr", "mitigations=off"):
        assert parameter in tcg.split()
        assert parameter not in kvm.split()
    assert tcg.endswith("kata.ready_port=1030")
    argv = build_command(SPEC, replace(HOST, accelerator="kvm")).argv
    assert "host,pmu=off" in argv


def test_emulated_machine_has_room_for_a_second_vcpu():
    for accelerator, maximum in (("tcg", 2), ("kvm", 1)):
        spec, host = replace(SPEC, max_vcpus=1), replace(HOST, accelerator=accelerator)
        assert f"cpus=1,maxcpus={maximum}" in build_command(spec, host).argv


def test_machine_that_cannot_grow_has_no_memory_slots():
    argv = build_command(replace(SPEC, max_memory_mib=256), replace(HOST, initrd_fd=None)).argv
    assert "size=256M" in argv
    assert "-initrd" not in argv


def test_kernel_vsock_and_vhost_net_get_descriptors():
    net = NetDevice(id="n", mac="02:00:00:00:00:01", tap_fds=(20,), mtu=1500, vhost_fds=(30,))
    vsock = KernelVsock(id="v", cid=77, vhost_fd=40)
    command = build_command(replace(SPEC, devices=(net, vsock)), HOST)
    assert "tap,id=n-n,fds=7,vhost=on,vhostfds=8" in command.argv
    assert any('"guest-cid":77,"vhostfd":"9"' in argument for argument in command.argv)
    assert command.pass_fds == dict(enumerate([14, 15, 10, 11, 20, 30, 40], 3))


@pytest.mark.parametrize("count", range(len(SPEC.devices) + 1))
def test_every_descriptor_is_named_and_every_slot_used_once(count):
    for devices in itertools.permutations(SPEC.devices, count):
        spec = replace(SPEC, devices=devices, hotplug_ports=Q35.max_ports)
        command = build_command(spec, HOST)
        assert sorted(command.pass_fds) == [*range(3, 3 + len(command.pass_fds))]
        placed = [json.loads(a) for a in command.argv if a.startswith('{"') and "addr" in a]
        slots = [device["addr"] for device in placed]
        assert len(slots) == len(set(slots))


def test_port_addresses_are_slot_chains():
    assert qemu_argv.port_address(0).pci_path == "10/00"
    assert qemu_argv.port_address(Q35.max_ports - 1).pci_path == "1d/00"
