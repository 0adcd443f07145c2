"""Root file systems and volumes as disks of the VM, with and without a shared directory."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from tests.harness.configuration import drop_in
from tests.harness.containerd_api import Tasks
from tests.harness.ctr import Ctr, fresh_id
from tests.harness.oci_image import BUSYBOX_IMAGE, busybox_entries, write_rootfs
from tests.harness.parts import VIRTIOFSD, find_parts, find_shims
from tests.harness.vmm import NAME

if TYPE_CHECKING:
    from pathlib import Path

    from tests.harness.node import Node

pytestmark = pytest.mark.usefixtures("kata_only")


_UNSHARED = f'[hypervisor.{NAME}]\nshared_fs = "none"\nrootfs_image_size = 256\n'


@pytest.fixture
def tasks(node: Node) -> Iterator[Tasks]:
    with Tasks(node) as connection:
        yield connection


@pytest.fixture
def volumes(node: Node) -> Iterator[Path]:
    """An empty directory of the node, /tmp/volumes."""
    directory = node.path("/tmp/volumes")
    directory.mkdir()
    yield directory
    node.run(["rm", "-r", "/tmp/volumes"])


def make_root(volumes: Path, script: str) -> Path:
    """A root file system of busybox, with a program of ours, in /tmp/volumes/root.img."""
    write_rootfs(busybox_entries(), volumes / "tree")
    (volumes / "tree" / "script").write_text(script)
    path = volumes / "root.img"
    make_ext4(path, "64M", volumes / "tree")
    return path


def make_ext4(path: Path, size: str, tree: Path | None = None) -> None:
    content = ["-d", str(tree)] if tree is not None else []
    subprocess.run(["mkfs.ext4", "-q", *content, str(path), size], check=True, capture_output=True)


@contextmanager
def loop_device(node: Node, path: str, *options: str) -> Iterator[str]:
    """A loop device over a file of the node; skips where there are none."""
    done = node.run(["losetup", *options, "--find", "--show", path], check=False)
    if done.returncode != 0:
        pytest.skip(f"no loop device can be made here: {done.stderr.strip()}")
    device = done.stdout.strip()
    try:
        yield device
    finally:
        node.run(["losetup", "--detach", device])


def read_image(path: Path, inside: str) -> str:
    """A file of an ext4 image that nobody has mounted."""
    done = subprocess.run(
        ["debugfs", "-R", f"cat {inside}", str(path)], check=True, capture_output=True, text=True
    )
    return done.stdout


def make_container(ctr: Ctr, stem: str, *command: str, options: Sequence[str] = ()) -> str:
    container = fresh_id(stem)
    create = ["ctr", "container", "create", "--runtime", ctr.runtime, *options]
    ctr.node.run([*create, BUSYBOX_IMAGE, container, *command])
    return container


def run_on(tasks: Tasks, ctr: Ctr, container: str, source: str, *options: str) -> int:
    """Run a container whose snapshot is an ext4 disk, as a snapshotter would give it."""
    tasks.create(container, rootfs=[{"type": "ext4", "source": source, "options": options}])
    waiting = tasks.wait_later(container)
    tasks.start(container)
    status = waiting.exit_status(60)
    assert tasks.delete(container) == status
    ctr.remove(container)
    return status


def bind(source: str, target: str, options: str = "rbind:ro") -> list[str]:
    return ["--mount", f"type=bind,src={source},dst={target},options={options}"]


def replace_config_map(volume: Path, version: str, content: str) -> None:
    """What the kubelet does: a new directory, then the link `..data` turned to it at once."""
    directory = volume / f"..{version}"
    directory.mkdir()
    (directory / "key").write_text(content)
    (volume / "..data_tmp").symlink_to(f"..{version}")
    before = os.readlink(volume / "..data") if (volume / "..data").is_symlink() else ""
    os.rename(volume / "..data_tmp", volume / "..data")
    if before:
        (volume / before / "key").unlink()
        (volume / before).rmdir()
    else:
        (volume / "key").symlink_to("..data/key")


def until_inside(ctr: Ctr, container: str, path: str, content: str, limit_s: float) -> float:
    """Look until a file inside has this content; return how long that took."""
    begin = time.monotonic()
    while True:
        seen = ctr.exec(container, "cat", path).stdout
        if seen == content:
            return time.monotonic() - begin
        assert time.monotonic() - begin < limit_s, seen


def test_without_sharing_the_root_is_a_disk_and_small_files_are_copies_that_follow(
    node: Node, ctr: Ctr, volumes: Path
) -> None:
    config = volumes / "config"
    config.mkdir()
    replace_config_map(config, "1", "old\n")
    (config / "tool").write_text("#!/bin/sh\necho ran\n")
    (config / "tool").chmod(0o755)
    os.chown(config / "tool", 12, 34)
    (volumes / "hosts").write_text("127.0.0.1 first\n")
    cache = "/tmp/volumes/pods/1/volumes/kubernetes.io~empty-dir/cache"
    node.path(cache).mkdir(parents=True)
    node.path(cache).chmod(0o2777)
    container = fresh_id("unshared")
    with drop_in(node, _UNSHARED):
        ctr.start(
            container,
            "sleep",
            "1000",
            options=[
                *bind("/tmp/volumes/config", "/config"),
                *bind("/tmp/volumes/hosts", "/etc/hosts", "rbind:rw"),
                *bind(cache, "/cache", "rbind:rw"),
            ],
        )
        assert find_parts(node, VIRTIOFSD) == []
        script = (
            "cat /config/key /etc/hosts; stat -c '%U %a %u:%g' /config/tool; readlink /config/key; "
            "/config/tool; echo x >/config/new 2>/dev/null || echo refused; "
            "grep -c ' / ext4 ' /proc/mounts; echo kept >/root-is-mine && cat /root-is-mine; "
            "stat -c '%a %n' /tmp /cache; echo x >/cache/x && ls -A /cache; "
            "ls -d /lost+found 2>/dev/null; ls /bin | wc -l"
        )
        seen = ctr.exec(container, "sh", "-c", script).stdout.splitlines()
        assert seen[:-1] == [
            "old", "127.0.0.1 first", "UNKNOWN 755 12:34", "..data/key", "ran", "refused", "1",
            "kept", "1777 /tmp", "2777 /cache", "x",
        ]  # fmt: skip
        assert int(seen[-1]) > 50
        replace_config_map(config, "2", "new\n")
        until_inside(ctr, container, "/config/key", "new\n", 20)
        (volumes / "hosts").write_text("127.0.0.1 second\n")
        until_inside(ctr, container, "/etc/hosts", "127.0.0.1 second\n", 20)
        (config / "added").write_text("more\n")
        until_inside(ctr, container, "/config/added", "more\n", 20)
        ctr.remove(container)


def test_a_snapshot_in_a_file_is_the_containers_disk_and_keeps_what_it_wrote(
    node: Node, ctr: Ctr, tasks: Tasks, volumes: Path
) -> None:
    script = (
        "grep -q ' / ext4 rw' /proc/mounts && echo written >/kept && echo shared >/data/file && "
        "grep -q ' /data virtiofs ' /proc/mounts"
    )
    image = make_root(volumes, script)
    (volumes / "data").mkdir()
    options = bind("/tmp/volumes/data", "/data", "rbind:rw")
    container = make_container(ctr, "disk", "sh", "/script", options=options)
    assert run_on(tasks, ctr, container, "/tmp/volumes/root.img", "rw", "loop") == 0
    assert read_image(image, "/kept") == "written\n"
    assert (volumes / "data" / "file").read_text() == "shared\n"


def test_a_read_only_snapshot_on_a_block_device_cannot_be_written_even_by_its_machine(
    node: Node, ctr: Ctr, tasks: Tasks, volumes: Path
) -> None:
    script = (
        "d=$(ls -d /sys/block/vd*) && [ $(cat $d/ro) = 1 ] && mknod /tmp/d b "
        "$(tr : ' ' <$d/dev) && ! dd if=/dev/zero of=/tmp/d bs=512 count=1 conv=fsync 2>/dev/null"
    )
    image = make_root(volumes, script)
    before = image.read_bytes()
    options = [
        "--privileged", "--mount", "type=tmpfs,src=tmpfs,dst=/tmp,options=rw"
    ]  # fmt: skip
    with loop_device(node, "/tmp/volumes/root.img") as device:
        container = make_container(ctr, "rodisk", "sh", "/script", options=options)
        assert run_on(tasks, ctr, container, device, "ro") == 0
    assert image.read_bytes() == before


def test_a_raw_device_is_a_node_and_a_direct_volume_is_mounted_inside(
    node: Node, ctr: Ctr, volumes: Path
) -> None:
    (volumes / "raw.img").write_bytes(bytes(8 << 20))
    (volumes / "content").mkdir()
    (volumes / "content" / "hello").write_text("from the host\n")
    make_ext4(volumes / "direct.img", "16M", volumes / "content")
    published = "/tmp/volumes/published"
    (volumes / "published").mkdir()
    assigned = node.path("/run/kata-containers/shared/direct-volumes")
    name = base64.urlsafe_b64encode(published.encode()).decode()
    info = {
        "volume-type": "block", "device": "/tmp/volumes/direct.img", "fstype": "ext4",
        "metadata": {"fsGroup": "4321"}, "options": ["rw", "noatime"],
    }  # fmt: skip
    node.write(
        f"/run/kata-containers/shared/direct-volumes/{name}/mountInfo.json", json.dumps(info)
    )
    script = (
        "test -b $0 && echo raw | dd of=$0 conv=fsync 2>/dev/null; cat /direct/hello; "
        "stat -c %g /direct; grep -c ' /direct ext4 .*noatime' /proc/mounts; "
        "echo inside >/direct/new"
    )
    container = fresh_id("volumes")
    with loop_device(node, "/tmp/volumes/raw.img") as device:
        options = ["--rm", "--device", device, *bind(published, "/direct", "rbind:rw")]
        done = ctr.run(container, "sh", "-c", script, device, options=options)
    assert (done.returncode, done.stdout) == (0, "from the host\n4321\n1\n"), done.stderr
    assert (volumes / "raw.img").read_bytes()[:4] == b"raw\n"
    assert read_image(volumes / "direct.img", "/new") == "inside\n"
    assert os.listdir(assigned / name) == ["mountInfo.json"]
    node.run(["rm", "-r", "/run/kata-containers/shared"])


def test_a_killed_shim_leaves_no_image_and_no_mount(node: Node, ctr: Ctr) -> None:
    container = fresh_id("killed")
    with drop_in(node, _UNSHARED):
        ctr.start(container, "sleep", "1000")
        (shim,) = find_shims(ctr)
        node.signal(shim.pid, "KILL")
        ctr.remove(container)


def test_snapshots_of_containerds_blockfile_snapshotter_are_disks(node: Node, ctr: Ctr) -> None:
    if node.version.major < 2:
        pytest.skip("containerd 1.6 has no blockfile snapshotter")
    done = ctr.run(
        fresh_id("blockfile"),
        "sh",
        "-c",
        "grep -c '^/dev/vda / ext4 rw' /proc/mounts; echo written >/file && cat /file",
        options=["--rm", "--snapshotter", "blockfile"],
    )
    if "loop" in done.stderr:
        pytest.skip(f"containerd can make no loop device here: {done.stderr.strip()}")
    assert (done.returncode, done.stdout) == (0, "1\nwritten\n"), done.stderr
