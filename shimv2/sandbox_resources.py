"""What a sandbox's containers may use, and a machine that is big enough for it.

    begin ──> (boot) ──> running ──> join · update · leave, each followed by a look at the size

With `static_sandbox_resource_mgmt` the machine has its size from the boot on, and only an update
that asks for more than that makes it grow. Without, it grows with each container that joins and
gives back, in the background, what the guest lets go when one leaves. A machine that can't be made
big enough is told in the log; no container fails because of it, it has less than its limit.
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final

import trio

from agent_proto.errors import AgentError
from hypervisors.errors import HypervisorError
from shimv2.bundle import ContainerKind
from shimv2.machine_plan import base_size, maximum_size
from shimv2.sandbox_cgroup import HostLimits
from shimv2.sizing import (
    MIB,
    Limits,
    Size,
    container_limits,
    cpu_numbers,
    sandbox_limits,
    shortfall,
    total,
    wanted,
    within,
)
from shimv2.vcpu_map import VcpuMap

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from agent_proto.client import AgentClient
    from agent_proto.pb import oci_pb2
    from hypervisors.base import VirtualMachine
    from shimv2.boot import Machine
    from shimv2.bundle import Bundle, JsonObject
    from shimv2.config import RuntimeConfig
    from shimv2.container import Log

# What a VMM and its daemons need beside the guest's memory. Source: Kata's RuntimeClass of QEMU has
# 320 MiB of overhead; QEMU's translated code under emulation is bounded at 1 GiB by itself.
_VMM_MIB: Final = 320
_TRANSLATED_CODE_MIB: Final = 1024
# A backend has few slots for memory: each step is at least this part of what there is.
_GROWTH_PART: Final = 4


class SandboxResources:
    """The limits of one sandbox's containers. Its methods may be called by several tasks."""

    def __init__(
        self, config: RuntimeConfig, log: Log, limit_host: Callable[[HostLimits], None]
    ) -> None:
        self._base = base_size(config.hypervisor)
        self._maximum = maximum_size(config.hypervisor)
        self._is_static = config.runtime.static_sandbox_resource_mgmt
        self._log = log
        self._limit_host = limit_host
        self._single = ""  # the container that has the machine to itself
        self._pause = ""  # or the one that only holds the pod together
        self._containers: dict[str, JsonObject] = {}
        self._pod = Limits()
        self._size = Size(vcpus=1, memory_mib=0)
        self._vm: VirtualMachine | None = None
        self._agent: AgentClient | None = None
        self._sizing = trio.Lock()  # one change of the machine at a time
        self._vcpus = VcpuMap()

    @property
    def limits(self) -> Limits:
        """What the containers there are may use together; in a static pod, what it announced."""
        of_containers = total(container_limits(one) for one in self._containers.values())
        return of_containers.at_least(self._pod) if self._is_static else of_containers

    def begin(self, bundle: Bundle) -> Limits:
        """Take in the sandbox's first container; return the limits to size the boot by.

        Raises:
            InvalidArgument: its resources or the pod's annotations can't be read.
        """
        self._containers[bundle.container_id] = _resources(bundle)
        if bundle.kind is ContainerKind.SINGLE:
            self._single = bundle.container_id
        else:
            self._pause = bundle.container_id
            self._pod = sandbox_limits(bundle.annotations) if self._is_static else Limits()
        limits = self.limits
        size = wanted(self._base, limits)
        self._tell(size, within(size, self._maximum))
        return limits

    def running(self, machine: Machine) -> None:
        """The machine is up; from now on it can be resized."""
        self._vm, self._agent, self._size = machine.vm, machine.agent, machine.size
        vcpus = min(self._maximum.vcpus, machine.max_vcpus)
        self._maximum = Size(vcpus=vcpus, memory_mib=self._maximum.memory_mib)
        self._limit_host(self._host_limits(self._size))

    async def join(self, bundle: Bundle) -> None:
        """Make room for a container that is about to be created; undone by `leave`.

        Raises:
            InvalidArgument: its resources can't be read.
        """
        resources = _resources(bundle)
        container_limits(resources)
        self._containers[bundle.container_id] = resources
        if self._is_static:
            self._limit_host(self._host_limits(self._size))
        else:
            await self._grow()

    @asynccontextmanager
    async def update(self, container_id: str, resources: JsonObject) -> AsyncIterator[None]:
        """Make room for a container's new limits, which the body sets in the guest.

        If the body fails, the old ones count on; the machine keeps its size.

        Raises:
            InvalidArgument: they can't be read; nothing has changed.
        """
        before = self._containers.get(container_id, {})
        merged = _merged(before, resources)
        container_limits(merged)
        self._containers[container_id] = merged
        try:
            await self._grow()
            yield
        except BaseException:
            if self._containers.get(container_id) is merged:
                self._containers[container_id] = before
            raise

    def leave(self, container_id: str) -> bool:
        """Forget a container; tell whether `shrink` may now have something to give back."""
        self._containers.pop(container_id, None)
        self._vcpus.keep(self._pinned())
        self._limit_host(self._host_limits(self._size))
        return not self._is_static and self._vm is not None

    async def shrink(self) -> None:
        """Take back what no container is meant to use, as far as backend and guest can.

        Only where the size follows the containers.
        """
        if self._is_static:
            return
        async with self._sizing:
            target = wanted(self._base, self.limits)
            vm = self._vm
            if vm is None:
                return
            try:
                if target.vcpus < self._size.vcpus:
                    vcpus = await vm.resize_vcpus(target.vcpus)
                    self._size = Size(vcpus=vcpus, memory_mib=self._size.memory_mib)
                if target.memory_mib < self._size.memory_mib:
                    memory_mib = await vm.resize_memory(target.memory_mib)
                    self._size = Size(vcpus=self._size.vcpus, memory_mib=memory_mib)
            except HypervisorError as error:
                self._log.warning("resize", text=f"the VM keeps its size: {error}")

    def adapt(self, resources: oci_pb2.LinuxResources, container_id: str) -> None:
        """Pin a container to vCPUs, if it was to be pinned to CPUs of the host."""
        cpu = self._containers.get(container_id, {}).get("cpu")
        numbers = cpu_numbers(cpu.get("cpus")) if isinstance(cpu, dict) else ()
        if numbers:
            resources.CPU.Cpus = self._vcpus.guest_cpus(numbers, self._size.vcpus)

    async def _grow(self) -> None:
        async with self._sizing:
            vm, agent = self._vm, self._agent
            target = wanted(self._base, self.limits)
            if vm is None or agent is None:
                return
            before = self._size
            goal = within(target, self._maximum)
            larger = max(goal.memory_mib, before.memory_mib)
            self._limit_host(self._host_limits(Size(vcpus=goal.vcpus, memory_mib=larger)))
            try:
                await self._resize(vm, goal)
                if self._size != before:
                    await agent.online_cpu_mem(
                        wait=True,
                        nb_cpus=max(0, self._size.vcpus - before.vcpus),
                        cpu_only=self._size.memory_mib == before.memory_mib,
                    )
            except (HypervisorError, AgentError) as error:
                self._log.warning("resize", text=f"the VM did not grow: {error}")
            self._tell(target, self._size)

    async def _resize(self, vm: VirtualMachine, target: Size) -> None:
        if target.vcpus > self._size.vcpus:
            vcpus = await vm.resize_vcpus(target.vcpus)
            self._size = Size(vcpus=vcpus, memory_mib=self._size.memory_mib)
        if target.memory_mib > self._size.memory_mib:
            step = self._size.memory_mib + self._size.memory_mib // _GROWTH_PART
            asked = min(max(target.memory_mib, step), self._maximum.memory_mib)
            memory_mib = await vm.resize_memory(asked)
            self._size = Size(vcpus=self._size.vcpus, memory_mib=memory_mib)

    def _host_limits(self, size: Size) -> HostLimits:
        """A pod is limited by kubelet, on the cgroup above; a container on its own by us."""
        sets = [
            cpu_numbers(cpu.get("cpus")) if isinstance(cpu := one.get("cpu"), dict) else ()
            for name, one in self._containers.items()
            if name != self._pause
        ]
        cpus = sorted({number for numbers in sets for number in numbers}) if all(sets) else []
        pinned = ",".join(map(str, cpus))
        if not self._single:
            return HostLimits(cpus=pinned)
        resources = self._containers.get(self._single, {})
        limits = container_limits(resources)
        vmm_mib = _VMM_MIB
        if self._vm is not None and self._vm.accelerator == "tcg":
            vmm_mib += _TRANSLATED_CODE_MIB
        cpu = resources.get("cpu")
        shares = cpu.get("shares") if isinstance(cpu, dict) else None
        base = self._base.overhead_millicpus or self._base.default_millicpus
        return HostLimits(
            memory_bytes=(size.memory_mib + vmm_mib) * MIB if limits.memory_bytes else None,
            millicpus=limits.millicpus + base if limits.millicpus else None,
            shares=shares if isinstance(shares, int) and shares > 0 else None,
            cpus=pinned,
        )

    def _pinned(self) -> set[int]:
        found: set[int] = set()
        for resources in self._containers.values():
            cpu = resources.get("cpu")
            found.update(cpu_numbers(cpu.get("cpus")) if isinstance(cpu, dict) else ())
        return found

    def _tell(self, target: Size, had: Size) -> None:
        if text := shortfall(target, had, maximum=self._maximum):
            self._log.warning("resize", text=text)


def _resources(bundle: Bundle) -> JsonObject:
    linux = bundle.spec.get("linux")
    resources = linux.get("resources") if isinstance(linux, dict) else None
    return resources if isinstance(resources, dict) else {}


def _merged(old: JsonObject, new: JsonObject) -> JsonObject:
    """An update names only what changes."""
    merged: dict[str, Any] = dict(old)
    for name in ("cpu", "memory"):
        table, change = merged.get(name), new.get(name)
        if isinstance(change, dict):
            kept = table if isinstance(table, dict) else {}
            changed = {key: value for key, value in change.items() if value is not None}
            merged[name] = {**kept, **changed}
        elif change is not None:
            merged[name] = change  # of the wrong kind: refused by who reads it
    return merged
