"""Disks as nodes of a VMM's own: what it can open, when, and who else."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from hypervisors import disk_nodes
from hypervisors.child_exec import Account
from hypervisors.disk_lease import lease
from hypervisors.disk_nodes import DiskNodes
from hypervisors.errors import PreconditionFailed
from hypervisors.machine import BlockDevice
from tests.harness.limitations import documented

pytestmark = pytest.mark.root
ACCOUNT = Account(uid=0x6B000001, gid=0x6B000001)


@pytest.fixture
def nodes(tmp_path):
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
def test_image_is_a_node_of_the_vmms_user_for_as_long_as_it_is_shown(
    nodes, image, tmp_path, read_only
):
    device = BlockDevice(id="d0", path=image, read_only=read_only)
    leased = lease(device)
    with nodes.exposed(device, leased) as name:
        node = tmp_path / "disks" / name
        status = os.stat(node)
        assert (status.st_uid, status.st_gid) == (ACCOUNT.uid, ACCOUNT.gid)
        assert status.st_mode & 0o777 == (0o400 if read_only else 0o600)
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
