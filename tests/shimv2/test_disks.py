"""Which snapshots become disks, who shares them, and how images are made of directories."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from agent_proto.pb import agent_pb2
from hypervisors.errors import DetachRefused, Unsupported
from shimv2 import rootfs_image
from shimv2.block_rootfs import snapshot_disk
from shimv2.config import AgentConfig, HypervisorConfig, RuntimeConfig
from shimv2.disks import Disk, Disks
from shimv2.errors import FailedPrecondition, InvalidArgument, ResourceExhausted
from shimv2.journal import Journal
from shimv2.pb import containerd_mount_pb2 as mount_pb
from tests.fakes.fake_hypervisor import FakeMachine
from tests.fakes.fake_process import SLEEP
from tests.harness.limitations import documented
from tests.shimv2.shim_bench import ShimBench, overlay, pod_annotations, refusal, spec
from ttrpc import Code

_DISKS = [one for one in Path("/sys/block").glob("*/dev") if Path("/dev", one.parent.name).exists()]


def ext4(source: Path | str, *options: str, **more: str) -> Any:
    return mount_pb.Mount(type="ext4", source=str(source), options=options, **more)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "root.img"
    path.write_bytes(bytes(4096))
    return path


def test_a_file_or_device_with_a_disks_file_system_is_a_disk(image: Path) -> None:
    root = snapshot_disk("c1", [ext4(image, "loop", "ro", "noatime")])
    assert root is not None
    assert (root.mount.disk.path, root.mount.disk.read_only) == (image, True)
    assert (root.mount.fstype, root.mount.options) == ("ext4", ("ro", "noatime"))
    assert str(root.root) == "/run/kata-containers/sandbox/storage/c1/rootfs"


def test_nothing_else_is_taken_for_a_disk(image: Path, tmp_path: Path) -> None:
    for mounts in (
        [],
        [overlay()],
        [ext4(tmp_path)],  # a directory's device is the host's
        [ext4(tmp_path / "missing")],
        [ext4("/dev/null")],
        [ext4(image), ext4(image)],
        [ext4(image, target="/below")],
        [mount_pb.Mount(type="bind", source=str(image))],
    ):
        assert snapshot_disk("c1", mounts) is None


def vm() -> Any:
    class Spec:
        devices = ()

    return FakeMachine(Spec(), lambda: None)  # type: ignore[arg-type]  # nothing else is read


def disk(path: Path, *, read_only: bool = False) -> Disk:
    return Disk(path=path, read_only=read_only, what="volume v")


async def test_containers_share_a_disk_until_the_last_one_leaves(image: Path) -> None:
    machine, disks = vm(), Disks()
    first = await disks.attach(machine, disk(image), "a")
    link = image.with_name("link")
    os.link(image, link)
    assert await disks.attach(machine, disk(link), "b") == first
    assert disks.writers() == {"a", "b"}
    disks.unmounted("a")
    assert disks.writers() == {"b"}
    assert await disks.release(machine, "a") == []
    assert machine.detached == []
    assert await disks.release(machine, "b") == []
    assert machine.detached == ["disk1"]


async def test_a_disk_for_reading_is_not_for_writing_later(image: Path) -> None:
    machine, disks = vm(), Disks()
    await disks.attach(machine, disk(image, read_only=True), "a")
    assert disks.writers() == set()
    with pytest.raises(InvalidArgument, match="for reading only; let all containers of the pod"):
        await disks.attach(machine, disk(image), "b")


async def test_a_disk_that_the_guest_keeps_is_named_and_can_be_used_again(image: Path) -> None:
    machine, disks = vm(), Disks()
    await disks.attach(machine, disk(image), "a")
    machine.detach_error = DetachRefused("disk1", "busy")
    assert "busy" in (await disks.release(machine, "a"))[0]
    machine.detach_error = None
    await disks.attach(machine, disk(image), "b")
    assert len(machine.attached) == 1
    assert await disks.release(machine, "b") == []


async def test_what_is_no_disk_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="neither a block device nor an image file"):
        await Disks().attach(vm(), disk(tmp_path), "a")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree" / "rootfs"
    root.mkdir(parents=True, mode=0o750)
    (root / "file").write_text("content")
    (root / "link").symlink_to("/etc/passwd")
    os.mkfifo(root / "fifo")
    return tmp_path / "tree"


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal.open(str(tmp_path / "journal"))


def list_image(image: Path) -> str:
    command = ["/usr/sbin/debugfs", "-R", "ls -p /rootfs", str(image)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


async def test_an_image_has_the_tree_with_modes_links_and_special_files(
    tree: Path, tmp_path: Path, journal: Journal
) -> None:
    image = tmp_path / "i.img"
    await rootfs_image.build_image(tree, image, 32, journal, what="rootfs of c1")
    listing = list_image(image)
    modes = {line.split("/")[5]: line.split("/")[2] for line in listing.splitlines() if line}
    assert modes["."] == "040750"
    assert (modes["file"], modes["link"], modes["fifo"]) == ("100644", "120777", "010644")
    assert image.stat().st_size == 32 << 20
    assert image.stat().st_blocks * 512 < 4 << 20
    assert image.stat().st_mode & 0o777 == 0o600
    assert journal.held == ()


async def test_a_tree_that_does_not_fit_is_refused_with_the_key_to_raise(
    tree: Path, tmp_path: Path, journal: Journal
) -> None:
    (tree / "rootfs" / "big").write_bytes(os.urandom(20 << 20))
    with pytest.raises(
        ResourceExhausted,
        match=documented(
            "rootfs of container … does not fit into an image of … MiB, or the disk is full; raise "
            "rootfs_image_size or make room"
        ),
    ):
        await rootfs_image.build_image(
            tree, tmp_path / "i", 16, journal, what="rootfs of container c1"
        )


async def test_a_missing_mkfs_is_named(
    tree: Path, tmp_path: Path, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rootfs_image, "MKFS", tmp_path / "no-mkfs")
    with pytest.raises(FailedPrecondition, match=r"no-mkfs.*install e2fsprogs"):
        await rootfs_image.build_image(
            tree, tmp_path / "i", 16, journal, what="rootfs of container c1"
        )


async def test_an_image_that_takes_too_long_is_given_up(
    tree: Path, tmp_path: Path, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = tmp_path / "slow"
    slow.write_text("#!/bin/sh\nexec sleep 1000\n")
    slow.chmod(0o755)
    monkeypatch.setattr(rootfs_image, "MKFS", slow)
    with trio.move_on_after(0.3) as scope:
        await rootfs_image.build_image(
            tree, tmp_path / "i", 16, journal, what="rootfs of container c1"
        )
    assert scope.cancelled_caught
    assert journal.held == ()
    monkeypatch.setattr(rootfs_image, "DEADLINE_S", 0.2)
    with pytest.raises(Exception, match=r"took longer than 0.2 s; use a smaller image"):
        await rootfs_image.build_image(
            tree, tmp_path / "j", 16, journal, what="rootfs of container c1"
        )


def config(**hypervisor: Any) -> RuntimeConfig:
    return RuntimeConfig(
        agent=AgentConfig(readiness="push"), hypervisor=HypervisorConfig(**hypervisor)
    )


async def test_a_disk_snapshot_is_plugged_in_and_its_storage_named_to_the_agent(
    tmp_path: Path, image: Path
) -> None:
    async with ShimBench(tmp_path, config()).running() as shim:
        shim.hypervisor.block_hotplug = True
        await shim.run(rootfs=[ext4(image, "rw")])
        assert [device.path for device in shim.machine.attached] == [image]
        sent = shim.agent.called("CreateContainer")[0]
        (storage,) = sent.storages
        place = "/run/kata-containers/sandbox/storage/c1/rootfs"
        assert (storage.driver, storage.source, storage.fstype, storage.mount_point) == (
            "blk", "10/00", "ext4", place,
        )  # fmt: skip
        assert sent.OCI.Root.Path == place
        assert not [call for call in shim.mounts.calls if call[0] == "rootfs"]
        await shim.wait()
        # What was written outlives the VM: the guest unmounts it before.
        await shim.delete()
        assert [one.container_id for one in shim.agent.called("RemoveContainer")] == ["c1"]


@pytest.mark.parametrize(
    "setting", [{"disable_block_device_use": True}, {"hotplug_ports": 0}], ids=str
)
async def test_without_disks_a_disk_snapshot_is_mounted_on_the_host(
    tmp_path: Path, image: Path, setting: dict[str, Any]
) -> None:
    async with ShimBench(tmp_path, config(**setting)).running() as shim:
        shim.hypervisor.block_hotplug = True
        await shim.run(rootfs=[ext4(image, "rw")])
        assert shim.machine.attached == []
        assert [call[1] for call in shim.mounts.calls if call[0] == "rootfs"] == [[str(image)]]


async def test_a_member_that_leaves_gives_its_disk_back_after_the_guest_unmounted_it(
    tmp_path: Path, image: Path
) -> None:
    async with ShimBench(tmp_path, config()).running() as shim:
        shim.hypervisor.block_hotplug = True
        shim.agent.program(SLEEP)
        await shim.run("p1", config=spec(annotations=pod_annotations("sandbox", "p1")))
        member = spec(annotations=pod_annotations("container", "p1"))
        await shim.run("a", config=member, rootfs=[ext4(image, "rw")])
        await shim.kill("a")
        await shim.wait("a")
        await shim.delete("a")
        assert shim.machine.detached == ["disk1"]
        shim.machine.attach_error = Unsupported("fake", "attach another device", "full", "raise it")
        error = await refusal(shim.create("b", config=member, rootfs=[ext4(image, "rw")]))
        assert "attach another device" in str(error)


async def test_without_sharing_there_is_no_virtiofsd_and_the_root_is_an_image(
    tmp_path: Path,
) -> None:
    async with ShimBench(tmp_path, config(rootfs_image_size_mib=16)).running() as shim:
        shim.hypervisor.shared_directory = False  # as a backend without it says
        shim.hypervisor.block_hotplug = True
        await shim.run(rootfs=[overlay()])
        assert [helper.name for helper in shim.hypervisor.helpers] == ["vhost-device-vsock"]
        assert [storage.driver for storage in shim.agent.sandbox.storages] == []
        (attached,) = shim.machine.attached
        assert attached.path == Path(shim.state_dir.path) / "c1.rootfs.img"
        assert shim.agent.called("CreateContainer")[0].OCI.Root.Path.endswith("/c1/rootfs/rootfs")


async def test_neither_sharing_nor_disks_is_refused_before_anything_is_taken(
    tmp_path: Path,
) -> None:
    async with ShimBench(tmp_path, config(shared_fs="none")).running() as shim:
        error = await refusal(shim.create())
        assert error.code == Code.FAILED_PRECONDITION
        text = documented(
            "… has no way to give a container its files: without a shared directory it needs block "
            "devices; set hotplug_ports above 0 …"
        )
        assert text.search(str(error))
        assert not shim.hypervisor.machines


async def test_machine_that_nothing_can_be_plugged_into_is_refused_what_it_would_need(
    tmp_path: Path,
) -> None:
    made = config()
    grows = replace(made, runtime=replace(made.runtime, static_sandbox_resource_mgmt=False))
    microvm = 'machine_type = "q35"'
    for instead, configuration, text in (
        (
            microvm,
            config(shared_fs="none"),
            documented(
                "… has no way to give a container its files: without a shared directory it needs "
                'block devices; set machine_type = "q35", or shared_fs = "virtio-fs"'
            ),
        ),
        (
            microvm,
            grows,
            documented(
                "… gives this VM its size once, and with static_sandbox_resource_mgmt = false it "
                'would have to grow; set that to true, or machine_type = "q35"'
            ),
        ),
        (
            "another VMM ([hypervisor.qemu])",
            grows,
            documented(
                "… gives this VM its size once, and with static_sandbox_resource_mgmt = false it "
                "would have to grow; set that to true, or another VMM ([hypervisor.qemu])"
            ),
        ),
    ):
        async with ShimBench(tmp_path / "a", configuration).running() as shim:
            shim.hypervisor.instead = instead
            assert text.search(str(await refusal(shim.create())))
            assert not shim.hypervisor.machines


@pytest.mark.skipif(not _DISKS, reason="the machine has no disk")
@pytest.mark.parametrize(
    ("instead", "text"),
    [
        (
            "",
            documented(
                "device … is a disk of the host, and this VM takes none while it runs; set "
                "hotplug_ports above 0 …"
            ),
        ),
        (
            'machine_type = "q35"',
            documented(
                "device … is a disk of the host, and this VM takes none while it runs; set "
                'machine_type = "q35"'
            ),
        ),
    ],
)
async def test_a_disk_for_a_machine_that_takes_none_is_refused(
    tmp_path: Path, instead: str, text: re.Pattern[str]
) -> None:
    major, minor = _DISKS[0].read_text().strip().split(":")
    disk = {"path": "/dev/xvda", "type": "b", "major": int(major), "minor": int(minor)}
    linux = spec()["linux"] | {"devices": [disk]}
    async with ShimBench(tmp_path, config(hotplug_ports=0)).running() as shim:
        shim.hypervisor.instead = instead
        assert text.search(str(await refusal(shim.create(config=spec(linux=linux)))))


async def test_the_operators_mounts_need_a_shared_directory(tmp_path: Path) -> None:
    made = config(shared_fs="none", rootfs_image_size_mib=16)
    mounts = replace(made, runtime=replace(made.runtime, sandbox_bind_mounts=("/etc/hostname",)))
    async with ShimBench(tmp_path, mounts).running() as shim:
        shim.hypervisor.block_hotplug = True
        text = documented(
            "sandbox_bind_mounts needs a shared directory, which this machine has not; remove the "
            'key, or set shared_fs = "virtio-fs"'
        )
        assert text.search(str(await refusal(shim.create(rootfs=[overlay()]))))


async def test_without_sharing_an_empty_dir_is_a_disk_of_the_pod_and_the_last_words_come_back(
    tmp_path: Path,
) -> None:
    source = tmp_path / "pods" / "1" / "volumes" / "kubernetes.io~empty-dir" / "cache"
    source.mkdir(parents=True)
    source.chmod(0o2777)
    bind = {"destination": "/c", "type": "bind", "source": str(source), "options": ["rbind"]}
    log = tmp_path / "termination-log"
    log.touch()
    end = {"destination": "/dev/termination-log", "type": "bind", "source": str(log),
           "options": ["rbind", "rw"]}  # fmt: skip
    pod = spec(annotations=pod_annotations("sandbox", "p1"))
    member = spec(annotations=pod_annotations("container", "p1"), mounts=[bind, end])
    unshared = config(shared_fs="none", rootfs_image_size_mib=16)
    async with ShimBench(tmp_path, unshared).running() as shim:
        shim.hypervisor.block_hotplug = True
        shim.agent.program(SLEEP)
        await shim.run("p1", config=pod, rootfs=[overlay()])
        for container in ("a", "b"):
            await shim.run(container, config=member, rootfs=[overlay()])
        image = source / ".kata-volume.img"
        assert [one.path for one in shim.machine.attached].count(image) == 1
        assert "042777" in list_image(image)
        places = set()
        for request in shim.agent.called("CreateContainer")[1:]:
            mount = request.OCI.Mounts[0]
            places.add(mount.source)
            assert f"{request.storages[0].mount_point}/rootfs" == mount.source
        assert len(places) == 1
        reply = agent_pb2.GetDiagnosticDataResponse(data="out of cheese\n" + "x" * 5000)
        shim.agent.answer("GetDiagnosticData", reply)
        await shim.kill("a")
        await shim.wait("a")
        await shim.delete("a")
        assert log.read_text() == ("out of cheese\n" + "x" * 5000)[:4096]
        assert "volume-0" not in os.listdir(shim.state_dir.path)
    assert os.listdir(source) == []
