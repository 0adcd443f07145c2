"""emptyDirs of a VM without a shared directory: what is made on the host, and what never stays."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import trio

from shimv2 import rootfs_image
from shimv2.empty_dirs import EmptyDir, EmptyDirs
from shimv2.errors import FailedPrecondition
from shimv2.guest_spec import SharedMount
from shimv2.journal import Journal
from tests.harness.limitations import documented

IMAGE = ".kata-volume.img"


class Bench:
    """A pod's emptyDirs, and the journal of what is held for them."""

    def __init__(self, root: Path) -> None:
        self.state = root / "state"
        self.state.mkdir()
        self._volumes = root / "pods/u/volumes/kubernetes.io~empty-dir"
        self.journal = Journal.open(str(self.state / "journal"), namespace="n", sandbox_id="s")
        self.dirs = EmptyDirs(self.state, self.journal, 32)

    def volume(self, name: str) -> Path:
        path = self._volumes / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    async def make(self, name: str) -> EmptyDir:
        mount = SharedMount(
            index=0,
            source=self.volume(name),
            destination=PurePosixPath("/v"),
            read_only=False,
            is_recursive=True,
        )
        made = await self.dirs.make(mount, {})
        assert made is not None
        return made

    def held(self) -> list[str]:
        return [str(entry.fields["path"]) for entry in self.journal.held]

    def left(self) -> list[str]:
        return [path.name for path in self.state.iterdir() if path.name != "journal"]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


async def test_an_image_that_cannot_be_made_leaves_nothing_and_is_tried_again(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = bench.volume("e") / IMAGE
    with monkeypatch.context() as patch:
        patch.setattr(rootfs_image, "MKFS", Path("/nowhere/mkfs.ext4"))
        for _ in range(2):
            with pytest.raises(FailedPrecondition, match="install e2fsprogs"):
                await bench.make("e")
            assert (bench.held(), bench.left(), image.exists()) == ([], [], False)
    made = await bench.make("e")
    assert [mount.disk.path for mount in made.mounts] == [image]
    assert (bench.held(), bench.left()) == ([str(image)], [])
    assert bench.journal.undo() == []
    assert not image.exists()


async def test_a_create_that_is_given_up_takes_only_its_own_image_back(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = await bench.make("first")
    image = bench.volume("e") / IMAGE
    begun = trio.Event()

    async def hang(tree: Path, image: Path, *_: Any, **__: Any) -> None:
        await trio.Path(image).touch()
        begun.set()
        await trio.sleep_forever()

    monkeypatch.setattr(rootfs_image, "build_image", hang)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bench.make, "e")
        with trio.fail_after(10):
            await begun.wait()
        assert image.exists()
        nursery.cancel_scope.cancel()
    kept = first.mounts[0].disk.path
    assert (bench.held(), bench.left()) == ([str(kept)], [])
    assert kept.exists()
    assert not image.exists()


async def test_containers_that_are_created_side_by_side_get_each_volume_once(bench: Bench) -> None:
    made: list[tuple[str, EmptyDir]] = []

    async def make(name: str) -> None:
        made.append((name, await bench.make(name)))

    async with trio.open_nursery() as nursery:
        for name in ("a", "b", "a", "b"):
            nursery.start_soon(make, name)
    for name in "ab":
        one, other = (volume for of, volume in made if of == name)
        assert one is other
    assert sorted(bench.held()) == [str(bench.volume(name) / IMAGE) for name in "ab"]
    assert bench.left() == []


async def test_an_image_that_somebody_else_put_there_is_named_and_stays(bench: Bench) -> None:
    image = bench.volume("e") / IMAGE
    image.write_text("precious")
    with pytest.raises(
        FailedPrecondition,
        match=documented("mount …: … is there already and not this sandbox's; remove it"),
    ):
        await bench.make("e")
    assert (bench.held(), bench.left()) == ([], [])
    assert bench.journal.undo() == []
    assert image.read_text() == "precious"
