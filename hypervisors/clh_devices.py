"""Hot-plug in a running Cloud Hypervisor: block, network, vCPUs, memory.

Unplugging is the guest's decision: it is asked, and that it has let go arrives as an event.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

import trio

from . import clh_config, spec_check
from .clh_threads import vcpu_threads, wait_threads_ended
from .disk_lease import lease
from .errors import (
    ControlError,
    ControlLost,
    DetachRefused,
    HttpRejected,
    PreconditionFailed,
    Unsupported,
)
from .http_api import REQUEST_TIMEOUT_S
from .machine import BlockDevice, NetDevice

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .bounded_json import JsonValue
    from .disk_lease import Lease
    from .disk_nodes import DiskNodes
    from .http_api import HttpApi
    from .machine import Device, GuestAddress, MachineSpec

NAME: Final = "cloud-hypervisor"
API: Final = "/api/v1"
UNDO_DEADLINE_S: Final = 2.0
# A guest takes 0.1 s to let go of an idle disk; a busy one needs a while.
DETACH_DEADLINE_S: Final = 5.0
TOO_MANY_REQUESTS: Final = 429


class ClhDevices:
    """What is plugged into one machine, and how to change it."""

    def __init__(
        self,
        spec: MachineSpec,
        api: HttpApi,
        pid: int,
        nodes: DiskNodes | None,
        directory: str,
    ) -> None:
        self.addresses: dict[str, GuestAddress] = {}
        self._spec = spec
        self._api = api
        self._pid = pid
        # None where the VMM may open disks by their own paths.
        self._nodes = nodes
        self._directory = directory
        self._leases: dict[str, Lease] = {}
        self._asked_vcpus = spec.vcpus
        self._plugged: set[str] = set()
        # Removed by the guest, whether or not somebody waits for it.
        self._gone: set[str] = set()
        self._answers: dict[str, trio.Event] = {}
        self._has_ended = False
        # Guards `_plugged` across the requests of one change.
        self._lock = trio.Lock()

    def on_removed(self, device_id: str) -> None:
        """The guest has given a device back."""
        self._gone.add(device_id)
        if device_id in self._answers:
            self._answers[device_id].set()

    def on_end(self) -> None:
        """The machine has ended; wakes those who wait for it."""
        self._has_ended = True
        for answer in self._answers.values():
            answer.set()

    def close(self) -> None:
        """Let other machines have the disks. Idempotent."""
        while self._leases:
            self._leases.popitem()[1].close()

    async def attach(self, device: Device) -> GuestAddress:
        """See `VirtualMachine.attach`."""
        self._refuse_unpluggable(device)
        async with self._lock:
            if self._has_ended:
                raise ControlLost(f"attach {device.id}")
            if device.id in self.addresses:
                raise PreconditionFailed(
                    "device id", path=None, why=f"{device.id!r} is in use", fix="choose another"
                )
            if len(self._plugged) >= self._spec.hotplug_ports:
                raise Unsupported(
                    NAME,
                    "attach another device",
                    f"all {self._spec.hotplug_ports} hot-plug ports are taken",
                    "raise hotplug_ports in the configuration",
                )
            self._gone.discard(device.id)
            if isinstance(device, BlockDevice):
                address = await self._plug_disk(device)
            else:
                assert isinstance(device, NetDevice)
                body = clh_config.net_config(device)
                address = await self._plug("vm.add-net", device.id, body, device.tap_fds)
            self._plugged.add(device.id)
            self.addresses[device.id] = address
            return address

    async def detach(self, device_id: str) -> None:
        """See `VirtualMachine.detach`."""
        async with self._lock:
            if device_id not in self._plugged:
                raise KeyError(device_id)
            await self._remove(device_id)
            self._plugged.discard(device_id)
            del self.addresses[device_id]
            if device_id in self._leases:
                self._leases.pop(device_id).close()

    async def resize_vcpus(self, count: int) -> int:
        """See `VirtualMachine.resize_vcpus`."""
        if not 1 <= count <= self._spec.max_vcpus:
            raise Unsupported(
                NAME,
                f"run with {count} vCPUs",
                f"the machine was made for 1 to {self._spec.max_vcpus}",
                "raise default_maxvcpus",
            )
        async with self._lock:
            await self._resize_vcpus(count)
            return len(vcpu_threads(self._pid))

    async def resize_memory(self, mib: int) -> int:
        """See `VirtualMachine.resize_memory`. It never shrinks: the guest keeps what it has."""
        if mib > self._spec.max_memory_mib:
            raise Unsupported(
                NAME,
                f"have {mib} MiB",
                f"the machine was made for up to {self._spec.max_memory_mib}",
                "raise default_maxmemory",
            )
        async with self._lock:
            now = await self._memory_mib()
            step = clh_config.MEMORY_STEP_MIB
            room = (self._spec.max_memory_mib - now) // step
            steps = min(-(-(mib - now) // step), room)
            # To ask for less changes what the VMM tells, and nothing else.
            if steps <= 0:
                return now
            size = (now + steps * step) * clh_config.MIB
            await self._put("vm.resize", {"desired_ram": size})
            return await self._memory_mib()

    def _refuse_unpluggable(self, device: Device) -> None:
        match device:
            case NetDevice():
                spec_check.check_net(device)
            case BlockDevice():
                os.close(spec_check.open_block(device)[0])
            case _:
                raise Unsupported(
                    NAME,
                    f"attach a {type(device).__name__} to a running machine",
                    "only block and network devices are hot-plugged",
                    "put it into the specification",
                )
        if not spec_check.DEVICE_ID.fullmatch(device.id):
            raise PreconditionFailed(
                "device id", path=None, why=f"{device.id!r}", fix="use letters, digits, - and _"
            )

    async def _plug_disk(self, device: BlockDevice) -> GuestAddress:
        if self._nodes is None:
            body = clh_config.disk_config(device, str(device.path))
            return await self._plug("vm.add-disk", device.id, body)
        leased = lease(device)
        try:
            with self._nodes.exposed(device, leased) as name:
                path = f"{self._directory}/{clh_config.DISKS_NAME}/{name}"
                body = clh_config.disk_config(device, path)
                address = await self._plug("vm.add-disk", device.id, body)
        except BaseException:
            leased.close()
            raise
        self._leases[device.id] = leased
        return address

    async def _plug(
        self,
        target: str,
        device_id: str,
        body: Mapping[str, JsonValue],
        fds: tuple[int, ...] = (),
    ) -> GuestAddress:
        try:
            match await self._put(target, body, fds=fds):
                case {"bdf": bdf} if (address := clh_config.guest_address(bdf)) is not None:
                    return address
                case answer:
                    raise ControlError(f"PUT {target}", f"no usable address in {answer!r:.200}")
        except HttpRejected:
            raise
        except BaseException:
            # Whether it was plugged is not known. If the deadline fires, the device stays in the
            # VMM until the machine ends.
            with trio.move_on_after(UNDO_DEADLINE_S, shield=True):
                await self._take_back(device_id)
            raise

    async def _take_back(self, device_id: str) -> None:
        try:
            await self._put("vm.remove-device", {"id": device_id}, timeout_s=UNDO_DEADLINE_S)
        except ControlError:
            return  # it never was there, or the VMM answers nothing: the caller's error says so

    async def _remove(self, device_id: str) -> None:
        answer = self._answers[device_id] = trio.Event()
        try:
            if device_id not in self._gone:
                await self._put("vm.remove-device", {"id": device_id})
                with trio.move_on_after(DETACH_DEADLINE_S):
                    await answer.wait()
        finally:
            del self._answers[device_id]
        if device_id in self._gone:
            return
        if self._has_ended:
            raise ControlLost("PUT vm.remove-device")
        raise DetachRefused(device_id, f"no answer within {DETACH_DEADLINE_S:g} s")

    async def _resize_vcpus(self, count: int) -> None:
        try:
            await self._put("vm.resize", {"desired_vcpus": count})
        except HttpRejected as error:
            if error.status != TOO_MANY_REQUESTS:
                raise
            # The guest has not given back what an earlier call took: a second try is for when it
            # has. Where the kernel cannot tell, it is the caller's.
            if not await self._wait_given_back(self._asked_vcpus):
                raise
            await self._put("vm.resize", {"desired_vcpus": count})
        self._asked_vcpus = count
        await self._wait_given_back(count)

    async def _wait_given_back(self, count: int) -> bool:
        """Tell whether no vCPU above `count` is left, once that is so or the guest is late."""
        threads = vcpu_threads(self._pid)
        with trio.move_on_after(DETACH_DEADLINE_S):
            return await wait_threads_ended([tid for n, tid in threads.items() if n >= count])
        return False

    async def _memory_mib(self) -> int:
        match await self._api.request("GET", f"{API}/vm.info"):
            case {"config": {"memory": {"size": int(size)}}}:
                return size // clh_config.MIB
        raise ControlError("GET vm.info", "the answer has no size of the memory")

    async def _put(
        self,
        action: str,
        body: Mapping[str, JsonValue],
        *,
        fds: tuple[int, ...] = (),
        timeout_s: float = REQUEST_TIMEOUT_S,
    ) -> JsonValue:
        return await self._api.request("PUT", f"{API}/{action}", body, fds=fds, timeout_s=timeout_s)
