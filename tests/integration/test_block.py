"""Root file systems and volumes as disks of the VM, with and without a shared directory."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from tests.harness.configuration import changed_configuration, with_line
from tests.harness.containerd_api import Tasks
from tests.harness.ctr import Ctr, fresh_id
from tests.harness.parts import VIRTIOFSD, find_parts

if TYPE_CHECKING:
    from pathlib import Path

    from tests.harness.node import Node

pytestmark = pytest.mark.usefixtures("kata_only")


def without_sharing(text: str) -> str:
    return with_line(text, "hypervisor.qemu", 'shared_fs = "none"\nrootfs_image_size = 256')


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
    container = fresh_id("unshared")
    with changed_configuration(node, without_sharing):
        ctr.start(
            container,
            "sleep",
            "1000",
            options=[
                *bind("/tmp/volumes/config", "/config"),
                *bind("/tmp/volumes/hosts", "/etc/hosts", "rbind:rw"),
            ],
        )
        assert find_parts(node, VIRTIOFSD) == []
        script = (
            "cat /config/key /etc/hosts; stat -c '%U %a %u:%g' /config/tool; readlink /config/key; "
            "/config/tool; echo x >/config/new 2>/dev/null || echo refused; "
            "grep -c ' / ext4 ' /proc/mounts; echo kept >/root-is-mine && cat /root-is-mine; "
            "stat -c '%a %n' /tmp; ls -d /lost+found 2>/dev/null; ls /bin | wc -l"
        )
        seen = ctr.exec(container, "sh", "-c", script).stdout.splitlines()
        assert seen[:-1] == [
            "old", "127.0.0.1 first", "UNKNOWN 755 12:34", "..data/key", "ran", "refused", "1",
            "kept", "1777 /tmp",
        ]  # fmt: skip
        assert int(seen[-1]) > 50
        replace_config_map(config, "2", "new\n")
        until_inside(ctr, container, "/config/key", "new\n", 20)
        (volumes / "hosts").write_text("127.0.0.1 second\n")
        until_inside(ctr, container, "/etc/hosts", "127.0.0.1 second\n", 20)
        (config / "added").write_text("more\n")
        until_inside(ctr, container, "/config/added", "more\n", 20)
        ctr.remove(container)
