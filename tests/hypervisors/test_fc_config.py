"""What Firecracker is told: the requests of a machine, against its own description of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from hypervisors import fc_config
from hypervisors.machine import (
    BlockDevice,
    GuestAddress,
    HybridVsock,
    MachineSpec,
    NetDevice,
    Rng,
)

from . import openapi

SPEC = MachineSpec(
    id="m", kernel=Path("/k"), initrd=Path("/i"), cmdline=" agent.log=debug ", vcpus=2, max_vcpus=2,
    memory_mib=512, max_memory_mib=512, binary=Path("/fc"), run_dir=Path("/run/x"),
    hotplug_ports=3,
    devices=(
        HybridVsock(id="vsock0", uds_path=Path("/run/x/uds"), cid=7),
        BlockDevice(id="d-1", path=Path("/disk1"), read_only=True),
        NetDevice(id="net2", mac="02:00:00:00:00:01", tap_fds=(3,), mtu=1400),
        BlockDevice(id="d-2", path=Path("/disk2"), read_only=False),
        Rng(),
    ),
)  # fmt: skip
HOST = fc_config.HostSide(
    kernel="/kernel", initrd="/initrd", vsock="/run/v.sock", metrics="/run/metrics",
    placeholder="/run/empty", images={"d-1": "/disks/d-1", "d-2": "/disks/d-2"},
    taps={"net2": "tap0_kata"},
)  # fmt: skip


def bodies(spec: MachineSpec = SPEC, host: fc_config.HostSide = HOST) -> dict[str, object]:
    return {one.target: one.body for one in fc_config.requests(spec, host)}


def test_machine_is_described_before_its_devices_and_each_body_is_as_described():
    found = fc_config.requests(SPEC, HOST)
    assert [one.target for one in found] == [
        "/metrics", "/machine-config", "/boot-source", "/drives/disk0", "/drives/disk1",
        *(f"/drives/slot{number}" for number in range(5)),
        "/network-interfaces/net0", "/vsock", "/entropy",
    ]  # fmt: skip
    document = openapi.load("firecracker.swagger.yaml")
    paths = {"drives": "/drives/{drive_id}", "network-interfaces": "/network-interfaces/{iface_id}"}
    for one in found:
        path = paths.get(one.target.split("/")[1], one.target)
        schema = openapi.request_schema(document, "PUT", path)
        assert schema is not None, path
        assert openapi.problems(document, schema, one.body) == []


def test_machine_has_its_size_its_pages_and_the_callers_words_last():
    found = bodies()
    assert found["/machine-config"] == {"vcpu_count": 2, "mem_size_mib": 512, "smt": False}
    boot = found["/boot-source"]
    assert boot["kernel_image_path"] == "/kernel"
    assert boot["initrd_path"] == "/initrd"
    assert boot["boot_args"].startswith("console=ttyS0 reboot=k panic=-1 ")
    assert boot["boot_args"].endswith(" agent.log=debug")
    huge = bodies(replace(SPEC, huge_pages=True))["/machine-config"]
    assert huge["huge_pages"] == "2M"
    assert "initrd_path" not in bodies(SPEC, replace(HOST, initrd=None))["/boot-source"]


def test_drives_are_written_through_and_only_those_for_it():
    found = bodies()
    assert found["/drives/disk0"]["path_on_host"] == "/disks/d-1"
    assert found["/drives/disk0"]["is_read_only"]
    assert not found["/drives/disk1"]["is_read_only"]
    drives = {target: body for target, body in found.items() if "/slot" in target}
    assert [body["is_read_only"] for body in drives.values()] == [False] * 3 + [True] * 2
    assert {body["path_on_host"] for body in drives.values()} == {"/run/empty"}
    every = [body for target, body in found.items() if target.startswith("/drives/")]
    assert {body["cache_type"] for body in every} == {"Writeback"}


def test_disks_are_named_in_their_order_and_slots_come_after_them():
    assert fc_config.addresses(SPEC) == {
        "vsock0": GuestAddress(), "net2": GuestAddress(), "rng": GuestAddress(),
        "d-1": GuestAddress(node="/dev/vda"), "d-2": GuestAddress(node="/dev/vdb"),
    }  # fmt: skip
    assert [slot.node for slot in fc_config.slots(SPEC)] == [f"/dev/vd{name}" for name in "cdefg"]
    assert len(fc_config.slots(replace(SPEC, hotplug_ports=1))) == 2
    assert fc_config.slots(replace(SPEC, hotplug_ports=0)) == ()


def test_interface_is_the_tap_of_its_name_and_keeps_no_mtu_that_old_versions_do_not_know():
    assert bodies()["/network-interfaces/net0"] == {
        "iface_id": "net0", "host_dev_name": "tap0_kata", "guest_mac": "02:00:00:00:00:01",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ({"firecracker_version": "1.16.1"}, (1, 16)),
        ({"firecracker_version": "v1.12.0-dev"}, (1, 12)),
        ({"firecracker_version": "dev"}, None),
        ({"firecracker_version": 1.16}, None),
        ({}, None),
        (None, None),
        ("1.16", None),
    ],
)
def test_version_is_read_from_an_answer_or_it_is_none(answer, expected):
    assert fc_config.version(answer) == expected
