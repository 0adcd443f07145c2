"""The configuration as the rest of the shim sees it: frozen, typed, checked once.

Precedence, weakest first: the defaults below, the one configuration file with its drop-ins, and the
pod's annotations where the operator allows them (annotations.py). The files are Kata's, in the
spelling of either of its runtimes (config_schema.py). Host paths come from files alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from hypervisors.registry import DEFAULT_PROGRAMS, canonical_name
from shimv2 import annotations as pod_annotations
from shimv2 import config_schema
from shimv2.config_file import find, read_tables
from shimv2.config_keys import WITHOUT_EFFECT, WITHOUT_EFFECT_ON

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True, kw_only=True)
class HypervisorConfig:
    """What VM to make, and with which programs."""

    name: str = "qemu"
    path: Path = Path("/usr/bin/qemu-system-x86_64")
    kernel: Path = Path("/usr/share/kata-containers/vmlinux")
    initrd: Path | None = Path("/usr/share/kata-containers/initrd.img")
    guest_modules: Path | None = Path("/usr/share/kata-containers/modules")
    kernel_params: str = ""
    machine_type: str = "q35"
    accelerator: str = "auto"  # auto | kvm | tcg
    default_vcpus: float = 1.0  # negative: as many as the host has
    default_maxvcpus: int = 0  # 0: as many as the host has
    default_memory_mib: int = 2048
    default_maxmemory_mib: int = 0  # 0: as much as the host has
    overhead_vcpus: float = 0.0  # 0: default_vcpus; beside a limit of the containers
    overhead_memory_mib: int = 0  # 0: default_memory
    memory_slots: int = 10
    hotplug_ports: int = 8
    rootless: bool = True  # the VMM gets a user of its own, where root starts the shim
    enable_debug: bool = False
    shared_fs: str = "virtio-fs"  # virtio-fs | none
    virtio_fs_daemon: Path = Path("/usr/libexec/virtiofsd")
    virtio_fs_cache: str = "auto"  # auto | always | never | metadata
    virtio_fs_queue_size: int = 1024
    vsock_daemon: Path = Path("/usr/libexec/kata-shimv2/vhost-device-vsock")
    disable_block_device_use: bool = False
    rootfs_image_size_mib: int = 10240
    disable_vhost_net: bool = False
    enable_hugepages: bool = False
    enable_mem_prealloc: bool = False
    network_queues: int = 1
    entropy_source: Path = Path("/dev/urandom")
    enable_annotations: tuple[str, ...] = ()
    """Full-match patterns of annotation names that a pod may set; empty: none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentConfig:
    """How to meet the agent, and how long to wait for it."""

    dial_timeout_s: float = 45.0  # Source: Kata's default; also bounds the boot to readiness
    reconnect_timeout_s: float = 3.0
    create_container_timeout_s: float = 60.0  # Source: Kata's default (Go)
    request_timeout_s: float = 60.0  # Source: kata_agent.go defaultRequestTimeout
    readiness: str = "auto"  # auto | push | dial
    server_port: int = 1024
    log_port: int = 1025
    ready_port: int = 1030
    enable_debug: bool = False
    debug_console_enabled: bool = False
    kernel_modules: tuple[str, ...] = ()
    container_pipe_size_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeSection:
    """How the shim itself behaves."""

    internetworking_model: str = "tcfilter"  # tcfilter | macvtap | none
    disable_new_netns: bool = False
    disable_guest_seccomp: bool = False
    sandbox_cgroup_only: bool = True
    static_sandbox_resource_mgmt: bool = True
    disable_guest_empty_dir: bool = False
    sandbox_bind_mounts: tuple[str, ...] = ()
    enable_pprof: bool = False
    enable_debug: bool = False
    keep_abnormal: bool = False
    experimental: tuple[str, ...] = ()
    kubelet_root_dir: Path = Path("/var/lib/kubelet")


@dataclass(frozen=True, slots=True, kw_only=True)
class FactoryConfig:
    """VM templates; read so that files stay valid, not offered yet."""

    enable_template: bool = False
    template_path: Path = Path("/run/vc/vm/template")


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeConfig:
    """One sandbox's configuration. `warnings` are sentences for the log."""

    hypervisor: HypervisorConfig = field(default_factory=HypervisorConfig)
    agent: AgentConfig = field(default_factory=AgentConfig)
    runtime: RuntimeSection = field(default_factory=RuntimeSection)
    factory: FactoryConfig = field(default_factory=FactoryConfig)
    source: str = "built-in defaults"
    warnings: tuple[str, ...] = ()


def load_config(
    path: str | Path | None = None,
    annotations: Mapping[str, str] | None = None,
    *,
    variant: str = "",
) -> RuntimeConfig:
    """Return the configuration for a sandbox whose pod carries `annotations`.

    `path` is what the runtime options name (`runtimeoptions.v1.Options.config_path`); without one,
    the file of the runtime's `variant` is looked for, and without that KATA_CONF_FILE and the usual
    places. Only files that nobody but root can write are read. Raises `InvalidArgument` with file,
    key and a way out, `FailedPrecondition` if there is no file.
    """
    file = find(str(path) if path else None, variant=variant)
    settings = config_schema.Settings()
    for name, tables in read_tables(file):
        config_schema.apply(tables, name, settings)
    config = RuntimeConfig(
        hypervisor=_hypervisor(settings),
        agent=replace(AgentConfig(), **settings.of("agent")),
        runtime=replace(RuntimeSection(), **settings.of("runtime")),
        factory=replace(FactoryConfig(), **settings.of("factory")),
        source=file,
        warnings=tuple(settings.warnings),
    )
    return _naming_what_has_no_effect(_with_annotations(config, annotations or {}))


def _hypervisor(settings: config_schema.Settings) -> HypervisorConfig:
    given = dict(settings.of("hypervisor"))
    name = given["name"] = canonical_name(str(given.get("name", HypervisorConfig().name)))
    given.setdefault("path", Path(DEFAULT_PROGRAMS.get(name, f"/usr/bin/{name}")))
    return replace(HypervisorConfig(), **given)


def _naming_what_has_no_effect(config: RuntimeConfig) -> RuntimeConfig:
    defaults = RuntimeConfig()
    own = WITHOUT_EFFECT_ON.get(config.hypervisor.name, {})
    without = WITHOUT_EFFECT | {"hypervisor": WITHOUT_EFFECT["hypervisor"] | own}
    warnings = [
        f"{section}.{field} has no effect here: {reason}"
        for section, reasons in without.items()
        for field, reason in reasons.items()
        if getattr(getattr(config, section), field) != getattr(getattr(defaults, section), field)
    ]
    return replace(config, warnings=(*config.warnings, *warnings))


def _with_annotations(config: RuntimeConfig, annotations: Mapping[str, str]) -> RuntimeConfig:
    changes = pod_annotations.read(annotations, config.hypervisor.enable_annotations)
    hypervisor = dict(changes.of("hypervisor"))
    if "kernel_params" in hypervisor:
        # A pod adds to the operator's parameters; the kernel lets the last one win.
        joined = f"{config.hypervisor.kernel_params} {hypervisor['kernel_params']}".strip()
        hypervisor["kernel_params"] = joined
    return replace(
        config,
        hypervisor=replace(config.hypervisor, **hypervisor),
        agent=replace(config.agent, **changes.of("agent")),
        runtime=replace(config.runtime, **changes.of("runtime")),
        warnings=config.warnings + tuple(changes.warnings),
    )
