"""Volumes as kubelet lays them out on a node, without a kubelet."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from tests.harness.node import Node

ROOT = "/tmp/kubelet"
_turns = itertools.count(1)


@dataclass
class PodVolumes:
    """The volumes of one pod. Paths without `outside` are the node's; `remove` undoes all."""

    node: Node
    mounted: list[str] = field(default_factory=list)

    @property
    def directory(self) -> str:
        return f"{ROOT}/pods/0b81f4c2-5fd3-4ad0-8c1f-7b2f5ec3a2aa"

    def volume(self, plugin: str, name: str) -> str:
        """Make a volume's directory; return its path."""
        path = f"{self.directory}/volumes/kubernetes.io~{plugin}/{name}"
        self.outside(path).mkdir(parents=True)
        return path

    def outside(self, path: str) -> Path:
        return self.node.path(path)

    def memory(self, name: str, options: str, group: int = 0) -> str:
        """An emptyDir of medium Memory, given to an fsGroup as kubelet does it."""
        path = self.volume("empty-dir", name)
        self.mount(path, "tmpfs", options)
        self._open_to(path, group)
        return path

    def empty_dir(self, name: str, group: int = 0) -> str:
        """An emptyDir on disk."""
        path = self.volume("empty-dir", name)
        self._open_to(path, group)
        return path

    def sub_path(self, volume: str, inside: str, container: str) -> str:
        """What kubelet binds for a subPath: a mount of the directory, made if it is missing."""
        name = volume.rpartition("/")[2]
        directory = self.outside(volume) / inside
        directory.mkdir(parents=True, exist_ok=True)
        path = f"{self.directory}/volume-subpaths/{name}/{container}/0"
        self.outside(path).mkdir(parents=True)
        self.node.run(["mount", "--bind", f"{volume}/{inside}", path])
        self.mounted.append(path)
        return path

    def mount(self, path: str, kind: str, options: str) -> None:
        self.node.run(["mount", "-t", kind, "-o", options, kind, path])
        self.mounted.append(path)

    def write_atomically(self, path: str, content: Mapping[str, str]) -> None:
        """Replace a volume's content as kubelet does. Source: volume/util/atomic_writer.go."""
        top = self.outside(path)
        old = os.readlink(top / "..data") if (top / "..data").is_symlink() else None
        new = f"..2026_11_21_12_00_00.{next(_turns):09}"
        (top / new).mkdir(mode=0o755)
        for name, text in content.items():
            (top / new / name).write_text(text)
            if not (top / name).is_symlink():
                (top / name).symlink_to(f"..data/{name}")
        (top / "..data_tmp").symlink_to(new)
        (top / "..data_tmp").rename(top / "..data")
        for link in top.iterdir():
            if not link.name.startswith("..") and link.name not in content:
                link.unlink()
        if old is not None:
            shutil.rmtree(top / old)

    def remove(self) -> None:
        for path in reversed(self.mounted):
            self.node.run(["umount", path])
        self.node.run(["rm", "-rf", ROOT])

    def _open_to(self, path: str, group: int) -> None:
        directory = self.outside(path)
        os.chown(directory, 0, group)
        directory.chmod(0o2777 if group else 0o777)
