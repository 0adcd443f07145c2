"""Direct volumes and raw block devices: what a driver or a spec says, and what the agent hears."""

from __future__ import annotations

import base64
import json
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from shimv2 import block_volumes, direct_volume
from shimv2.block_volumes import DirectVolumes, device_disks
from shimv2.config import AgentConfig, HypervisorConfig, RuntimeConfig
from shimv2.direct_volume import directory_of, find
from shimv2.errors import InvalidArgument, Unimplemented
from shimv2.guest_spec import SharedMount
from shimv2.journal import Journal
from tests.fakes.fake_process import SLEEP
from tests.harness.limitations import documented
from tests.shimv2.shim_bench import ShimBench, refusal, spec

VOLUME = "/var/lib/kubelet/pods/1/volumes/kubernetes.io~csi/pv/mount"
_NO_TYPE = documented(
    'mount …: …/mountInfo.json: volume-type "…" is not offered; known are "block", "directvol"'
)
_NO_KEY = documented(
    "… metadata encryptionKey is not offered; give a disk with a plain file system"
)
INFO: dict[str, Any] = {
    "volume-type": "block",
    "device": "/dev/sdf",
    "fstype": "ext4",
    "metadata": {"fsGroup": "1000", "fsGroupChangePolicy": "OnRootMismatch"},
    "options": ["rw", "noatime"],
}


def mount(*, read_only: bool = False, source: str = VOLUME) -> SharedMount:
    return SharedMount(
        index=0,
        source=Path(source),
        destination=PurePosixPath("/v"),
        read_only=read_only,
        is_recursive=True,
    )


def assign(root: Path, info: object = INFO, volume: str = VOLUME, **changes: object) -> Path:
    """What `kata-runtime direct-volume add` does."""
    directory = root / base64.urlsafe_b64encode(volume.encode()).decode()
    directory.mkdir(parents=True, exist_ok=True)
    content = {**info, **changes} if isinstance(info, dict) else info
    path = directory / "mountInfo.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    path.chmod(0o600)
    return directory


def test_the_directory_is_named_as_katas_tool_names_it() -> None:
    # As Kata's own unit test of it computes the name: URL-safe base64 with padding.
    directory = directory_of("/kubelet/a/b/c/d/sdf")
    assert str(directory) == (
        "/run/kata-containers/shared/direct-volumes/L2t1YmVsZXQvYS9iL2MvZC9zZGY="
    )
    assert directory_of("/" + "x" * 200) is None


def test_an_assignment_is_read_field_by_field(tmp_path: Path) -> None:
    directory = assign(tmp_path)
    volume = find(mount(), tmp_path)
    assert volume is not None
    assert (volume.directory, volume.device, volume.fstype, volume.options) == (
        directory, Path("/dev/sdf"), "ext4", ("rw", "noatime"),
    )  # fmt: skip
    assert volume.fs_group is not None
    assert (volume.fs_group.group_id, volume.fs_group.group_change_policy) == (1000, 1)
    assert find(mount(source="/other"), tmp_path) is None


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"volume-type": "vfiovol"}, Unimplemented, _NO_TYPE.pattern),
        ({"device": "sdf"}, InvalidArgument, "device must be an absolute path"),
        ({"fstype": "e/../x"}, InvalidArgument, "fstype a name"),
        ({"options": "rw"}, InvalidArgument, "options must be a list"),
        ({"device": 4}, InvalidArgument, "device must be a string"),
        ({"metadata": []}, None, ""),
        ({"metadata": ["x"]}, InvalidArgument, "metadata must be an object"),
        ({"metadata": {"fsGroup": "-1"}}, InvalidArgument, "fsGroup must be a number"),
        ({"metadata": {"fsGroup": "99999999999"}}, InvalidArgument, "fsGroup must be a number"),
        ({"metadata": {"encryptionKey": "k"}}, Unimplemented, _NO_KEY.pattern),
        ({"metadata": {"createFilesystem": "true"}}, Unimplemented, "createFilesystem is not off"),
    ],
    ids=str,
)
def test_an_assignment_that_makes_no_sense_is_refused_with_its_file(
    tmp_path: Path, changes: dict[str, object], error: type[Exception] | None, text: str
) -> None:
    assign(tmp_path, **changes)
    if error is None:
        assert find(mount(), tmp_path) is not None
        return
    with pytest.raises(error, match=text) as caught:
        find(mount(), tmp_path)
    assert re.match(r"mount /v: .*/mountInfo.json: ", str(caught.value))


@pytest.mark.parametrize("content", ["{", "[]", "[" * 100_000], ids=["torn", "list", "deep"])
def test_an_assignment_that_is_no_object_is_refused(tmp_path: Path, content: str) -> None:
    assign(tmp_path, content)
    with pytest.raises(InvalidArgument, match=r"mountInfo.json"):
        find(mount(), tmp_path)


def test_an_assignment_that_others_can_write_is_refused(tmp_path: Path) -> None:
    (assign(tmp_path) / "mountInfo.json").chmod(0o666)
    with pytest.raises(InvalidArgument, match="only root can write"):
        find(mount(), tmp_path)


def test_a_volume_is_marked_as_used_by_its_sandbox_until_that_ends(tmp_path: Path) -> None:
    directory = assign(tmp_path / "v")
    journal = Journal.open(str(tmp_path / "journal"))
    volumes = DirectVolumes(journal, "sandbox1", tmp_path / "v")
    first = volumes.find(mount())
    assert volumes.find(mount()) == first
    assert first is not None
    assert first.options == ("noatime",)
    assert (directory / "sandbox1").exists()
    assert journal.undo() == []
    assert not (directory / "sandbox1").exists()
    readonly = volumes.find(mount(read_only=True))
    assert readonly is not None
    assert (readonly.disk.read_only, readonly.options) == (True, ("noatime", "ro"))


def test_a_device_that_the_host_does_not_have_is_named() -> None:
    listed = {"path": "/dev/xvda", "type": "b", "major": 4095, "minor": 7}
    with pytest.raises(InvalidArgument, match=r"device /dev/xvda \(b 4095:7\): the host has none"):
        device_disks(spec(linux={"devices": [listed]}), "c1")


def config(**hypervisor: Any) -> RuntimeConfig:
    return RuntimeConfig(
        agent=AgentConfig(readiness="push"), hypervisor=HypervisorConfig(**hypervisor)
    )


@pytest.fixture
def volume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A config.json with a direct volume at /v."""
    (tmp_path / "disk").write_bytes(bytes(4096))
    assign(tmp_path / "direct", device=str(tmp_path / "disk"))
    monkeypatch.setattr(direct_volume, "ROOT", tmp_path / "direct")
    monkeypatch.setattr(DirectVolumes.__init__, "__defaults__", (tmp_path / "direct",))
    bind = {"destination": "/v", "type": "bind", "source": VOLUME, "options": ["rbind"]}
    return spec(mounts=[bind])


async def test_a_direct_volume_is_plugged_in_and_mounted_by_the_agent(
    tmp_path: Path, volume: dict[str, Any]
) -> None:
    async with ShimBench(tmp_path, config()).running() as shim:
        shim.hypervisor.block_hotplug = True
        shim.agent.program(SLEEP)
        await shim.run(config=volume)
        sent = shim.agent.called("CreateContainer")[0]
        (storage,) = sent.storages
        assert (storage.driver, storage.source, storage.fstype) == ("blk", "10/00", "ext4")
        assert (list(storage.options), storage.fs_group.group_id) == (["noatime"], 1000)
        assert storage.mount_point.startswith("/run/kata-containers/sandbox/storage/")
        assert [one.source for one in sent.OCI.Mounts] == [storage.mount_point]
        assert [one.path for one in shim.machine.attached] == [tmp_path / "disk"]


async def test_a_disk_of_the_spec_is_a_device_of_the_agents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = tmp_path / "disk"
    image.write_bytes(bytes(512))
    monkeypatch.setattr(block_volumes, "_node_of", lambda device: image)
    listed = {"path": "/dev/xvda", "type": "b", "major": 7, "minor": 3}
    linux = {"namespaces": [{"type": "network"}], "devices": [listed]}
    async with ShimBench(tmp_path, config()).running() as shim:
        shim.hypervisor.block_hotplug = True
        await shim.run(config=spec(linux=linux))
        (device,) = shim.agent.called("CreateContainer")[0].devices
        assert (device.type, device.id, device.container_path) == ("blk", "10/00", "/dev/xvda")


@pytest.mark.parametrize("kind", ["device", "volume"])
async def test_a_machine_without_disks_refuses_them_with_the_keys_to_set(
    tmp_path: Path, volume: dict[str, Any], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    if kind == "device":
        monkeypatch.setattr(block_volumes, "_node_of", lambda device: tmp_path / "disk")
        listed = {"path": "/dev/xvda", "type": "b", "major": 7, "minor": 3}
        volume = spec(linux={"namespaces": [{"type": "network"}], "devices": [listed]})
    async with ShimBench(tmp_path, config(hotplug_ports=0)).running() as shim:
        error = await refusal(shim.create(config=volume))
        assert "set hotplug_ports above 0" in str(error)
    assert os.listdir(tmp_path / "direct")
