"""What the host says of a mount's source: opened once, and told from its mounts."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

import pytest

from shimv2.errors import InvalidArgument
from shimv2.guest_spec import SharedMount
from shimv2.volume_source import mount_table, opened, shm_bytes

LINES = (
    "24 30 0:22 / /sys rw,relatime shared:7 - sysfs sysfs rw\n"
    "99 30 0:70 /a\\040b /mnt/with\\134space\\040x rw shared:1 master:2 - tmpfs tm\\040pfs "
    "rw,size=4096k,mode=755\n"
    "torn line\n"
)


def mount(source: str | Path) -> SharedMount:
    return SharedMount(
        index=0,
        source=Path(source),
        destination=PurePosixPath("/v"),
        read_only=False,
        is_recursive=True,
    )


def test_mountinfo_is_read_with_its_escapes_and_options(tmp_path: Path) -> None:
    (tmp_path / "mountinfo").write_text(LINES)
    first, second = mount_table(str(tmp_path / "mountinfo"))
    assert (first.id, first.place, first.fstype) == (24, "/sys", "sysfs")
    assert (second.device, second.root, second.place) == ("0:70", "/a b", "/mnt/with\\space x")
    assert (second.option("size"), second.option("pagesize")) == ("4096k", "")


def test_source_stays_what_it_was_though_its_path_changes(tmp_path: Path) -> None:
    """Whoever can write next to it can't put a link in its place between the look and the bind."""
    (tmp_path / "source").mkdir()
    with opened(mount(tmp_path / "source")) as source:
        (tmp_path / "source").rename(tmp_path / "moved")
        (tmp_path / "source").symlink_to("/etc")
        assert os.readlink(f"/proc/self/fd/{source.descriptor}") == str(tmp_path / "moved")
        assert source.is_directory
        assert any(line.id == source.mount_id() for line in mount_table())


def test_links_of_a_process_are_no_source(tmp_path: Path) -> None:
    descriptor = os.open(tmp_path, os.O_RDONLY)
    try:
        with (
            pytest.raises(InvalidArgument, match="Too many levels"),
            opened(mount(f"/proc/self/fd/{descriptor}")),
        ):
            pass
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("path", ["", "relative", "/a\0b"])
def test_what_is_no_absolute_path_is_refused_by_name(path: str) -> None:
    with (
        pytest.raises(InvalidArgument, match=r"mount /v: source .* is not an absolute path"),
        opened(mount(path)),
    ):
        pass


def test_a_name_that_no_file_can_have_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="is no name of a file"), opened(mount("/\ud800")):
        pass


def test_a_pods_shm_has_a_size_only_if_it_is_a_tmpfs(tmp_path: Path) -> None:
    assert shm_bytes(str(tmp_path)) == 0
