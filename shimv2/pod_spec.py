"""A pod without a container of its own: CRI's PodSandboxConfig -> what a VM is made from. Pure.

In the ordinary mode containerd describes the pod by the OCI spec of its pause container, and lays
out the files that all containers have in common. With `sandboxer = "shim"` it does neither, so the
same things are derived here. Source: containerd internal/cri/server/podsandbox.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from shimv2.bundle import Bundle, ContainerKind, JsonObject
from shimv2.errors import InvalidArgument, Unimplemented
from shimv2.guest_spec import sandbox_hostname, shares_sandbox_pid_namespace
from shimv2.pb import cri_pod_sandbox_pb2 as cri
from shimv2.sizing import CPU_PERIOD, CPU_QUOTA, MEMORY

if TYPE_CHECKING:
    from google.protobuf.any_pb2 import Any

CONFIG_TYPE: Final = "runtime.v1.PodSandboxConfig"
HOSTNAME, HOSTS, RESOLV_CONF = "hostname", "hosts", "resolv.conf"
# What containerd says of a pod, and a pod's author must not.
_RESERVED: Final = "io.kubernetes.cri."
_SHM: Final = "/dev/shm"


def pod_config(options: Any) -> cri.PodSandboxConfig:
    """What CRI asks for; an empty one if somebody else than CRI does.

    Raises:
        InvalidArgument: what says that it is CRI's is not.
    """
    if options.type_url.rpartition("/")[2] != CONFIG_TYPE:
        return cri.PodSandboxConfig()
    try:
        return cri.PodSandboxConfig.FromString(options.value)
    except Exception as exc:
        raise InvalidArgument(f"the sandbox's options are no {CONFIG_TYPE}") from exc


def pod_bundle(
    config: cri.PodSandboxConfig,
    *,
    sandbox_id: str,
    namespace: str,
    path: Path,
    netns_path: str,
    annotations: Mapping[str, str],
) -> Bundle:
    """Describe the pod as a sandbox container's bundle would; there is nothing to run in it.

    Raises:
        InvalidArgument: a network namespace's path that is none.
    """
    if netns_path and ("\0" in netns_path or not netns_path.startswith("/")):
        raise InvalidArgument(f"netns_path {netns_path[:200]!r} is not an absolute path")
    linux: JsonObject = {
        "namespaces": _namespaces(config, netns_path),
        "cgroupsPath": _cgroups_path(config.linux.cgroup_parent, sandbox_id, namespace),
        "sysctl": dict(config.linux.sysctls),
    }
    resolv_conf = {"destination": f"/etc/{RESOLV_CONF}", "type": "bind"}
    spec: JsonObject = {
        "hostname": config.hostname,
        "mounts": [{**resolv_conf, "source": str(path / RESOLV_CONF), "options": ["rbind", "ro"]}],
        "linux": linux,
        "annotations": {
            **_authors(config.annotations),
            **_authors(annotations),
            **_limits(config.linux.resources),
        },
    }
    return Bundle(
        container_id=sandbox_id,
        path=path,
        spec=spec,
        kind=ContainerKind.SANDBOX,
        sandbox_id=sandbox_id,
    )


def pod_files(
    config: cri.PodSandboxConfig, pod: Bundle, *, host_hosts: str, host_resolv_conf: str
) -> dict[str, str]:
    """The texts of the files in /etc that a pod's containers have in common, by name."""
    resolv_conf = host_resolv_conf
    if config.HasField("dns_config"):
        resolv_conf = _resolv_conf(config.dns_config)
    return {
        HOSTNAME: f"{sandbox_hostname(pod)}\n",
        HOSTS: host_hosts,
        RESOLV_CONF: resolv_conf,
    }


def member_bundle(bundle: Bundle, pod: Bundle, neighbours: Collection[Bundle] = ()) -> Bundle:
    """A container's bundle with what it has of its pod: files, /dev/shm, sysctls.

    Raises:
        Unimplemented: it is to share a process namespace, and not that of one of `neighbours`,
            the containers that run.
    """
    sharing = shares_sandbox_pid_namespace
    if sharing(bundle.spec) and all(sharing(each.spec) for each in neighbours):
        raise Unimplemented(
            f"container {bundle.container_id}: a process namespace that all containers share is "
            'that of the pod\'s pause container, and sandboxer = "shim" makes none; let the '
            "container have its own (Kubernetes: shareProcessNamespace: false), or use "
            'sandboxer = "podsandbox"'
        )
    mounts = [mount for mount in bundle.spec.get("mounts") or [] if not _is_own_shm(mount)]
    taken = {mount.get("destination") for mount in mounts}
    mode = "ro" if bundle.spec["root"].get("readonly") else "rw"
    for destination, name, access in (
        (f"/etc/{HOSTNAME}", HOSTNAME, mode),
        (f"/etc/{HOSTS}", HOSTS, mode),
        (f"/etc/{RESOLV_CONF}", RESOLV_CONF, mode),
        (_SHM, "shm", "rw"),  # the guest's: no such directory is on the host
    ):
        if destination not in taken:
            options = ["rbind", "rprivate", access]
            source = str(pod.path / name)
            mounts.append(
                {"destination": destination, "type": "bind", "source": source, "options": options}
            )
    linux = dict(bundle.spec.get("linux") or {})
    # No pause container has set them; writing one again changes nothing.
    linux["sysctl"] = {**pod.spec["linux"]["sysctl"], **(linux.get("sysctl") or {})}
    return replace(bundle, spec={**bundle.spec, "mounts": mounts, "linux": linux})


def _is_own_shm(mount: JsonObject) -> bool:
    return mount.get("destination") == _SHM and mount.get("type") == "tmpfs"


def _namespaces(config: cri.PodSandboxConfig, netns_path: str) -> list[JsonObject]:
    if netns_path:
        return [{"type": "network", "path": netns_path}]
    is_hosts = config.linux.security_context.namespace_options.network == cri.NODE
    return [] if is_hosts else [{"type": "network"}]


def _cgroups_path(parent: str, sandbox_id: str, namespace: str) -> str:
    leaf = parent.rstrip("/").rpartition("/")[2]
    if leaf.endswith(".slice"):
        return f"{leaf}:cri-containerd:{sandbox_id}"
    return f"{parent.rstrip('/') or f'/{namespace}'}/{sandbox_id}"


def _authors(annotations: Mapping[str, str]) -> dict[str, str]:
    return {k: v for k, v in annotations.items() if not k.startswith(_RESERVED)}


def _limits(resources: cri.LinuxContainerResources) -> dict[str, str]:
    values = {
        CPU_PERIOD: resources.cpu_period,
        CPU_QUOTA: resources.cpu_quota,
        MEMORY: resources.memory_limit_in_bytes,
    }
    return {name: str(value) for name, value in values.items() if value}


def _resolv_conf(dns: cri.DNSConfig) -> str:
    lines = [f"search {' '.join(dns.searches)}"] if dns.searches else []
    lines += [f"nameserver {server}" for server in dns.servers]
    lines += [f"options {' '.join(dns.options)}"] if dns.options else []
    return "".join(f"{line}\n" for line in lines)
