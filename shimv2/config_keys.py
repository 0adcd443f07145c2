"""The tables of keys behind config_schema.py: data, nothing else.

A row is (field, kind, low, high, choices, scale), shortened from the right. A field with a dot goes
to another section than the table it stands in.
"""

from __future__ import annotations

Row = tuple[str, str] | tuple[str, str, float, float] | tuple[
    str, str, float, float, tuple[str, ...]
] | tuple[str, str, float, float, tuple[str, ...], float]  # fmt: skip

_NO: tuple[str, ...] = ()
_DAY_S = 86400.0

_HYPERVISOR: dict[str, Row] = {
    "path": ("path", "path"),
    "kernel": ("kernel", "path"),
    "initrd": ("initrd", "path"),
    "guest_modules": ("guest_modules", "path"),
    "kernel_params": ("kernel_params", "text"),
    "machine_type": ("machine_type", "choice", 0, 0, ("q35", "pc", "virt", "microvm")),
    "accelerator": ("accelerator", "choice", 0, 0, ("auto", "kvm", "tcg")),
    "default_vcpus": ("default_vcpus", "number", -1, 1024),
    "default_maxvcpus": ("default_maxvcpus", "int", 0, 1024),
    "default_memory": ("default_memory_mib", "int", 64, 16 << 20),
    "default_maxmemory": ("default_maxmemory_mib", "int", 0, 64 << 20),
    "overhead_vcpus": ("overhead_vcpus", "number", 0, 1024),
    "overhead_memory": ("overhead_memory_mib", "int", 0, 16 << 20),
    "memory_slots": ("memory_slots", "int", 0, 256),
    "hotplug_ports": ("hotplug_ports", "int", 0, 64),
    "rootless": ("rootless", "bool"),
    "enable_debug": ("enable_debug", "bool"),
    "shared_fs": ("shared_fs", "choice", 0, 0, ("virtio-fs", "none")),
    "virtio_fs_daemon": ("virtio_fs_daemon", "path"),
    "virtio_fs_cache": (
        "virtio_fs_cache", "choice", 0, 0, ("auto", "always", "never", "metadata", "none"),
    ),
    "virtio_fs_queue_size": ("virtio_fs_queue_size", "int", 64, 1024),
    "vsock_daemon": ("vsock_daemon", "path"),
    "disable_block_device_use": ("disable_block_device_use", "bool"),
    "rootfs_image_size": ("rootfs_image_size_mib", "int", 16, 16 << 20),
    "disable_vhost_net": ("disable_vhost_net", "bool"),
    "enable_hugepages": ("enable_hugepages", "bool"),
    "enable_mem_prealloc": ("enable_mem_prealloc", "bool"),
    "network_queues": ("network_queues", "int", 0, 256),
    "entropy_source": ("entropy_source", "path"),
    "enable_annotations": ("enable_annotations", "list"),
}  # fmt: skip

_AGENT: dict[str, Row] = {
    "enable_debug": ("enable_debug", "bool"),
    "debug_console_enabled": ("debug_console_enabled", "bool"),
    "kernel_modules": ("kernel_modules", "list"),
    "dial_timeout": ("dial_timeout_s", "number", 1, _DAY_S),
    "reconnect_timeout_ms": ("reconnect_timeout_s", "number", 1, _DAY_S * 1000, _NO, 0.001),
    "create_container_timeout": ("create_container_timeout_s", "number", 1, _DAY_S),
    "request_timeout": ("request_timeout_s", "number", 1, _DAY_S),
    "readiness": ("readiness", "choice", 0, 0, ("auto", "push", "dial")),
    "server_port": ("server_port", "int", 1, 0xFFFFFFFE),
    "log_port": ("log_port", "int", 1, 0xFFFFFFFE),
    "ready_port": ("ready_port", "int", 1, 0xFFFFFFFE),
    "container_pipe_size": ("container_pipe_size_bytes", "int", 0, 1 << 30),
}

_RUNTIME: dict[str, Row] = {
    "internetworking_model": (
        "internetworking_model", "choice", 0, 0, ("tcfilter", "macvtap", "none"),
    ),
    "disable_new_netns": ("disable_new_netns", "bool"),
    "disable_guest_seccomp": ("disable_guest_seccomp", "bool"),
    "sandbox_cgroup_only": ("sandbox_cgroup_only", "bool"),
    "static_sandbox_resource_mgmt": ("static_sandbox_resource_mgmt", "bool"),
    "disable_guest_empty_dir": ("disable_guest_empty_dir", "bool"),
    "sandbox_bind_mounts": ("sandbox_bind_mounts", "list"),
    "enable_pprof": ("enable_pprof", "bool"),
    "enable_debug": ("enable_debug", "bool"),
    "keep_abnormal": ("keep_abnormal", "bool"),
    "experimental": ("experimental", "list"),
    "kubelet_root_dir": ("kubelet_root_dir", "path"),
    # Go keeps it in [runtime], runtime-rs in [agent.kata].
    "create_container_timeout": ("agent.create_container_timeout_s", "number", 1, _DAY_S),
}  # fmt: skip

_FACTORY: dict[str, Row] = {
    "template_path": ("template_path", "path"),
}

TABLES: dict[str, dict[str, Row]] = {
    "hypervisor": _HYPERVISOR,
    "agent": _AGENT,
    "runtime": _RUNTIME,
    "factory": _FACTORY,
}

_CONFIDENTIAL = "confidential guests are not offered by this build"

REFUSED: dict[str, dict[str, str]] = {
    "hypervisor": {
        "confidential_guest": _CONFIDENTIAL,
        "sev_snp_guest": _CONFIDENTIAL,
        "initdata": _CONFIDENTIAL,
        "image": "the guest boots from an initrd; set `initrd` instead of `image`",
        "extra_monitor_socket": "a second monitor would bypass the shim; remove the key",
        "firmware": "the kernel is booted directly (PVH); firmware is not used",
        "firmware_volume": "the kernel is booted directly (PVH); firmware is not used",
        "pflashes": "the kernel is booted directly (PVH); firmware is not used",
        "enable_iommu": "a virtual IOMMU is not offered yet",
        "enable_iommu_platform": "a virtual IOMMU is not offered yet",
        "enable_virtio_mem": "virtio-mem is not offered yet; memory grows by hot-plugged DIMMs",
        "enable_guest_swap": "guest swap is not offered yet",
        "enable_vhost_user_store": "vhost-user storage is not offered yet",
        "enable_numa": "NUMA mapping is not offered yet",
        "seccompsandbox": "QEMU's seccomp filter is set by the shim and can't be changed",
        "seccomp_sandbox": "QEMU's seccomp filter is set by the shim and can't be changed",
        "kernel_verity_params": "dm-verity images are not offered yet; the guest is an initrd",
        "virtio_fs_is_dax": "DAX is not offered yet",
        "disable_seccomp": "the VMM's seccomp filter stays on",
    },
    "agent": {
        "enable_tracing": "tracing is not offered yet",
        "policy": "the agent's policy engine is not offered yet",
    },
    "runtime": {
        "enable_tracing": "tracing is not offered yet",
        "enable_vcpus_pinning": "vCPU pinning is not offered yet",
        "guest_selinux_label": "SELinux in the guest is not offered yet",
        "shared_mounts": "mounts shared among containers are not offered yet",
    },
    "factory": {
        "enable_template": "VM templates are not offered yet",
        "vm_cache_number": "the VM cache is deprecated upstream and not offered",
        "boot_to_be_template": "VM templates are not offered yet",
        "boot_from_template": "VM templates are not offered yet",
    },
}
"""Key -> why its value can't be obeyed. Neutral values (false, "", 0, []) are accepted."""


WITHOUT_EFFECT: dict[str, dict[str, str]] = {
    "hypervisor": {
        "memory_slots": "the backend lays out as many slots as the maximum of memory needs",
        "virtio_fs_queue_size": "the backend chooses the queue's size",
        "entropy_source": "the guest's entropy comes from the host's urandom",
    },
    "agent": {
        "debug_console_enabled": "the guest image has no shell for a console",
        "reconnect_timeout_s": "a lost connection to the agent ends the sandbox",
        "log_port": "the agent logs to the guest's console",
        "container_pipe_size_bytes": "the agent's pipes have the kernel's size",
    },
    "runtime": {
        "disable_guest_empty_dir": "an emptyDir on disk is the host's in any case",
        "enable_pprof": "that is a profiler of Go programs",
        "enable_debug": "the shim's log has one level; containerd's own debug option adds to it",
        "keep_abnormal": "a VM that has failed is always taken down; its report stays",
        "experimental": "there are no experimental features",
        "kubelet_root_dir": "kubelet's volumes are known by their paths, wherever they lie",
    },
    "factory": {"template_path": "VM templates are not offered yet"},
}
"""Field -> why it changes nothing here. A value that is not the default is named in the log."""


WITHOUT_EFFECT_ON: dict[str, dict[str, str]] = {
    "acrn": {
        "machine_type": "ACRN has one type of machine",
        "vsock_daemon": "ACRN's guests have the host kernel's vsock",
        "enable_hugepages": "a guest's memory is of huge pages in any case",
        "enable_mem_prealloc": "a guest has all of its memory from the launch on",
        "default_maxvcpus": "a machine keeps the vCPUs that it was made with",
        "default_maxmemory_mib": "a machine keeps the memory that it was made with",
    },
    "cloud-hypervisor": {
        "machine_type": "Cloud Hypervisor has one type of machine",
        "vsock_daemon": "Cloud Hypervisor has a vsock device of its own",
        "disable_vhost_net": "Cloud Hypervisor moves packets itself",
    },
    "firecracker": {
        "machine_type": "Firecracker has one type of machine",
        "vsock_daemon": "Firecracker has a vsock device of its own",
        "disable_vhost_net": "Firecracker moves packets itself",
        "virtio_fs_daemon": "Firecracker has no shared file system",
        "virtio_fs_cache": "Firecracker has no shared file system",
    },
}
"""VMM -> what changes nothing with it, as in WITHOUT_EFFECT; fields of [hypervisor]."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


IDLE: dict[str, frozenset[str]] = {
    "hypervisor": _words("""
        rootfs_type vm_rootfs_driver machine_accelerators cpu_features valid_hypervisor_paths
        valid_virtio_fs_daemon_paths valid_entropy_sources valid_file_mem_backends
        file_mem_backend disable_nesting_checks default_bridges
        memory_offset reclaim_guest_freed_memory hugepage_type numa_mapping guest_swap_path
        guest_swap_size_percent guest_swap_create_threshold_secs virtio_fs_cache_size
        virtio_fs_extra_args virtio_fs_inode_file_handles hypervisor_loglevel valid_ctlpaths
        block_device_driver block_device_aio block_device_cache_set block_device_cache_direct
        block_device_cache_noflush block_device_logical_sector_size
        block_device_physical_sector_size disk_rate_limiter_bw_max_rate
        disk_rate_limiter_bw_one_time_burst disk_rate_limiter_ops_max_rate
        disk_rate_limiter_ops_one_time_burst enable_iothreads indep_iothreads queue_size num_queues
        msize_9p vhost_user_store_path valid_vhost_user_store_paths
        vhost_user_reconnect_timeout_sec disable_image_nvdimm hot_plug_vfio cold_plug_vfio
        hotplug_vfio_on_root_bus pcie_root_port pcie_switch_port rx_rate_limiter_max_rate
        tx_rate_limiter_max_rate net_rate_limiter_bw_max_rate net_rate_limiter_bw_one_time_burst
        net_rate_limiter_ops_max_rate net_rate_limiter_ops_one_time_burst guest_hook_path
        guest_memory_dump_path guest_memory_dump_paging disable_selinux disable_guest_selinux
        selinux_label use_legacy_serial prefetch_list_path default_gpus default_gpu_model
        enable_template tdx_quote_generation_service_socket_port jailer_path valid_jailer_paths
    """),
    "agent": _words("""
        dial_timeout_ms cdh_api_timeout cdh_api_timeout_ms passfd_listener_port
        health_check_request_timeout_ms mem_agent_enable
    """),
    "runtime": _words("""
        name hypervisor_name agent_name jaeger_endpoint jaeger_user jaeger_password vfio_mode
        emptydir_mode pod_resource_api_sock use_passfd_io experimental_force_guest_pull
        dan_conf
    """),
    "factory": _words("vm_cache_endpoint memory_path device_state_path"),
}  # fmt: skip
"""Keys that Kata's files carry and that change nothing here. `virtio_fs_extra_args` is one
on purpose: free-form arguments could take down the walls around a program that runs as root."""
