"""The configuration -> what one machine is made of. Pure, apart from the host's own size."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from shimv2.sizing import MILLI, Base, Limits, Size, wanted, within

if TYPE_CHECKING:
    from hypervisors.machine import Capabilities
    from hypervisors.virtiofsd import Cache
    from shimv2.config import HypervisorConfig, RuntimeConfig

_MIB: Final = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class MachinePlan:
    """What the configuration says about the machine and its agent."""

    binary: Path
    kernel: Path
    initrd: Path | None
    kernel_params: str
    vcpus: int
    max_vcpus: int
    memory_mib: int
    max_memory_mib: int
    huge_pages: bool
    prealloc: bool
    machine_type: str
    accelerator: str
    virtiofsd: Path
    virtiofsd_cache: Cache
    vsock_device: Path
    boot_deadline_s: float
    readiness: str  # push: the agent reports; dial: it must be dialled; auto: whichever comes
    agent_port: int
    ready_port: int
    hotplug_ports: int
    unprivileged: bool
    shares: bool  # files of the host reach the guest over a shared directory
    disks: bool  # block devices are plugged in while the guest runs
    rootfs_image_mib: int
    grows: bool = False  # with each container that joins
    # What to set for disks, where `disks` is false.
    disks_need: str = "hotplug_ports above 0 and disable_block_device_use = false"

    def within(self, can: Capabilities) -> MachinePlan:
        """Return the plan with no more than a backend can do; big hosts have more vCPUs."""
        return replace(
            self,
            vcpus=min(self.vcpus, can.max_vcpus),
            max_vcpus=min(self.max_vcpus, can.max_vcpus),
            shares=self.shares and can.shared_directory,
            disks=self.disks and can.block_hotplug,
            disks_need=can.instead or self.disks_need,
        )


def host_memory_mib() -> int:
    """All of the host's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // _MIB


def base_size(hypervisor: HypervisorConfig) -> Base:
    """Return what a machine has besides its containers' limits."""
    vcpus = hypervisor.default_vcpus
    return Base(
        default_millicpus=round((vcpus if vcpus >= 0 else os.cpu_count() or 1) * MILLI),
        default_memory_mib=hypervisor.default_memory_mib,
        overhead_millicpus=round(hypervisor.overhead_vcpus * MILLI) or None,
        overhead_memory_mib=hypervisor.overhead_memory_mib or None,
    )


def maximum_size(hypervisor: HypervisorConfig) -> Size:
    """Return what a machine can grow to; never less than the configuration gives every machine."""
    default = wanted(base_size(hypervisor), Limits())
    return Size(
        vcpus=max(default.vcpus, hypervisor.default_maxvcpus or os.cpu_count() or 1),
        memory_mib=max(default.memory_mib, hypervisor.default_maxmemory_mib or host_memory_mib()),
    )


def plan_machine(config: RuntimeConfig, limits: Limits | None = None) -> MachinePlan:
    """Fill in what the configuration leaves to the host's size and to the containers' limits."""
    hypervisor = config.hypervisor
    maximum = maximum_size(hypervisor)
    size = within(wanted(base_size(hypervisor), limits or Limits()), maximum)
    return MachinePlan(
        binary=hypervisor.path,
        kernel=hypervisor.kernel,
        initrd=hypervisor.initrd,
        kernel_params=_kernel_params(config),
        vcpus=size.vcpus,
        max_vcpus=maximum.vcpus,
        memory_mib=size.memory_mib,
        max_memory_mib=maximum.memory_mib,
        huge_pages=hypervisor.enable_hugepages,
        prealloc=hypervisor.enable_mem_prealloc,
        machine_type=hypervisor.machine_type,
        accelerator=hypervisor.accelerator,
        virtiofsd=hypervisor.virtio_fs_daemon,
        virtiofsd_cache=hypervisor.virtio_fs_cache,  # type: ignore[arg-type]  # a checked choice
        vsock_device=hypervisor.vsock_daemon,
        boot_deadline_s=config.agent.dial_timeout_s,
        readiness=config.agent.readiness,
        agent_port=config.agent.server_port,
        ready_port=config.agent.ready_port,
        hotplug_ports=hypervisor.hotplug_ports,
        unprivileged=hypervisor.rootless,
        shares=hypervisor.shared_fs != "none",
        disks=not hypervisor.disable_block_device_use and hypervisor.hotplug_ports > 0,
        rootfs_image_mib=hypervisor.rootfs_image_size_mib,
        grows=not config.runtime.static_sandbox_resource_mgmt,
    )


def _kernel_params(config: RuntimeConfig) -> str:
    # The operator's own come last: the kernel and the agent obey the last of two.
    debug = []
    if config.hypervisor.enable_debug:
        debug.append("loglevel=7")
    if config.agent.enable_debug:
        debug.append("agent.log=debug")
    return " ".join([*debug, config.hypervisor.kernel_params]).strip()
