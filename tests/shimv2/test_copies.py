"""Files that are copied into a VM without a shared directory, and what cannot be."""

from __future__ import annotations

import os
import socket
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import trio

from shimv2.copies import Copies, Copy, plan_copy
from shimv2.errors import InvalidArgument
from shimv2.file_tree import MAX_BYTES, read_tree
from shimv2.guest_spec import SharedMount
from tests.harness.limitations import documented
from tests.shimv2.shim_bench import RecordingLog

TARGET = PurePosixPath("/run/kata-containers/shared/containers/c1-0-v")


class Log(RecordingLog):
    def __init__(self) -> None:
        super().__init__()
        self.warned = trio.Event()

    def warning(self, event: str, **fields: object) -> None:
        super().warning(event, **fields)
        self.warned.set()


class Guest:
    """What the agent was told to write, by path; a file is complete when its last piece came."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.order: list[str] = []
        self.modes: dict[str, tuple[int, int, int]] = {}
        self.changed = trio.Event()

    async def copy_file(self, request: Any) -> None:
        await trio.lowlevel.checkpoint()
        name = str(PurePosixPath(request.path).relative_to(TARGET))
        before = self.files.get(name, b"") if request.offset else b""
        self.files[name] = before[: request.offset] + request.data
        self.order.append(name)
        self.modes[name] = (request.file_mode, request.uid, request.gid)
        self.changed.set()

    async def until(self, name: str, content: bytes) -> None:
        with trio.fail_after(10):
            while self.files.get(name) != content:
                self.changed = trio.Event()
                await self.changed.wait()


def mount(source: Path, *, read_only: bool = True) -> SharedMount:
    return SharedMount(
        index=0,
        source=source,
        destination=PurePosixPath("/v"),
        read_only=read_only,
        is_recursive=True,
    )


def plan(source: Path, *, read_only: bool = True) -> Copy:
    return plan_copy(mount(source, read_only=read_only), "c1", TARGET)


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    """A ConfigMap as the kubelet writes it."""
    path = tmp_path / "volume"
    (path / "..1").mkdir(parents=True)
    (path / "..1" / "key").write_text("old")
    (path / "..1" / "key").chmod(0o640)
    (path / "..data").symlink_to("..1")
    (path / "key").symlink_to("..data/key")
    return path


async def test_a_tree_is_copied_with_modes_and_links_last(volume: Path) -> None:
    guest, copies = Guest(), Copies(RecordingLog())
    await copies.send([plan(volume)], guest)  # type: ignore[arg-type]
    assert guest.order == [".", "..1", "..1/key", "..data", "key"]
    assert guest.files["..1/key"] == b"old"
    assert guest.files["..data"] == b"..1"
    assert guest.modes["..1/key"] == (0o100640, os.getuid(), os.getgid())
    copies.close()


async def test_a_large_file_comes_in_pieces_and_an_empty_one_in_one(tmp_path: Path) -> None:
    content = os.urandom((2 << 20) + 5)
    (tmp_path / "big").write_bytes(content)
    (tmp_path / "empty").touch()
    guest, copies = Guest(), Copies(RecordingLog())
    await copies.send([plan(tmp_path)], guest)  # type: ignore[arg-type]
    assert guest.files["big"] == content
    assert guest.order.count("big") == 3
    assert guest.files["empty"] == b""
    copies.close()


async def test_only_what_changed_is_copied_again_and_the_turned_link_last(volume: Path) -> None:
    guest, copies = Guest(), Copies(RecordingLog())
    (volume / "other").write_text("same")
    await copies.send([plan(volume)], guest)  # type: ignore[arg-type]
    guest.order.clear()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(copies.follow, guest)
        (volume / "..2").mkdir()
        (volume / "..2" / "key").write_text("new")
        (volume / "..data_tmp").symlink_to("..2")
        os.rename(volume / "..data_tmp", volume / "..data")
        await guest.until("..data", b"..2")
        assert guest.files["..2/key"] == b"new"
        assert "other" not in guest.order
        assert guest.order.index("..2/key") < guest.order.index("..data")
        # A directory that came later is watched as well.
        (volume / "..2" / "more").write_text("x")
        await guest.until("..2/more", b"x")
        copies.close()


async def test_a_single_file_is_followed_until_its_container_is_gone(tmp_path: Path) -> None:
    file = tmp_path / "hosts"
    file.write_text("one")
    guest, copies = Guest(), Copies(RecordingLog())
    await copies.send([plan(file, read_only=False)], guest)  # type: ignore[arg-type]
    assert guest.files == {".": b"one"}
    async with trio.open_nursery() as nursery:
        nursery.start_soon(copies.follow, guest)
        file.write_text("two")
        await guest.until(".", b"two")
        copies.forget("c1")
        other = tmp_path / "other"
        other.write_text("1")
        await copies.send([plan(other)], guest)  # type: ignore[arg-type]
        guest.order.clear()
        file.write_text("three")
        other.write_text("2")
        await guest.until(".", b"2")
        copies.close()


async def test_containers_with_the_same_files_are_followed_each_until_it_is_gone(
    volume: Path,
) -> None:
    guest, copies = Guest(), Copies(RecordingLog())
    for number in "123":
        copy = plan_copy(mount(volume), f"c{number}", TARGET / number)
        await copies.send([copy], guest)  # type: ignore[arg-type]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(copies.follow, guest)
        (volume / "..1" / "key").write_text("new")
        for number in "123":
            await guest.until(f"{number}/..1/key", b"new")
        copies.forget("c3")
        guest.order.clear()
        (volume / "..1" / "key").write_text("newest")
        for number in "12":
            await guest.until(f"{number}/..1/key", b"newest")
        assert "3/..1/key" not in guest.order
        copies.close()


async def test_what_becomes_impossible_later_is_logged_and_followed_on(volume: Path) -> None:
    log = Log()
    guest, copies = Guest(), Copies(log)
    await copies.send([plan(volume)], guest)  # type: ignore[arg-type]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(copies.follow, guest)
        (volume / "out").symlink_to("/etc/shadow")
        with trio.fail_after(10):
            await log.warned.wait()
        assert log.named("copy not updated")
        (volume / "out").unlink()
        (volume / "after").write_text("x")
        await guest.until("after", b"x")
        copies.close()
    assert "out" not in guest.files


@pytest.mark.parametrize("target", ["/etc/passwd", "../secret", "..data/../../x"])
def test_a_link_that_leads_out_is_refused(volume: Path, target: str) -> None:
    (volume / "out").symlink_to(target)
    with pytest.raises(
        InvalidArgument,
        match=documented(
            "mount …: the link … leads out of the volume, which is copied into the VM alone; let "
            "it lead to something inside"
        ),
    ):
        plan(volume)


def test_a_volume_that_is_too_large_is_refused_with_the_way_out(tmp_path: Path) -> None:
    with (tmp_path / "big").open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    text = documented(
        "mount …: … is larger than the 8 MiB or 512 files that can be copied into a VM without a "
        'shared directory; use a block volume, or shared_fs = "virtio-fs"'
    )
    with pytest.raises(InvalidArgument, match=text):
        plan(tmp_path)
    (tmp_path / "big").unlink()
    for number in range(512):
        (tmp_path / str(number)).touch()
    with pytest.raises(InvalidArgument, match=text):
        plan(tmp_path)


def test_a_directory_for_writing_is_refused_with_the_way_out(volume: Path) -> None:
    with pytest.raises(
        InvalidArgument,
        match=documented(
            "mount …: the directory … is for writing, and a VM without a shared directory gets "
            'only a copy; mount it read-only, use a block volume, or shared_fs = "virtio-fs"'
        ),
    ):
        plan(volume, read_only=False)


def test_sockets_and_fifos_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    text = documented(
        "mount …: … is a socket, fifo or device of the host, which cannot be copied into the VM; "
        "remove it"
    )
    with pytest.raises(InvalidArgument, match=text):
        plan(tmp_path)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        with pytest.raises(InvalidArgument, match=text):
            plan(tmp_path / "s")


def test_a_missing_source_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"/v: source .*gone: No such file"):
        plan(tmp_path / "gone")


def test_no_link_is_followed_below_the_volume(tmp_path: Path, volume: Path) -> None:
    (volume / "..1" / "inner").symlink_to("..")
    assert not [one for one in read_tree(volume, "v") if one.path.startswith("..1/inner/")]
