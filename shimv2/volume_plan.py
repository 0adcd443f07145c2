"""What becomes of a volume in the guest: kubelet's directories and their storages. Pure.

Most binds are shared over virtio-fs as they are. Three kinds of kubelet's are not:

    emptyDir in memory          a tmpfs of the guest's, of the same size, owner and mode
    emptyDir of huge pages      a hugetlbfs of the guest's, its pages set aside
    configmap, secret, …        shared, and copied by the agent when the host changes it: containers
                                get inotify events, which virtio-fs can't carry

Source: Kata virtcontainers/kata_agent.go (ephemeral, watchable-bind, hugepages); kubelet's layout:
pkg/kubelet/kubelet_getters.go, pkg/volume/util/subpath.
"""

from __future__ import annotations

from enum import Enum
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Final, NamedTuple

from agent_proto.pb import agent_pb2
from shimv2.errors import InvalidArgument

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from shimv2.bundle import JsonObject
    from shimv2.guest_spec import SharedMount
    from shimv2.volume_source import MountedAt

# Source: Kata virtcontainers/kata_agent.go: where pods' volumes in memory are in the guest.
_EPHEMERAL: Final = PurePosixPath("/run/kata-containers/sandbox/ephemeral")
_WATCHED: Final = PurePosixPath("/run/kata-containers/sandbox/watchable")
_BOUND: Final = PurePosixPath("/run/kata-containers/sandbox/volumes")
_UNITS: Final = {"": 0, "K": 10, "M": 20, "G": 30}


class VolumeKind(Enum):
    """What kubelet keeps in a directory of its layout."""

    EMPTY_DIR = "kubernetes.io~empty-dir"
    CONFIG_MAP = "kubernetes.io~configmap"
    SECRET = "kubernetes.io~secret"
    PROJECTED = "kubernetes.io~projected"
    DOWNWARD_API = "kubernetes.io~downward-api"
    SUBPATH = "volume-subpaths"


_UPDATED: Final = frozenset({
    VolumeKind.CONFIG_MAP, VolumeKind.SECRET, VolumeKind.PROJECTED, VolumeKind.DOWNWARD_API,
})  # fmt: skip


class KubeletVolume(NamedTuple):
    """A volume of one pod, as its path says it."""

    kind: VolumeKind
    pod: str  # kubelet's directory of the pod
    name: str

    @property
    def is_updated(self) -> bool:
        """Whether kubelet changes its content while it is mounted."""
        return self.kind in _UPDATED


class GuestVolume(NamedTuple):
    """A volume that the guest makes itself: what the agent mounts, and what the container binds."""

    storages: tuple[agent_pb2.Storage, ...]
    path: PurePosixPath


def kubelet_volume(source: PurePosixPath) -> KubeletVolume | None:
    """Recognise `<pod>/volumes/<plugin>/<name>` and `<pod>/volume-subpaths/<name>/<container>/<n>`.

    A path says only what may be there: for what is in memory its mount is looked at, too.
    """
    parts = source.parts
    if len(parts) > 4 and parts[-3] == "volumes":
        for kind in VolumeKind:
            if parts[-2] == kind.value:
                return KubeletVolume(kind=kind, pod=str(source.parents[2]), name=parts[-1])
    if len(parts) > 5 and parts[-4] == VolumeKind.SUBPATH.value:
        return KubeletVolume(kind=VolumeKind.SUBPATH, pod=str(source.parents[3]), name=parts[-3])
    return None


def memory_volume(
    mount: SharedMount,
    volume: KubeletVolume,
    table: Sequence[MountedAt],
    mount_id: int,
    status: os.stat_result,
    spec: JsonObject,
) -> GuestVolume | None:
    """Plan an emptyDir in memory, or a subPath of one; None if the volume lies elsewhere.

    `mount_id` is the mount on which the source lies, `status` the source's.

    Raises:
        InvalidArgument: huge pages without a limit that says how many.
    """
    here = next((line for line in table if line.id == mount_id), None)
    if here is None or here.fstype not in ("tmpfs", "hugetlbfs"):
        return None
    top = f"{volume.pod}/volumes/{VolumeKind.EMPTY_DIR.value}/{volume.name}"
    path = _EPHEMERAL / volume.name
    if volume.kind is VolumeKind.EMPTY_DIR:
        if here.place != str(mount.source) or here.root != "/":
            return None  # a directory of a larger file system
        return GuestVolume(storages=(_memory(path, here, status, mount, spec),), path=path)
    is_of_it = any(line.place == top and line.device == here.device for line in table)
    if volume.kind is not VolumeKind.SUBPATH or not is_of_it or here.fstype != "tmpfs":
        return None
    # The whole volume may have been given to no container yet: its top is everybody's to write to.
    whole = _memory(path, here, None, mount, spec)
    below = path / here.root.lstrip("/")
    local = agent_pb2.Storage(
        driver="local",
        source="local",
        fstype="local",
        options=[f"mode={status.st_mode & 0o7777:04o}", *_group(status)],
        mount_point=str(below),
    )
    if below == path:
        return GuestVolume(storages=(whole,), path=path)
    name = here.root.lstrip("/").replace("%", "%25").replace("/", "%2F")
    bound = bound_volume(f"{volume.name}:{name}", below)
    return GuestVolume(storages=(whole, local, *bound.storages), path=bound.path)


def bound_volume(name: str, source: PurePosixPath) -> GuestVolume:
    """Plan a directory that the agent binds once, and containers have in common.

    Each container that went to the share by itself would get a file system of its own, without the
    locks and sockets of the others: the kernel makes one wherever it meets a mount of the host's.
    """
    path = _BOUND / name
    storage = agent_pb2.Storage(
        # Agents of Kata's have no driver for binds alone; this one mounts whatever is asked for.
        driver="virtio-fs",
        source=str(source),
        fstype="bind",
        options=["rbind"],
        mount_point=str(path),
    )
    return GuestVolume(storages=(storage,), path=path)


def watched_volume(name: str, shared: PurePosixPath) -> GuestVolume:
    """Plan a volume that the agent copies from `shared`, a directory in the share, and follows."""
    path = _WATCHED / name
    storage = agent_pb2.Storage(
        driver="watchable-bind",
        source=str(shared),
        fstype="bind",
        options=["rbind", "ro"],
        mount_point=str(path),
    )
    return GuestVolume(storages=(storage,), path=path)


def _memory(
    path: PurePosixPath,
    here: MountedAt,
    status: os.stat_result | None,
    mount: SharedMount,
    spec: JsonObject,
) -> agent_pb2.Storage:
    if status is None:
        options = ["mode=0777"]  # Source: kubelet pkg/volume/emptydir: the mode of every emptyDir
    else:
        options = [
            f"mode={status.st_mode & 0o7777:04o}", f"uid={status.st_uid}", f"gid={status.st_gid}",
        ]  # fmt: skip
    if here.fstype == "hugetlbfs":
        page = here.option("pagesize")
        options += [f"pagesize={page}", f"size={_huge_bytes(page, mount, spec)}"]
    elif size := here.option("size"):
        # Without a size it is the kernel's default, half of the memory: then of the guest's.
        options.append(f"size={size}")
    return agent_pb2.Storage(
        driver="ephemeral",
        source="nodev" if here.fstype == "hugetlbfs" else "tmpfs",
        fstype=here.fstype,
        options=options,
        mount_point=str(path),
    )


def _group(status: os.stat_result) -> list[str]:
    return [f"fsgid={status.st_gid}"] if status.st_gid else []


def _huge_bytes(page: str, mount: SharedMount, spec: JsonObject) -> int:
    resources = (spec.get("linux") or {}).get("resources") or {}
    for limit in resources.get("hugepageLimits") or []:
        size = _bytes(str(limit.get("pageSize", "")))
        if size and size == _bytes(page) and int(limit.get("limit") or 0) > 0:
            return int(limit["limit"])
    raise InvalidArgument(
        f"mount {mount.destination}: huge pages of {page} without a limit, so the guest cannot set "
        "any aside; set resources.limits of that page size"
    )


def _bytes(text: str) -> int:
    """`2M` of mountinfo, `2MB` of the runtime specification; 0 for what is no size."""
    number = text.removesuffix("B")
    unit = number[-1:] if number[-1:] in _UNITS else ""
    digits = number.removesuffix(unit)
    return int(digits) << _UNITS[unit] if digits.isascii() and digits.isdigit() else 0
