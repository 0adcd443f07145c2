"""What Cloud Hypervisor is asked for, by golden values and by its own description of its API."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from hypervisors.clh_config import (
    HostSide,
    device_addresses,
    disk_config,
    guest_address,
    kernel_cmdline,
    net_config,
    vm_config,
)
from hypervisors.machine import (
    BlockDevice,
    GuestAddress,
    HybridVsock,
    MachineSpec,
    NetDevice,
    Rng,
    SharedDirectory,
)

from . import openapi

DISK = BlockDevice(id="d0", path=Path("/dev/vda"), read_only=True, serial="s1")
NET = NetDevice(id="n0", mac="02:00:00:00:00:01", tap_fds=(7, 8), mtu=1400)
SPEC = MachineSpec(
    id="m",
    kernel=Path("/k"),
    initrd=Path("/i"),
    cmdline="kata.ready_port=1030",
    vcpus=2,
    max_vcpus=4,
    memory_mib=512,
    max_memory_mib=2048,
    binary=Path("/usr/bin/cloud-hypervisor"),
    run_dir=Path("/run/x"),
    devices=(
        SharedDirectory(id="share0", tag="kataShared", socket=Path("/run/x/fs.sock")),
        HybridVsock(id="vsock0", uds_path=Path("/run/x/vsock.sock")),
        Rng(),
        DISK,
        NET,
    ),
    hotplug_ports=8,
)
HOST = HostSide(
    kernel="/proc/self/fd/3",
    initrd="/proc/self/fd/4",
    directory="/proc/self/fd/5",
    vsock="/proc/self/fd/5/v.sock",
    shares={"share0": "/proc/self/fd/6"},
    images={"d0": "/proc/self/fd/5/disks/d0"},
    has_landlock=True,
)


def test_whole_machine_is_described_without_its_interfaces():
    assert vm_config(SPEC, HOST) == {
        "payload": {
            "kernel": "/proc/self/fd/3",
            "initramfs": "/proc/self/fd/4",
            "cmdline": kernel_cmdline(SPEC),
        },
        "cpus": {"boot_vcpus": 2, "max_vcpus": 4},
        "memory": {
            "size": 512 << 20,
            "shared": True,
            "hotplug_method": "Acpi",
            "hotplug_size": (1536 + 128) << 20,
        },
        "serial": {"mode": "Tty"},
        "console": {"mode": "Off"},
        "pvpanic": True,
        "landlock_enable": True,
        "landlock_rules": [{"path": "/proc/self/fd/5", "access": "rw"}],
        "fs": [
            {
                "id": "share0",
                "tag": "kataShared",
                "socket": "/proc/self/fd/6",
                "num_queues": 1,
                "queue_size": 1024,
            }
        ],
        "vsock": {"id": "vsock0", "cid": 3, "socket": "/proc/self/fd/5/v.sock"},
        "rng": {"id": "rng", "src": "/dev/urandom"},
        "disks": [disk_config(DISK, "/proc/self/fd/5/disks/d0")],
    }


def test_small_machine_has_nothing_that_was_not_asked_for():
    spec = replace(SPEC, devices=(), initrd=None, max_memory_mib=512, hotplug_ports=0)
    config = vm_config(spec, replace(HOST, initrd=None, has_landlock=False))
    assert config["memory"] == {"size": 512 << 20, "shared": False}
    assert config["landlock_enable"] is False
    assert set(config) == {
        "payload", "cpus", "memory", "serial", "console", "pvpanic", "landlock_enable",
    }  # fmt: skip
    # Room for less than one step is no room.
    assert vm_config(replace(spec, max_memory_mib=600), HOST)["memory"] == config["memory"]


def test_landlock_names_no_directory_when_no_disk_can_come():
    config = vm_config(replace(SPEC, hotplug_ports=0), HOST)
    assert config["landlock_enable"] is True
    assert "landlock_rules" not in config


def test_disks_are_raw_and_follow_no_other_file():
    assert disk_config(replace(DISK, serial="", read_only=False), "/x") == {
        "id": "d0", "path": "/x", "readonly": False, "image_type": "Raw", "backing_files": False,
    }  # fmt: skip
    assert disk_config(DISK, "/x")["serial"] == "s1"


def test_interface_has_a_pair_of_queues_for_each_descriptor_and_no_mtu():
    assert net_config(NET) == {"id": "n0", "mac": NET.mac, "num_queues": 4}


def test_callers_parameters_come_last_and_a_panic_reboots():
    line = kernel_cmdline(SPEC)
    assert line.endswith(" kata.ready_port=1030")
    assert "console=ttyS0" in line
    assert "panic=-1" in line


@pytest.mark.parametrize(
    ("bdf", "path"),
    [
        ("0000:00:05.0", "05"),
        ("0000:00:1F.0", "1f"),
        ("0001:00:05.0", None),
        ("0000:01:05.0", None),
        ("0000:00:05.1", None),
        ("5", None),
        (5, None),
        (None, None),
    ],
)
def test_address_is_the_slot_on_the_root_bus(bdf, path):
    assert guest_address(bdf) == (None if path is None else GuestAddress(pci_path=path))


def test_addresses_are_those_of_the_devices_below_the_pci_nodes():
    info = {
        "device_tree": {
            "_virtio-pci-d0": {"pci_bdf": "0000:00:02.0", "children": ["d0"], "id": "x"},
            "d0": {"pci_bdf": None, "children": []},
            "_virtio-pci-odd": {"pci_bdf": "0009:00:02.0", "children": ["odd"]},
            "_serial": {"children": [3]},
            "broken": 7,
        }
    }
    assert device_addresses(info) == {"d0": GuestAddress(pci_path="02")}
    for nothing in ({}, None, [], {"device_tree": None}, {"device_tree": []}):
        assert device_addresses(nothing) == {}


def test_every_body_is_what_the_vmm_describes():
    document = openapi.load("cloud-hypervisor.openapi.yaml")
    bodies = {
        "/vm.create": vm_config(SPEC, HOST),
        "/vm.add-disk": disk_config(DISK, "/x"),
        "/vm.add-net": net_config(NET),
        "/vm.remove-device": {"id": "d0"},
        "/vm.resize": {"desired_vcpus": 2, "desired_ram": 512 << 20},
    }
    found = {}
    for path, body in bodies.items():
        schema = openapi.request_schema(document, "PUT", path)
        assert schema is not None
        found[path] = openapi.problems(document, schema, body)
    assert found == {path: [] for path in bodies}
    for path in ("/vm.boot", "/vm.pause", "/vm.resume", "/vm.power-button", "/vmm.shutdown"):
        assert openapi.request_schema(document, "PUT", path) is None
    for path in ("/vmm.ping", "/vm.info"):
        assert "get" in document["paths"][path]


def test_description_refuses_what_is_wrong():
    document = openapi.load("cloud-hypervisor.openapi.yaml")
    wrong = vm_config(SPEC, HOST)
    wrong["cpus"] = {"boot_vcpus": 0, "max": 3}
    wrong["serial"] = {"mode": "tty"}
    assert openapi.problems(document, "VmConfig", wrong) == [
        "VmConfig.cpus: max_vcpus is missing",
        "VmConfig.cpus.boot_vcpus: 0 is below 1",
        "VmConfig.cpus: max is unknown",
        "VmConfig.serial.mode: 'tty' is none of ['Off', 'Pty', 'Tty', 'File', 'Socket', 'Null']",
    ]
