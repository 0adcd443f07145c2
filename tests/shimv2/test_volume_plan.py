"""Kubelet's paths and the host's mounts -> what the guest makes of a volume. Nothing is mounted."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from shimv2.errors import InvalidArgument
from shimv2.guest_spec import SharedMount
from shimv2.sandbox_mounts import plan_sandbox_mounts
from shimv2.volume_plan import VolumeKind, kubelet_volume, memory_volume, watched_volume
from shimv2.volume_source import MountedAt
from tests.harness.limitations import documented

POD = "/var/lib/kubelet/pods/0b81"
EMPTY_DIR = f"{POD}/volumes/kubernetes.io~empty-dir/cache"
SUBPATH = f"{POD}/volume-subpaths/cache/web/0"
EPHEMERAL = "/run/kata-containers/sandbox/ephemeral/cache"


def mounted(place: str, fstype: str = "tmpfs", **fields: Any) -> MountedAt:
    line = MountedAt(
        id=7, device="0:70", root="/", place=place, fstype=fstype, super_options=("rw",)
    )
    return line._replace(**fields)


def planned(
    source: str, table: list[MountedAt], mount_id: int = 7, limits: Any = (), **status: int
) -> Any:
    mount = SharedMount(
        index=0,
        source=Path(source),
        destination=PurePosixPath("/v"),
        read_only=False,
        is_recursive=True,
    )
    volume = kubelet_volume(PurePosixPath(source))
    assert volume is not None
    found = {"mode": 0o42777, "uid": 0, "gid": 2000, **status}
    stat = os.stat_result((found["mode"], 1, 1, 1, found["uid"], found["gid"], 0, 0, 0, 0))
    spec = {"linux": {"resources": {"hugepageLimits": list(limits)}}}
    return memory_volume(mount, volume, table, mount_id, stat, spec)


@pytest.mark.parametrize(
    ("path", "kind", "name"),
    [
        (EMPTY_DIR, VolumeKind.EMPTY_DIR, "cache"),
        (f"{POD}/volumes/kubernetes.io~configmap/c", VolumeKind.CONFIG_MAP, "c"),
        (f"{POD}/volumes/kubernetes.io~secret/s", VolumeKind.SECRET, "s"),
        (f"{POD}/volumes/kubernetes.io~projected/p", VolumeKind.PROJECTED, "p"),
        (f"{POD}/volumes/kubernetes.io~downward-api/d", VolumeKind.DOWNWARD_API, "d"),
        (SUBPATH, VolumeKind.SUBPATH, "cache"),
    ],
)
def test_kubelets_volumes_are_known_by_their_paths(path: str, kind: VolumeKind, name: str) -> None:
    volume = kubelet_volume(PurePosixPath(path))
    assert volume is not None
    assert (volume.kind, volume.pod, volume.name) == (kind, POD, name)


@pytest.mark.parametrize(
    "path",
    [
        "/data",
        f"{POD}/volumes/kubernetes.io~csi/pvc-1/mount",
        f"{POD}/etc-hosts",
        f"{EMPTY_DIR}/below",
        "/volumes/kubernetes.io~empty-dir/x",
        f"{POD}/volumes",
    ],
)
def test_other_paths_are_nobodys(path: str) -> None:
    assert kubelet_volume(PurePosixPath(path)) is None


def test_an_empty_dir_in_memory_has_the_hosts_size_owner_and_mode() -> None:
    made = planned(EMPTY_DIR, [mounted(EMPTY_DIR, super_options=("rw", "size=4096k"))])
    (storage,) = made.storages
    assert (storage.driver, storage.source, storage.fstype) == ("ephemeral", "tmpfs", "tmpfs")
    assert list(storage.options) == ["mode=2777", "uid=0", "gid=2000", "size=4096k"]
    assert storage.mount_point == str(made.path) == EPHEMERAL


def test_without_a_limit_the_size_is_the_guest_kernels_to_choose() -> None:
    (storage,) = planned(EMPTY_DIR, [mounted(EMPTY_DIR)]).storages
    assert not [option for option in storage.options if option.startswith("size")]


@pytest.mark.parametrize(
    "table",
    [
        [mounted("/var", "ext4")],
        [mounted("/var/lib/kubelet")],  # the whole of kubelet's directory is a tmpfs
        [mounted(EMPTY_DIR, root="/elsewhere")],
        [],
    ],
)
def test_an_empty_dir_on_disk_is_shared(table: list[MountedAt]) -> None:
    assert planned(EMPTY_DIR, table) is None


def test_a_subpath_of_a_memory_volume_lies_in_the_guests() -> None:
    whole = mounted(EMPTY_DIR, super_options=("size=1k",))
    part = mounted(SUBPATH, id=8, root="/a/b%", super_options=("size=1k",))
    made = planned(SUBPATH, [whole, part], mount_id=8, mode=0o40750)
    memory, local, bound = made.storages
    assert (memory.mount_point, list(memory.options)) == (EPHEMERAL, ["mode=0777", "size=1k"])
    assert (local.driver, local.mount_point) == ("local", f"{EPHEMERAL}/a/b%")
    assert list(local.options) == ["mode=0750", "fsgid=2000"]
    assert (bound.driver, bound.source) == ("virtio-fs", local.mount_point)
    assert str(made.path) == bound.mount_point
    assert made.path.name == "cache:a%2Fb%25"


def test_a_subpath_of_another_file_system_is_shared() -> None:
    table = [mounted(EMPTY_DIR), mounted(SUBPATH, id=8, device="0:99", root="/a")]
    assert planned(SUBPATH, table, mount_id=8) is None


def test_huge_pages_are_as_many_as_the_containers_limit() -> None:
    table = [mounted(EMPTY_DIR, "hugetlbfs", super_options=("rw", "pagesize=2M"))]
    limits = [{"pageSize": "1GB", "limit": 1 << 30}, {"pageSize": "2MB", "limit": 4 << 20}]
    (storage,) = planned(EMPTY_DIR, table, limits=limits).storages
    assert (storage.driver, storage.source, storage.fstype) == ("ephemeral", "nodev", "hugetlbfs")
    assert list(storage.options)[-2:] == ["pagesize=2M", f"size={4 << 20}"]


@pytest.mark.parametrize("limits", [[], [{"pageSize": "2MB", "limit": 0}], [{"pageSize": "x"}]])
def test_huge_pages_without_a_limit_are_refused_with_a_sentence(limits: Any) -> None:
    table = [mounted(EMPTY_DIR, "hugetlbfs", super_options=("rw", "pagesize=2M"))]
    with pytest.raises(
        InvalidArgument,
        match=documented(
            "mount …: huge pages of 2M without a limit, so the guest cannot set any aside; set "
            "resources.limits of that page size"
        ),
    ):
        planned(EMPTY_DIR, table, limits=limits)


def test_a_configmap_is_copied_by_the_agent_from_the_share() -> None:
    made = watched_volume("volume:1-c", PurePosixPath("/share/volume:1-c"))
    (storage,) = made.storages
    assert (storage.driver, storage.source) == ("watchable-bind", "/share/volume:1-c")
    assert storage.mount_point == str(made.path)


def test_the_operators_mounts_are_read_only_unless_they_say_otherwise() -> None:
    one, two, three = plan_sandbox_mounts(["/etc/a", "/b:rw", "/c:ro"])
    assert [mount.read_only for mount in (one, two, three)] == [True, False, True]
    assert [str(mount.source) for mount in (one, two, three)] == ["/etc/a", "/b", "/c"]
    assert str(one.destination).endswith("/containers/sandbox-mounts/a")
    assert not one.follows_host


@pytest.mark.parametrize("value", ["relative", "", "/", "/a/..", ":ro"])
def test_an_operators_mount_must_be_a_path(value: str) -> None:
    with pytest.raises(
        InvalidArgument,
        match=documented("sandbox_bind_mounts: … is no absolute path of a file or directory, …"),
    ):
        plan_sandbox_mounts([value])


def test_two_of_the_operators_mounts_cannot_have_one_name() -> None:
    with pytest.raises(
        InvalidArgument, match=documented("… would have the same name in the guest; rename one")
    ) as caught:
        plan_sandbox_mounts(["/a/x", "/b/x"])
    assert "'/b/x' and '/a/x' would" in str(caught.value)
