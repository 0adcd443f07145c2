"""Which annotations of a pod may change its VM: one registry, everything else is denied.

A pod's author is not the operator. So an annotation counts only if (1) it is in the registry with a
type and a range, and (2) the operator's `enable_annotations` names it: `default_vcpus` for
`io.katacontainers.config.hypervisor.default_vcpus`, `runtime.create_container_timeout` or
`agent.container_pipe_size` for the other two groups, which Kata's
runtimes let through ungated. No annotation carries a host path or an argument of a program.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shimv2.config_schema import Key, Settings, check_value
from shimv2.errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

PREFIX = "io.katacontainers.config."
_MAX_VALUE = 4096

REGISTRY: dict[str, tuple[str, Key]] = {
    "hypervisor.default_vcpus": ("hypervisor", Key("default_vcpus", "number", 0.01, 256)),
    "hypervisor.default_max_vcpus": ("hypervisor", Key("default_maxvcpus", "int", 1, 256)),
    "hypervisor.default_memory": ("hypervisor", Key("default_memory_mib", "int", 128, 4 << 20)),
    "hypervisor.memory_slots": ("hypervisor", Key("memory_slots", "int", 0, 256)),
    "hypervisor.kernel_params": ("hypervisor", Key("kernel_params", "text")),
    "hypervisor.enable_hugepages": ("hypervisor", Key("enable_hugepages", "bool")),
    "hypervisor.enable_mem_prealloc": ("hypervisor", Key("enable_mem_prealloc", "bool")),
    "hypervisor.disable_vhost_net": ("hypervisor", Key("disable_vhost_net", "bool")),
    "hypervisor.disable_block_device_use": ("hypervisor", Key("disable_block_device_use", "bool")),
    "hypervisor.virtio_fs_cache": (
        "hypervisor",
        Key("virtio_fs_cache", "choice", choices=("auto", "always", "never", "metadata")),
    ),
    "hypervisor.network_queues": ("hypervisor", Key("network_queues", "int", 1, 16)),
    "agent.container_pipe_size": ("agent", Key("container_pipe_size_bytes", "int", 0, 1 << 20)),
    "runtime.create_container_timeout": (
        "agent",
        Key("create_container_timeout_s", "number", 1, 3600),
    ),
    "runtime.disable_guest_seccomp": ("runtime", Key("disable_guest_seccomp", "bool")),
    "runtime.internetworking_model": (
        "runtime",
        Key("internetworking_model", "choice", choices=("tcfilter", "macvtap", "none")),
    ),
}
"""Name below `io.katacontainers.config.` -> (section, key)."""

# What decides who runs as what inside the guest stays with the operator.
_DENIED_PARAMETERS = ("agent.", "kata.", "systemd.", "rd.")
_DENIED_WORDS = frozenset({"init", "rdinit", "root", "module_blacklist", "initcall_blacklist"})


def read(annotations: Mapping[str, str], enabled: Sequence[str]) -> Settings:
    """Return what the annotations change, given the operator's patterns.

    An unknown annotation is ignored with a warning: it may be meant for another version. Raises
    `InvalidArgument` for a known one that isn't enabled, or whose value is out of its range.
    """
    changes = Settings()
    for full_name in sorted(annotations):
        if not full_name.startswith(PREFIX):
            continue
        name = full_name.removeprefix(PREFIX)
        if name not in REGISTRY:
            changes.warnings.append(f"annotation {full_name} is not known and was ignored")
            continue
        if not _is_enabled(name, enabled):
            raise InvalidArgument(
                f"annotation {full_name} is not enabled; the operator can allow it by "
                f"adding {gate_name(name)!r} to enable_annotations"
            )
        section, key = REGISTRY[name]
        value = _value(key, annotations[full_name], f"annotation {full_name}")
        changes.of(section)[key.field] = value
    return changes


def gate_name(name: str) -> str:
    """Return the name by which `enable_annotations` allows an annotation."""
    return name.removeprefix("hypervisor.")


def _is_enabled(name: str, enabled: Sequence[str]) -> bool:
    import re

    for pattern in enabled:
        try:
            if re.fullmatch(pattern, gate_name(name)):
                return True
        except re.error as error:
            raise InvalidArgument(f"enable_annotations: {pattern!r}: {error}") from error
    return False


def _value(key: Key, text: str, where: str) -> object:
    if len(text) > _MAX_VALUE:
        raise InvalidArgument(f"{where} is longer than {_MAX_VALUE} characters")
    if key.kind == "bool":
        if text.lower() not in ("true", "false"):
            raise InvalidArgument(f"{where} must be true or false, not {text!r}")
        return text.lower() == "true"
    if key.kind in ("int", "number"):
        try:
            number = float(text)
        except ValueError:
            raise InvalidArgument(f"{where} must be a number, not {text!r}") from None
        return check_value(key, number, where)
    if key.field == "kernel_params":
        _refuse_parameters(text, where)
    return check_value(key, text, where)


def _refuse_parameters(text: str, where: str) -> None:
    if not text.isprintable():
        raise InvalidArgument(f"{where} has characters that are no part of a kernel command line")
    for parameter in text.split():
        name = parameter.partition("=")[0].strip("\"'")
        if name in _DENIED_WORDS or name.startswith(_DENIED_PARAMETERS) or name == "--":
            raise InvalidArgument(f"{where}: {name!r} can be set by the operator only")
