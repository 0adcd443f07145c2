"""Disks as nodes of a VMM's own: what it can open, when, and who else."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from hypervisors import disk_nodes
from hypervisors.disk_lease import lease
from hypervisors.disk_nodes import DiskNodes
from hypervisors.errors import PreconditionFailed
from hypervisors.machine import BlockDevice
from tests.harness.limitations import documented

from .vmm_user import ACCOUNT, run_as_the_vmm

pytestmark = pytest.mark.root


@pytest.fixture
def nodes(tmp_path):
    os.chown(tmp_path, ACCOUNT.uid, ACCOUNT.gid)
    made = DiskNodes(tmp_path / "disks", ACCOUNT)
    made.mount()
    yield made
    made.unmount()
    assert os.listdir(tmp_path / "disks") == []


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "image"
    path.write_bytes(b"begin" + bytes(1 << 20))
    path.chmod(0o600)
    return path


def loops_of(path):
    found = []
    for entry in os.listdir("/sys/block"):
        backing = Path(f"/sys/block/{entry}/loop/backing_file")
        if backing.exists() and backing.read_text().strip() == str(path):
            found.append(entry)
    return found


@pytest.mark.parametrize("read_only", [True, False])
def test_image_is_a_node_that_the_vmms_user_can_open_for_as_long_as_it_is_shown(
    nodes, image, tmp_path, read_only
):
    device = BlockDevice(id="d0", path=image, read_only=read_only)
    leased = lease(device)
    with nodes.exposed(device, leased) as name:
        node = tmp_path / "disks" / name
        status = os.stat(node)
        assert (status.st_uid, status.st_gid) == (0, ACCOUNT.gid)
        assert status.st_mode & 0o777 == (0o440 if read_only else 0o660)
        reading, writing = run_as_the_vmm(tmp_path, f": <disks/{name}", f": >>disks/{name}")
        assert reading == 0
        assert (writing == 0) is not read_only
        held = os.open(node, os.O_RDONLY if read_only else os.O_RDWR)
    assert os.listdir(tmp_path / "disks") == []
    # Whoever has opened it keeps it, and with him it goes.
    assert os.pread(held, 5, 0) == b"begin"
    if not read_only:
        os.pwrite(held, b"write", 0)
    os.close(held)
    leased.close()
    assert loops_of(image) == []
    assert image.read_bytes()[:5] == (b"begin" if read_only else b"write")


def test_vmm_can_keep_no_node_and_make_nothing_of_it(nodes, image, tmp_path):
    device = BlockDevice(id="d0", path=image, read_only=True)
    leased = lease(device)
    with nodes.exposed(device, leased):
        statuses = run_as_the_vmm(
            tmp_path,
            "chmod 666 disks/d0",
            "ln disks/d0 disks/kept",
            "rm -f disks/d0",
            "ln -s /etc/passwd disks/other",
            "chmod 777 disks",
        )
        assert 0 not in statuses
        assert os.listdir(tmp_path / "disks") == ["d0"]
    leased.close()


def test_directory_that_the_vmm_has_moved_away_is_still_the_one_with_the_nodes(image, tmp_path):
    home, elsewhere = tmp_path / "jail", tmp_path / "elsewhere"
    home.mkdir()
    elsewhere.mkdir()
    os.chown(home, ACCOUNT.uid, ACCOUNT.gid)
    nodes = DiskNodes(home / "disks", ACCOUNT)
    nodes.make()
    assert run_as_the_vmm(home, "mv disks moved", f"ln -s {elsewhere} disks") == [0, 0]
    device = BlockDevice(id="d0", path=image, read_only=False)
    leased = lease(device)
    with nodes.exposed(device, leased):
        assert os.listdir(elsewhere) == []
        assert os.listdir(home / "moved") == ["d0"]
    assert os.listdir(home / "moved") == []
    leased.close()
    nodes.close()
    nodes.close()


def test_writer_has_a_disk_for_himself_and_readers_share_it(image):
    reader = BlockDevice(id="r", path=image, read_only=True)
    writer = BlockDevice(id="w", path=image, read_only=False)
    first, second = lease(reader), lease(reader)
    with pytest.raises(PreconditionFailed) as caught:
        lease(writer)
    assert str(caught.value) == (
        f"block device w {image}: in use by another device or machine; detach it there first"
    )
    first.close()
    first.close()
    second.close()
    only = lease(writer)
    for device in (reader, writer):
        with pytest.raises(
            PreconditionFailed,
            match=documented(
                "block device …: in use by another device or machine; detach it there first"
            ),
        ):
            lease(device)
    only.close()
    lease(reader).close()


def test_image_without_loop_devices_is_refused_with_the_way_out(nodes, image, monkeypatch):
    def refuse(*_arguments):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "/dev/loop-control")

    monkeypatch.setattr(disk_nodes.fcntl, "ioctl", refuse)
    device = BlockDevice(id="d0", path=image, read_only=True)
    leased = lease(device)
    text = documented(
        "block device …: no loop device can be made of it for the VMM's user (errno …); load the "
        "module loop, or use a block device"
    )
    with pytest.raises(PreconditionFailed, match=text), nodes.exposed(device, leased):
        pass
    leased.close()
