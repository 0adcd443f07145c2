"""Mount calls for real, each test in a mount namespace of its own that ends with it."""

from __future__ import annotations

import errno
import os
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from shimv2 import mounts
from shimv2.mounts import MountFailed

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
pytestmark = pytest.mark.root


@dataclass
class Mount:
    type: str
    source: str
    target: str = ""
    options: tuple[str, ...] = ()


def in_private_namespace(work: Callable[[], None]) -> None:
    """Run `work` in a child that left the mount namespace; raise what it raised, as text."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            mounts.private_mount_namespace()
            work()
        except BaseException:
            os.write(writer, traceback.format_exc().encode()[-4000:])
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        text = stream.read().decode()
    os.waitpid(child, 0)
    assert text == ""


def mounted(path: Path) -> list[str]:
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [line for line in lines if line.split()[4] == str(path)]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((), (0, 0, "")),
        (("ro", "nosuid", "lowerdir=a:b"), (0x3, 0, "lowerdir=a:b")),
        (("ro", "rw"), (0, 0, "")),
        (("rbind", "rprivate"), (mounts.MS_BIND | mounts.MS_REC, 0x44000, "")),
        (("defaults", "size=1m", "mode=755"), (0, 0, "size=1m,mode=755")),
    ],
)
def test_fstab_options_are_sorted_into_flags_propagation_and_data(options, expected):
    assert tuple(mounts.parse_options(options)) == expected


@needs_root
def test_a_read_only_bind_is_read_only_all_the_way_down(tmp_path):
    def work() -> None:
        source, target = tmp_path / "s", tmp_path / "t"
        (source / "below").mkdir(parents=True)
        target.mkdir()
        mounts.mount("tmpfs", str(source / "below"), "tmpfs")
        mounts.bind(str(source), str(target), read_only=True)
        for place in (target, target / "below"):
            with pytest.raises(OSError, match="Read-only"):
                (place / "f").write_text("x")
        (source / "below" / "f").write_text("the source stays writable")

    in_private_namespace(work)


@needs_root
def test_what_is_mounted_below_a_read_only_bind_can_stay_writable(tmp_path):
    def work() -> None:
        source, target = tmp_path / "s", tmp_path / "t"
        (source / "below").mkdir(parents=True)
        target.mkdir()
        mounts.mount("tmpfs", str(source / "below"), "tmpfs")
        mounts.bind(str(source), str(target), read_only=True, writable_below=True)
        with pytest.raises(OSError, match="Read-only"):
            (target / "f").write_text("x")
        (target / "below" / "f").write_text("x")

    in_private_namespace(work)


@needs_root
def test_a_bind_through_descriptors_follows_no_renamed_path(tmp_path):
    def work() -> None:
        (tmp_path / "source").mkdir()
        (tmp_path / "source" / "f").write_text("yes")
        (tmp_path / "share" / "target").mkdir(parents=True)
        share = os.open(tmp_path / "share", os.O_PATH)
        target = mounts.open_beneath(share, "target", os.O_PATH)
        os.rename(tmp_path / "share" / "target", tmp_path / "share" / "moved")
        os.symlink("/etc", tmp_path / "share" / "target")
        mounts.bind(str(tmp_path / "source"), target, read_only=True)
        assert (tmp_path / "share" / "moved" / "f").read_text() == "yes"
        assert not Path("/etc/f").exists()

    in_private_namespace(work)


def test_no_link_leads_out_of_a_directory(tmp_path):
    (tmp_path / "d").mkdir()
    os.symlink("/etc/passwd", tmp_path / "d" / "absolute")
    os.symlink("../../../../etc/passwd", tmp_path / "d" / "relative")
    directory = os.open(tmp_path / "d", os.O_PATH)
    try:
        for name in ("absolute", "relative", "../x", "/etc/passwd"):
            with pytest.raises(OSError) as caught:  # noqa: PT011 - the errno is what is tested
                mounts.open_beneath(directory, name, os.O_RDONLY)
            assert caught.value.errno in (errno.ELOOP, errno.EXDEV)
    finally:
        os.close(directory)


@needs_root
def test_a_rootfs_is_stacked_and_undone_when_a_layer_fails(tmp_path):
    def work() -> None:
        root = tmp_path / "rootfs"
        root.mkdir()
        (tmp_path / "lower").mkdir()
        good = Mount("bind", str(tmp_path / "lower"), "", ("rbind", "ro"))
        mounts.mount_rootfs([good], str(root))
        assert len(mounted(root)) == mounts.rootfs_layers([good]) == 1
        assert mounts.detach(str(root))
        bad = Mount("nosuchfs", "none")
        with pytest.raises(MountFailed, match="nosuchfs") as caught:
            mounts.mount_rootfs([good, bad], str(root))
        assert caught.value.errno == errno.ENODEV
        assert mounted(root) == []

    in_private_namespace(work)


@needs_root
def test_an_overlay_of_more_layers_than_a_page_holds_is_mounted(tmp_path):
    def work() -> None:
        # overlayfs on overlayfs can't be writable; a tmpfs holds the layers.
        base = tmp_path / "base"
        base.mkdir()
        mounts.mount("tmpfs", str(base), "tmpfs")
        above = base / "a-long-name-for-a-snapshot-directory"
        layers = [above / f"layer-{number:03d}" for number in range(90)]
        for number, layer in enumerate(layers):
            layer.mkdir(parents=True)
            (layer / f"f{number}").write_text("")
        (base / "root").mkdir()
        before = os.getcwd()
        options = ("lowerdir=" + ":".join(map(str, layers)),)
        assert len(options[0]) > 4096
        mounts.mount_rootfs([Mount("overlay", "overlay", "", options)], str(base / "root"))
        assert len(os.listdir(base / "root")) == 90
        assert os.getcwd() == before

    in_private_namespace(work)


@needs_root
def test_a_rootfs_mount_may_not_leave_its_rootfs(tmp_path):
    with pytest.raises(MountFailed):
        mounts.mount_rootfs([Mount("tmpfs", "tmpfs", "../outside")], str(tmp_path))


@needs_root
def test_mounts_of_the_namespace_do_not_reach_the_host(tmp_path):
    def work() -> None:
        mounts.mount("tmpfs", str(tmp_path), "tmpfs")
        mounts.make_shared(str(tmp_path))
        assert any("shared:" in line for line in mounted(tmp_path))

    in_private_namespace(work)
    assert mounted(tmp_path) == []


def test_detaching_what_is_not_mounted_is_no_error(tmp_path):
    assert not mounts.detach(str(tmp_path / "nothing"))
    if os.geteuid() == 0:
        assert not mounts.detach(str(tmp_path))


@needs_root
@pytest.mark.parametrize(("follows", "seen"), [(True, ["file"]), (False, [])])
def test_later_mounts_reach_a_bind_only_if_it_follows_the_host(tmp_path, follows, seen):
    def work() -> None:
        host, share = tmp_path / "host", tmp_path / "share"
        (host / "below").mkdir(parents=True)
        (share / "volume").mkdir(parents=True)
        mounts.make_shared(str(host))
        mounts.make_shared(str(share))
        propagation = mounts.MS_SLAVE if follows else mounts.MS_PRIVATE
        mounts.bind(str(host), str(share / "volume"), propagation=propagation)
        mounts.mount("tmpfs", str(host / "below"), "tmpfs")
        (host / "below" / "file").write_text("x")
        assert os.listdir(share / "volume" / "below") == seen
        mounts.mount("tmpfs", str(share / "volume" / "below"), "tmpfs")
        assert os.listdir(host / "below") == ["file"]  # nothing comes back

    in_private_namespace(work)


@needs_root
def test_links_of_an_image_lead_no_mount_out_of_the_root(tmp_path):
    """A snapshotter's second mount goes below the first, whose content the image's author chose."""

    def work() -> None:
        image, root, outside = tmp_path / "image", tmp_path / "root", tmp_path / "outside"
        for directory in (image / "real", root, outside):
            directory.mkdir(parents=True)
        (image / "link").symlink_to(outside)
        first = Mount("bind", str(image))
        mounts.mount_rootfs([first, Mount("tmpfs", "tmpfs", "real")], str(root))
        assert len(mounted(root)) == 1
        assert len(mounted(root / "real")) == 1
        assert mounts.detach(str(root))
        assert mounted(root / "real") == []
        for target in ("link", "link/x", "missing"):
            with pytest.raises(MountFailed, match=target):
                mounts.mount_rootfs([first, Mount("tmpfs", "tmpfs", target)], str(root))
            assert mounted(outside) == mounted(root) == []

    in_private_namespace(work)


@needs_root
def test_what_lies_below_the_root_goes_with_it(tmp_path):
    def work() -> None:
        (tmp_path / "root" / "inner").mkdir(parents=True)
        layers = [Mount("tmpfs", "tmpfs", "inner")]
        mounts.mount_rootfs(layers, str(tmp_path / "root"))
        assert mounts.rootfs_layers(layers) == 1
        assert mounts.detach(str(tmp_path / "root"))
        assert mounted(tmp_path / "root" / "inner") == []

    in_private_namespace(work)
