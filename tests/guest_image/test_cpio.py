"""The archive writer: what cpio reads back, and that equal trees give equal bytes."""

from __future__ import annotations

import shutil
import stat
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guest.image import cpio

NAMES = st.text("abcxyz.-_", min_size=1, max_size=8).filter(lambda name: name not in {".", ".."})
PATHS = st.lists(NAMES, min_size=1, max_size=4).map("/".join)


def sample_tree() -> cpio.Tree:
    tree = cpio.Tree()
    tree.file("/usr/bin/program", b"#!" + bytes(range(256)), 0o755)
    tree.file("/empty", b"")
    tree.symlink("/lib", "usr/lib")
    tree.character_device("/dev/console", 5, 1)
    tree.directory("/tmp", 0o1777)
    return tree


@pytest.mark.skipif(shutil.which("cpio") is None, reason="cpio is not installed")
def test_cpio_program_lists_what_was_put_in() -> None:
    listing = subprocess.run(
        ["cpio", "-itv", "--numeric-uid-gid", "--quiet"],
        input=cpio.archive(sample_tree()),
        capture_output=True,
        check=True,
    ).stdout.decode()
    rows = {line.split(maxsplit=8)[-1]: line.split() for line in listing.splitlines()}
    assert set(rows) >= {"usr/bin/program", "empty", "lib -> usr/lib", "tmp", "usr", "usr/bin"}
    assert rows["usr/bin/program"][:5] == ["-rwxr-xr-x", "1", "0", "0", "258"]
    assert rows["tmp"][0] == "drwxrwxrwt"
    assert "crw------- 1 0 0 5, 1" in " ".join(listing.split())


def test_order_in_which_files_are_added_does_not_matter() -> None:
    paths = [f"/d{index}/f" for index in range(5)]
    trees = (cpio.Tree(), cpio.Tree())
    for tree, order in zip(trees, (paths, paths[::-1]), strict=True):
        for path in order:
            tree.file(path, path.encode())
    assert cpio.archive(trees[0]) == cpio.archive(trees[1])


def test_every_parent_directory_comes_before_what_is_in_it() -> None:
    tree = sample_tree()
    seen: set[str] = set()
    for name, _, _ in parse(cpio.archive(tree)):
        parent = name.rpartition("/")[0]
        assert not parent or parent in seen
        seen.add(name)


@given(st.dictionaries(PATHS, st.binary(max_size=64), max_size=8))
def test_archive_read_back_holds_every_file_with_its_bytes(files: dict[str, bytes]) -> None:
    tree = cpio.Tree()
    kept: dict[str, bytes] = {}
    for path, data in files.items():
        try:
            tree.file(path, data)
        except cpio.ArchiveError:
            continue  # the path is a directory of another, or the reverse
        kept[path] = data
    contents = parse(cpio.archive(tree))
    found = {name: data for name, mode, data in contents if stat.S_ISREG(mode)}
    assert found == kept


@pytest.mark.parametrize("path", ["", "/", "a/../b", "a//b", "./a"])
def test_path_that_is_not_plain_is_refused(path: str) -> None:
    with pytest.raises(cpio.ArchiveError):
        cpio.Tree().file(path, b"")


def test_same_name_twice_is_refused() -> None:
    tree = sample_tree()
    with pytest.raises(cpio.ArchiveError, match="/empty is asked for twice"):
        tree.file("/empty", b"")


def test_file_cannot_also_be_a_directory() -> None:
    tree = sample_tree()
    with pytest.raises(cpio.ArchiveError, match="as a directory and as a file"):
        tree.file("/empty/below", b"")


def parse(archive: bytes) -> list[tuple[str, int, bytes]]:
    """Read an archive independently of the writer. Source: buffer-format.rst."""
    found: list[tuple[str, int, bytes]] = []
    position = 0
    while True:
        assert archive[position : position + 6] == b"070701"
        header = archive[position + 6 : position + 110]
        fields = [int(header[start : start + 8], 16) for start in range(0, 104, 8)]
        mode, size, name_size = fields[1], fields[6], fields[11]
        name_end = position + 110 + name_size
        name = archive[position + 110 : name_end - 1].decode()
        data_start = (name_end + 3) // 4 * 4
        if name == "TRAILER!!!":
            assert len(archive) % 512 == 0
            return found
        found.append((name, mode, archive[data_start : data_start + size]))
        position = (data_start + size + 3) // 4 * 4
