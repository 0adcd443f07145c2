"""What gets into the share, in which order, and what is refused. No mount is made here."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from shimv2.bundle import Bundle, ContainerKind
from shimv2.errors import InvalidArgument, ShimError, Unimplemented
from shimv2.journal import Journal
from shimv2.mounts import MS_PRIVATE, MS_SLAVE, MountFailed
from shimv2.rootfs import Share, check_owners, sandbox_dns
from tests.harness.limitations import documented
from tests.shimv2.shim_bench import FakeMounts, overlay, spec


class Bench:
    def __init__(self, root: Path) -> None:
        self.state = root / "state"
        self.state.mkdir()
        self.calls = FakeMounts()
        self.journal = Journal.open(str(self.state / "journal"))
        self.share = Share(self.state, self.journal, self.calls)
        self.share.prepare()
        self.path = root / "bundle"
        (self.path / "rootfs").mkdir(parents=True)

    def bundle(self, *mounts: dict[str, Any], container: str = "c1") -> Bundle:
        config = spec(mounts=list(mounts))
        return Bundle(
            container_id=container,
            path=self.path,
            spec=config,
            kind=ContainerKind.SINGLE,
            sandbox_id="c1",
        )


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def bind(source: Path, destination: str = "/v", *options: str) -> dict[str, Any]:
    return {
        "destination": destination,
        "type": "bind",
        "source": str(source),
        "options": ["rbind", *options],
    }


def test_the_share_is_the_read_only_peer_of_a_shared_mount(bench: Bench) -> None:
    mounts, share = str(bench.state / "mounts"), str(bench.state / "share")
    assert bench.calls.calls == [("shared", mounts), ("bind", mounts, share, True)]
    assert str(bench.share.path) == share


def test_guest_modules_are_shown_read_only_if_they_are_there(tmp_path: Path) -> None:
    modules = tmp_path / "modules"
    for name, expected in (("without", 0), ("with", 1)):
        state = tmp_path / name
        state.mkdir()
        calls, journal = FakeMounts(), Journal.open(str(state / "journal"))
        Share(state, journal, calls).prepare(modules)
        target = str(state / "mounts/.modules")
        assert calls.calls.count(("bind", str(modules), target, True)) == expected
        held = [entry.fields.get("target") for entry in journal.held]
        assert held.count(target) == expected
        modules.mkdir(exist_ok=True)


def test_a_snapshotters_mounts_go_straight_into_the_share(bench: Bench) -> None:
    paths = bench.share.add(bench.bundle(), [overlay("o")])
    assert bench.calls.calls[-1] == ("rootfs", ["o"], str(bench.state / "mounts/c1/rootfs"))
    assert str(paths.root) == "/run/kata-containers/shared/containers/c1/rootfs"


def test_without_mounts_the_directory_of_the_spec_is_bound(bench: Bench) -> None:
    bench.share.add(bench.bundle(), [])
    assert bench.calls.calls[-1][:2] == ("bind", str(bench.path / "rootfs"))


def test_layers_that_are_id_mapped_are_refused_with_a_way_out() -> None:
    mapped = overlay("o")
    mapped.options.append("uidmap=0:100000:65536")
    with pytest.raises(
        Unimplemented,
        match=documented(
            "rootfs of container …: id-mapped layers (uidmap=…) cannot be shared with the VM; use "
            "a snapshot whose files belong to the mapped users (ctr: without --remap-labels), or "
            "no user namespace (Kubernetes: hostUsers: true)"
        ),
    ):
        check_owners("c1", [overlay("plain"), mapped])


def test_a_rootfs_that_is_no_directory_is_refused(bench: Bench) -> None:
    (bench.path / "rootfs").rmdir()
    with pytest.raises(InvalidArgument, match="rootfs is not a directory"):
        bench.share.add(bench.bundle(), [])


def test_an_unknown_rootfs_type_is_refused_by_name(bench: Bench) -> None:
    bench.calls.error = MountFailed("mount", "/x", errno.ENODEV)
    with pytest.raises(
        InvalidArgument,
        match=documented(
            "rootfs of container …: the host's kernel knows no filesystem type among …; use a "
            "snapshotter that mounts overlay or bind"
        ),
    ) as caught:
        bench.share.add(bench.bundle(), [overlay()])
    assert "'overlay'" in str(caught.value)


def test_files_and_directories_are_bound_each_on_its_kind(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "dir").mkdir()
    paths = bench.share.add(
        bench.bundle(bind(tmp_path / "file", "/f", "ro"), bind(tmp_path / "dir", "/d")), []
    )
    assert [str(path) for path in paths.sources.values()] == [
        "/run/kata-containers/shared/containers/volume:1-file",
        "/run/kata-containers/sandbox/volumes/volume:2-dir",
    ]
    assert (bench.state / "mounts/volume:1-file").is_file()
    assert (bench.state / "mounts/volume:2-dir").is_dir()
    assert [call[3] for call in bench.calls.calls[-2:]] == [True, False]


def test_a_volume_that_should_lead_to_the_host_is_told_to_end_in_the_vm(
    bench: Bench, tmp_path: Path
) -> None:
    paths = bench.share.add(bench.bundle(bind(tmp_path, "/v", "rshared")), [])
    text = documented("mount …: what the container mounts there stays in the VM; …")
    assert [note for note in paths.notes if text.search(note)]


def test_a_missing_source_is_named(bench: Bench, tmp_path: Path) -> None:
    with pytest.raises(
        InvalidArgument, match=documented("mount …: source …: No such file or directory")
    ) as caught:
        bench.share.add(bench.bundle(bind(tmp_path / "gone")), [])
    assert "/v: source" in str(caught.value)


def test_a_socket_of_the_host_is_refused_with_a_sentence(bench: Bench, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        with pytest.raises(
            InvalidArgument,
            match=documented(
                "mount …: … is a unix socket of the host, which a VM cannot reach; remove the mount"
            ),
        ):
            bench.share.add(bench.bundle(bind(tmp_path / "s")), [])


def test_a_fifo_of_the_host_is_refused_with_a_sentence(bench: Bench, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "f")
    with pytest.raises(InvalidArgument, match="a fifo of the host"):
        bench.share.add(bench.bundle(bind(tmp_path / "f")), [])


def test_removal_takes_back_one_container_and_leaves_the_others(
    bench: Bench, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("kept")
    bench.share.add(bench.bundle(bind(tmp_path / "file")), [overlay()])
    bench.share.remove("c1")
    assert os.listdir(bench.state / "mounts") == []
    assert (tmp_path / "file").read_text() == "kept"
    assert {entry.fields.get("path") for entry in bench.journal.held if entry.kind == "directory"} \
        == {str(bench.state / "mounts"), str(bench.state / "share")}  # fmt: skip


def test_every_step_is_journalled_before_it_is_taken(bench: Bench) -> None:
    bench.calls.error = MountFailed("mount", "/x", errno.EIO)
    with pytest.raises(MountFailed):
        bench.share.add(bench.bundle(), [overlay()])
    kinds = [entry.kind for entry in bench.journal.held if entry.container == "c1"]
    assert kinds == ["directory", "directory", "mount"]


@pytest.mark.parametrize("target", ["../../../etc", "a/../../x", "/.."])
def test_a_rootfs_target_that_leaves_the_root_is_refused_before_it_is_journalled(
    bench: Bench, target: str
) -> None:
    mount = overlay()
    mount.target = target
    with pytest.raises(InvalidArgument, match="leaves the container's root"):
        bench.share.add(bench.bundle(), [overlay(), mount])
    assert not [entry for entry in bench.journal.held if entry.container == "c1"]


def test_the_pods_resolv_conf_is_read_when_the_spec_brings_one(
    bench: Bench, tmp_path: Path
) -> None:
    (tmp_path / "r").write_text("nameserver 1.2.3.4\n")
    assert sandbox_dns(bench.bundle(bind(tmp_path / "r", "/etc/resolv.conf"))) == [
        "nameserver 1.2.3.4"
    ]
    assert sandbox_dns(bench.bundle()) == []


def test_containers_of_a_pod_have_one_entry_for_one_directory(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "dir").mkdir()
    one = bench.share.add(bench.bundle(bind(tmp_path / "dir")), [overlay()])
    two = bench.share.add(bench.bundle(bind(tmp_path / "dir"), container="c2"), [overlay()])
    other = bench.share.add(bench.bundle(bind(tmp_path / "dir", "/v", "ro"), container="c3"), [])
    assert one.sources == two.sources != other.sources
    assert one.storages == two.storages
    assert one.storages[0].mount_point == str(one.sources[0])
    bench.share.remove("c1")
    assert "volume:1-dir" in os.listdir(bench.state / "mounts")
    bench.share.remove("c2")
    assert sorted(os.listdir(bench.state / "mounts")) == ["c3", "volume:2-dir"]


def test_a_directory_that_was_replaced_is_another_volume(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "dir").mkdir()
    one = bench.share.add(bench.bundle(bind(tmp_path / "dir")), [])
    (tmp_path / "dir").rename(tmp_path / "old")
    (tmp_path / "dir").mkdir()
    two = bench.share.add(bench.bundle(bind(tmp_path / "dir"), container="c2"), [])
    assert one.sources != two.sources


@pytest.mark.parametrize(
    ("options", "propagation", "notes"),
    [
        ([], MS_SLAVE, 0),
        (["rprivate"], MS_PRIVATE, 0),
        (["private", "rslave"], MS_SLAVE, 0),
        (["rshared"], MS_SLAVE, 1),
    ],
)
def test_propagation_is_set_on_the_host(
    bench: Bench, tmp_path: Path, options: list[str], propagation: int, notes: int
) -> None:
    (tmp_path / "dir").mkdir()
    paths = bench.share.add(bench.bundle(bind(tmp_path / "dir", "/v", *options)), [])
    assert bench.calls.propagation[-1] == propagation
    assert len(paths.notes) == notes


def test_a_volume_that_cannot_be_bound_leaves_nothing(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "dir").mkdir()
    bench.calls.bind_error = MountFailed("bind", "/x", errno.EINVAL)
    with pytest.raises(ShimError, match=r"mount /v: binding .*/dir for the VM: Invalid argument"):
        bench.share.add(bench.bundle(bind(tmp_path / "dir")), [overlay()])
    assert os.listdir(bench.state / "mounts") == ["c1"]


def test_only_an_empty_dir_is_writable_for_who_asked_for_reading(
    bench: Bench, tmp_path: Path
) -> None:
    empty_dir = tmp_path / "pods/u/volumes/kubernetes.io~empty-dir/e"
    config_map = tmp_path / "pods/u/volumes/kubernetes.io~configmap/c"
    for directory in (empty_dir, config_map):
        directory.mkdir(parents=True)
    paths = bench.share.add(
        bench.bundle(bind(empty_dir, "/e", "ro"), bind(config_map, "/c", "ro")), []
    )
    assert [call[3] for call in bench.calls.calls[-2:]] == [False, True]
    assert [storage.driver for storage in paths.storages] == ["virtio-fs", "watchable-bind"]


def test_the_operators_mounts_are_in_the_share_before_any_container(
    bench: Bench, tmp_path: Path
) -> None:
    (tmp_path / "note").write_text("x")
    bench.share.add_sandbox_mounts([str(tmp_path / "note")])
    target = bench.state / "mounts/sandbox-mounts/note"
    assert bench.calls.calls[-1] == ("bind", str(tmp_path / "note"), str(target), True)
    assert bench.journal.undo() == []


def test_a_fifo_for_a_resolv_conf_is_not_waited_for(bench: Bench, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "r")
    assert sandbox_dns(bench.bundle(bind(tmp_path / "r", "/etc/resolv.conf"))) == []
