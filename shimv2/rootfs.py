"""Puts a container's filesystems into the directory that virtio-fs shows to the guest.

Layout, of which the guest sees the right-hand side, read-only at its top:

    <state>/mounts/<cid>/rootfs            share/<cid>/rootfs              the root filesystem
    <state>/mounts/volume:<n>-<name>       share/volume:<n>-<name>         a volume: shared_volumes
    <state>/mounts/sandbox-mounts/<name>   share/sandbox-mounts/<name>     sandbox_bind_mounts
    <state>/mounts/.modules                share/.modules                  guest_modules, read-only

`mounts` is a mount of its own, shared; `share` is its read-only peer. So a mount made later on the
left appears on the right, and the guest can neither remove nor replace a mount's target: paths on
the left are ours alone. Each step is journalled before it is taken; `Journal.undo` takes it back.

virtiofsd sees mounts that are made after its start only when the share was made shared before it.
Source: Kata virtcontainers/fs_share_linux.go.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Final, Protocol

from shimv2 import mounts
from shimv2.errors import InvalidArgument, Unimplemented
from shimv2.guest_spec import SHARED_DIRECTORY, SharedMount, pod_shm, shared_mounts
from shimv2.sandbox_mounts import DIRECTORY as SANDBOX_MOUNTS
from shimv2.sandbox_mounts import plan_sandbox_mounts
from shimv2.shared_volumes import SharedVolumes
from shimv2.volume_plan import (
    VolumeKind,
    bound_volume,
    kubelet_volume,
    memory_volume,
    watched_volume,
)
from shimv2.volume_source import mount_table, opened, shm_bytes

if TYPE_CHECKING:
    from agent_proto.pb.agent_pb2 import Device, Storage
    from shimv2.bundle import Bundle
    from shimv2.journal import Entry, Journal
    from shimv2.volume_plan import KubeletVolume
    from shimv2.volume_source import Source

SHARE_TAG: Final = "kataShared"  # Source: Kata: the tag that agents mount
MODULES_NAME: Final = ".modules"  # where our agent looks; no container's id begins with a dot
_MAX_RESOLV_CONF_BYTES: Final = 64 << 10


class MountCalls(Protocol):
    """The host's mount operations; `shimv2.mounts` is the real one."""

    def mount_rootfs(self, mounts: Sequence[mounts.RootfsMount], target: str) -> None: ...
    def bind(
        self,
        source: str | int,
        target: str | int,
        *,
        read_only: bool = ...,
        recursive: bool = ...,
        writable_below: bool = ...,
        propagation: int = ...,
        attributes: int = ...,
    ) -> None: ...
    def make_shared(self, path: str) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestPaths:
    """Where the guest finds a container's filesystems."""

    root: PurePosixPath
    sources: dict[int, PurePosixPath] = field(default_factory=dict)  # by index of the spec's mount
    # Mounts that the guest must not make read-only, as what is mounted below them isn't.
    hosts_read_only: set[int] = field(default_factory=set)
    storages: list[Storage] = field(default_factory=list)  # what the agent mounts before
    devices: list[Device] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what a volume is not, for the log


class Share:
    """The shared directory of one sandbox."""

    def __init__(self, state: Path, journal: Journal, calls: MountCalls) -> None:
        self._mounts = state / "mounts"
        self.path = state / "share"
        self._journal = journal
        self._calls = calls
        self._volumes = SharedVolumes(self._mounts, journal, calls)

    def prepare(self, guest_modules: Path | None = None) -> None:
        """Make both views; must be done before virtiofsd starts.

        `guest_modules` is shown to the guest if it is there: an installation may go without.

        Raises:
            ShimError: a mount failed; what was done is in the journal.
        """
        for directory in (self._mounts, self.path):
            self._journal.take("directory", path=str(directory))
            directory.mkdir(mode=0o700)
        self._journal.take("mount", target=str(self._mounts))
        self._calls.make_shared(str(self._mounts))
        self._journal.take("mount", target=str(self.path))
        self._calls.bind(str(self._mounts), str(self.path), read_only=True, recursive=False)
        if guest_modules is not None and guest_modules.is_dir():
            target = self._mounts / MODULES_NAME
            self._journal.take("directory", path=str(target))
            target.mkdir(mode=0o755)
            self._journal.take("mount", target=str(target))
            self._calls.bind(str(guest_modules), str(target), read_only=True, recursive=False)

    def add_sandbox_mounts(self, values: Sequence[str]) -> None:
        """Share what `sandbox_bind_mounts` names.

        Raises:
            InvalidArgument: a value that makes no sense, or a source that can't be shared.
            ShimError: the host refused a mount.
        """
        planned = plan_sandbox_mounts(values)
        if planned:
            directory = self._mounts / SANDBOX_MOUNTS
            self._journal.take("directory", path=str(directory))
            directory.mkdir(mode=0o755)
        for mount in planned:
            with opened(mount) as source:
                name = f"{SANDBOX_MOUNTS}/{mount.destination.name}"
                self._volumes.keep(name, mount, source)

    def add(
        self,
        bundle: Bundle,
        rootfs: Sequence[mounts.RootfsMount] | None,
        without: Collection[int] = (),
    ) -> GuestPaths:
        """Mount a container's root filesystem and bind its volumes.

        What comes by another way is left out: the root if `rootfs` is None, and the mounts of the
        spec whose indexes are in `without`. On failure the caller undoes the container's journal
        entries.

        Raises:
            InvalidArgument: a mount that can't be given to a VM, named with its reason.
            ShimError: the host refused a mount.
        """
        container_id = bundle.container_id
        if rootfs is not None:
            target = self._mounts / container_id / "rootfs"
            mount_root(self._journal, self._calls, bundle, rootfs, target)
        paths = GuestPaths(root=SHARED_DIRECTORY / container_id / "rootfs")
        for mount in shared_mounts(bundle.spec):
            if mount.index not in without:
                self._add_volume(bundle, replace(mount, source=bundle.path / mount.source), paths)
        return paths

    def remove(self, container_id: str) -> list[str]:
        """Take back what `add` did; return what could not be."""
        return [
            *self._volumes.release(container_id),
            *self._journal.undo(container=container_id),
        ]

    def _add_volume(self, bundle: Bundle, mount: SharedMount, paths: GuestPaths) -> None:
        volume = kubelet_volume(PurePosixPath(mount.source))
        with opened(mount) as source:
            if volume is not None and volume.kind in (VolumeKind.EMPTY_DIR, VolumeKind.SUBPATH):
                made = memory_volume(
                    mount, volume, mount_table(), source.mount_id(), source.status, bundle.spec
                )
                if made is not None:
                    paths.sources[mount.index] = made.path
                    paths.storages.extend(made.storages)
                    return
            stays_writable = _has_writable_below(mount, source, volume)
            mount = replace(mount, is_read_only_below=not stays_writable)
            if stays_writable:
                paths.hosts_read_only.add(mount.index)
            is_pods_own = volume is not None and volume.kind is VolumeKind.EMPTY_DIR
            name = self._volumes.use(
                bundle.container_id,
                mount,
                source,
                # The pod may write to its emptyDirs: who of it may not is the guest's to say, and
                # all of its containers have the same directory.
                read_only=mount.read_only and not is_pods_own,
                is_kubelets=volume is not None,
            )
            paths.sources[mount.index] = shared = SHARED_DIRECTORY / name
            if source.is_directory:
                is_updated = volume is not None and volume.is_updated and mount.read_only
                made = watched_volume(name, shared) if is_updated else bound_volume(name, shared)
                paths.sources[mount.index] = made.path
                paths.storages.extend(made.storages)
            if mount.leads_host:
                paths.notes.append(
                    f"mount {mount.destination}: what the container mounts there stays in the VM; "
                    "mounts of the host do appear in it"
                )


def _has_writable_below(mount: SharedMount, source: Source, volume: KubeletVolume | None) -> bool:
    """Whether a read-only source has mounts below it, which plain `ro` leaves writable.

    Kubelet mounts nothing below its own volumes.
    """
    is_plain = mount.read_only and mount.is_recursive and not mount.is_read_only_below
    if not is_plain or volume is not None or not source.is_directory:
        return False
    below = source.path().rstrip("/") + "/"
    return any(each.place.startswith(below) for each in mount_table())


def mount_root(
    journal: Journal,
    calls: MountCalls,
    bundle: Bundle,
    rootfs: Sequence[mounts.RootfsMount],
    target: Path,
) -> list[Entry]:
    """Mount a container's root on `target`, making it and its parent; return the entries.

    Raises:
        InvalidArgument: a mount that leaves the root, or of a type that the host doesn't know.
        ShimError: the host refused a mount.
    """
    container_id = bundle.container_id
    layers = _layers(rootfs)
    entries = []
    for directory in (target.parent, target):
        entries.append(journal.take("directory", path=str(directory), container=container_id))
        directory.mkdir(mode=0o755)
    if not rootfs:
        source = _root_directory(bundle)
        entries.append(journal.take("mount", target=str(target), container=container_id))
        calls.bind(str(source), str(target))
        return entries
    entries += [
        journal.take("mount", target=str(target), container=container_id) for _ in range(layers)
    ]
    try:
        calls.mount_rootfs(rootfs, str(target))
    except mounts.MountFailed as exc:
        if exc.errno != errno.ENODEV:
            raise
        types = ", ".join(sorted({repr(mount.type) for mount in rootfs}))
        raise InvalidArgument(
            f"rootfs of container {container_id}: the host's kernel knows no filesystem type "
            f"among {types}; use a snapshotter that mounts overlay or bind"
        ) from exc
    return entries


def check_owners(container_id: str, rootfs: Sequence[mounts.RootfsMount]) -> None:
    """Refuse a root of which only the host's kernel could show the right owners.

    Source: containerd, core/mount: the options of id-mapped layers.

    Raises:
        Unimplemented: with what to do instead.
    """
    for mount in rootfs:
        for option in mount.options:
            if option.startswith(("uidmap=", "gidmap=")):
                raise Unimplemented(
                    f"rootfs of container {container_id}: id-mapped layers ({option}) cannot be "
                    "shared with the VM; use a snapshot whose files belong to the mapped users "
                    "(ctr: without --remap-labels), or no user namespace (Kubernetes: hostUsers: "
                    "true)"
                )


def sandbox_dns(bundle: Bundle) -> list[str]:
    """The lines of the pod's resolv.conf, as far as the spec brings one."""
    for mount in shared_mounts(bundle.spec):
        if str(mount.destination) == "/etc/resolv.conf":
            try:
                text = _small_file(bundle.path / mount.source)
            except OSError:
                return []  # the mount itself reports it
            return text.decode("utf-8", "replace").splitlines()
    return []


def sandbox_shm_bytes(bundle: Bundle) -> int:
    """The size of the host's /dev/shm of a pod; 0 where it can't be told."""
    source = pod_shm(bundle.spec)
    return shm_bytes(source) if source else 0


def _small_file(path: Path) -> bytes:
    with open(path, "rb", buffering=0, opener=_without_waiting) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            return b""
        return file.read(_MAX_RESOLV_CONF_BYTES)


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # for the writer of a fifo


def _layers(rootfs: Sequence[mounts.RootfsMount]) -> int:
    try:
        return mounts.rootfs_layers(rootfs)
    except mounts.MountFailed as exc:
        raise InvalidArgument(
            f"rootfs mount target {exc.target!r} leaves the container's root; remove the '..'"
        ) from exc


def _root_directory(bundle: Bundle) -> Path:
    source = bundle.path / str(bundle.spec["root"]["path"])
    if not source.is_dir():
        raise InvalidArgument(
            f"rootfs of container {bundle.container_id}: {source} is not a directory"
        )
    return source
