"""The file systems of one VM's containers, by the ways there are: a share, disks, copies.

    prepare (on the host, while the guest boots) ──> hand_over (the guest is up) ──> release

`rootfs` knows the share, `disks` and `block_rootfs` the disks, `copies` the copied files; here is
decided which of a container's mounts takes which way.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from agent_proto.pb import agent_pb2
from shimv2 import termination_log
from shimv2.block_rootfs import DiskMount, RootImages, snapshot_disk
from shimv2.block_volumes import DeviceDisk, DirectVolumes, device_disks
from shimv2.copies import Copies, Copy, plan_copy
from shimv2.disks import Disks
from shimv2.empty_dirs import EmptyDirs
from shimv2.errors import InvalidArgument
from shimv2.guest_spec import SHARED_DIRECTORY, shared_mounts
from shimv2.rootfs import GuestPaths, Share, check_owners

if TYPE_CHECKING:
    from pathlib import Path

    from agent_proto.client import AgentClient
    from hypervisors.base import VirtualMachine
    from hypervisors.machine import GuestAddress
    from shimv2.bundle import Bundle, JsonObject
    from shimv2.container import Log
    from shimv2.journal import Journal
    from shimv2.machine_plan import MachinePlan
    from shimv2.mounts import RootfsMount
    from shimv2.rootfs import MountCalls

_MAX_NAME: Final = 40


@dataclass(slots=True, kw_only=True)
class Prepared:
    """A container's file systems as far as the host can make them by itself."""

    container_id: str
    paths: GuestPaths
    mounts: list[DiskMount] = field(default_factory=list)
    devices: list[DeviceDisk] = field(default_factory=list)
    copies: list[Copy] = field(default_factory=list)


class ContainerFiles:
    """What one VM's containers have of the host's files."""

    def __init__(
        self,
        sandbox_id: str,
        state: Path,
        journal: Journal,
        calls: MountCalls,
        plan: MachinePlan,
        log: Log,
    ) -> None:
        self._journal = journal
        self._plan = plan
        self._images = RootImages(state, journal, calls, plan.rootfs_image_mib)
        self._empty_dirs = EmptyDirs(state, journal, plan.rootfs_image_mib)
        self._disks = Disks()
        self._direct_volumes = DirectVolumes(journal, sandbox_id)
        self._copies = Copies(log)
        self._log = log
        self.share = Share(state, journal, calls)

    def open(self, sandbox_mounts: Sequence[str] = (), guest_modules: Path | None = None) -> None:
        """Make the share, if the machine has one; must be done before virtiofsd starts.

        Raises:
            InvalidArgument: a sandbox mount that can't be shared, or without a share any.
            ShimError: a mount failed; what was done is in the journal.
        """
        if self._plan.shares:
            self.share.prepare(guest_modules)
            self.share.add_sandbox_mounts(sandbox_mounts)
        elif sandbox_mounts:
            raise InvalidArgument(
                "sandbox_bind_mounts needs a shared directory, which this machine has not; remove "
                'the key, or set shared_fs = "virtio-fs"'
            )

    async def prepare(self, bundle: Bundle, rootfs: Sequence[RootfsMount]) -> Prepared:
        """Mount, bind and build what can be without the guest.

        On failure the caller undoes the container's journal entries.

        Raises:
            InvalidArgument: a mount that can't be given to this VM, named with its reason.
            Unimplemented: as `check_owners`.
            ShimError: the host refused something.
        """
        check_owners(bundle.container_id, rootfs)
        devices = self._device_disks(bundle)
        volumes = self._disk_volumes(bundle)
        root = snapshot_disk(bundle.container_id, rootfs) if self._plan.disks else None
        if root is None and not self._plan.shares:
            root = await self._images.make(bundle, rootfs)
        if self._plan.shares:
            paths = self.share.add(bundle, rootfs if root is None else None, without=volumes)
            for note in paths.notes:
                self._log.warning("volume", container_id=bundle.container_id, text=note)
            prepared = Prepared(container_id=bundle.container_id, paths=paths)
        else:
            prepared = await self._unshared(bundle, without=volumes)
        if root is not None:
            prepared.paths = replace(prepared.paths, root=root.root)
            prepared.mounts.append(root.mount)
        for index, volume in volumes.items():
            prepared.paths.sources[index] = volume.mount_point
            prepared.mounts.append(volume)
        prepared.devices = devices
        return prepared

    async def _unshared(self, bundle: Bundle, without: Collection[int]) -> Prepared:
        # The root comes as a disk.
        paths = GuestPaths(root=SHARED_DIRECTORY)
        prepared = Prepared(container_id=bundle.container_id, paths=paths)
        for mount in shared_mounts(bundle.spec):
            if mount.index in without:
                continue
            mount = replace(mount, source=bundle.path / mount.source)
            volume = await self._empty_dirs.make(mount, bundle.spec)
            if volume is not None:
                paths.sources[mount.index] = volume.path
                paths.storages.extend(volume.storages)
                prepared.mounts.extend(volume.mounts)
                continue
            name = f"{bundle.container_id}-{mount.index}-{mount.source.name[-_MAX_NAME:]}"
            paths.sources[mount.index] = SHARED_DIRECTORY / name
            prepared.copies.append(
                plan_copy(mount, bundle.container_id, paths.sources[mount.index])
            )
        return prepared

    def _device_disks(self, bundle: Bundle) -> list[DeviceDisk]:
        devices = device_disks(bundle.spec, bundle.container_id)
        if devices and not self._plan.disks:
            raise InvalidArgument(
                f"device {devices[0].container_path} is a disk of the host, and this VM takes none "
                f"while it runs; set {self._plan.disks_need}"
            )
        return devices

    def _disk_volumes(self, bundle: Bundle) -> dict[int, DiskMount]:
        """The mounts of the spec that are disks, by their index."""
        found = {}
        for mount in shared_mounts(bundle.spec):
            volume = self._direct_volumes.find(mount)
            if volume is None:
                continue
            if not self._plan.disks:
                raise InvalidArgument(
                    f"mount {mount.destination} is a direct volume, and this VM takes no disk "
                    f"while it runs; set {self._plan.disks_need}"
                )
            found[mount.index] = volume
        return found

    async def hand_over(
        self, prepared: Prepared, vm: VirtualMachine, agent: AgentClient
    ) -> GuestPaths:
        """Plug disks in and copy files; return what the container's request says of them.

        On failure the caller calls `release`.

        Raises:
            InvalidArgument: as `Disks.attach` and `Copies.send`.
            HypervisorError, AgentError: a step failed.
        """
        await self._copies.send(prepared.copies, agent)
        for mount in prepared.mounts:
            address = await self._disks.attach(vm, mount.disk, prepared.container_id)
            prepared.paths.storages.append(_storage(mount, address))
        for device in prepared.devices:
            address = await self._disks.attach(vm, device.disk, prepared.container_id)
            prepared.paths.devices.append(_device(device, address))
        return prepared.paths

    async def release(self, container_id: str, vm: VirtualMachine | None) -> list[str]:
        """Take back what a container has had; return what could not be.

        The guest has let go of it before, unless it is gone.
        """
        self._copies.forget(container_id)
        problems = await self._disks.release(vm, container_id)
        return [*problems, *self.share.remove(container_id)]

    async def bring_back(self, container_id: str, spec: JsonObject, agent: AgentClient) -> None:
        """Before the guest removes a container: what it left in its termination log, to the host.

        Raises:
            AgentError, OSError, ShimError: it stays in the guest.
        """
        path = None if self._plan.shares else termination_log.host_file(spec)
        if path is not None:
            termination_log.write(path, await agent.get_diagnostic_data(container_id))

    def writers(self) -> set[str]:
        """The containers whose disks the guest must unmount before its machine is stopped."""
        return self._disks.writers()

    def unmounted(self, container_id: str) -> None:
        """The guest has let go of a container's disks."""
        self._disks.unmounted(container_id)

    async def follow(self, agent: AgentClient) -> None:
        """Keep copied files up to date, until cancelled."""
        await self._copies.follow(agent)

    def close(self) -> None:
        """Stop following. Idempotent."""
        self._copies.close()


def _storage(mount: DiskMount, address: GuestAddress) -> agent_pb2.Storage:
    return agent_pb2.Storage(
        driver="mmioblk" if address.node else "blk",
        source=address.node or address.pci_path,
        fstype=mount.fstype,
        options=mount.options,
        mount_point=str(mount.mount_point),
        fs_group=mount.fs_group,
    )


def _device(device: DeviceDisk, address: GuestAddress) -> agent_pb2.Device:
    return agent_pb2.Device(
        type="mmioblk" if address.node else "blk",
        id="" if address.node else address.pci_path,
        vm_path=address.node,
        container_path=device.container_path,
    )
