"""The agent's requests that make a sandbox and a container, from what the bundle says. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from agent_proto.pb import agent_pb2
from shimv2.bundle import Bundle, ContainerKind
from shimv2.errors import InvalidArgument
from shimv2.guest_spec import (
    GUEST_SHM,
    SHARED_DIRECTORY,
    guest_spec,
    pod_shm,
    sandbox_hostname,
    shares_sandbox_pid_namespace,
)
from shimv2.rootfs import SHARE_TAG

if TYPE_CHECKING:
    from shimv2.rootfs import GuestPaths

# Our agent's own; others pass it over. See guest/agent/src/pids.rs.
_PID_NAMESPACE_OF: Final = "kata-shimv2.pid-namespace-of"
# Source: Kata virtcontainers/kata_agent.go setupStorages: the pod's shm, and its size by CRI.
_SHM_OPTIONS: Final = ("noexec", "nosuid", "nodev", "mode=1777")
_SHM_BYTES: Final = 64 << 20


def sandbox_request(
    bundle: Bundle,
    dns: Sequence[str],
    kernel_modules: Sequence[str] = (),
    *,
    shm_bytes: int = 0,
    shares: bool = True,
) -> agent_pb2.CreateSandboxRequest:
    """Mount the share if there is one, and a pod's /dev/shm, which its containers have in common.

    `shm_bytes` is the size of the host's; 0 stands for the usual one. Each of `kernel_modules` is a
    name and its parameters, as in modprobe's command line.
    """
    storages = []
    if shares:
        storages.append(
            agent_pb2.Storage(
                driver="virtio-fs",
                source=SHARE_TAG,
                fstype="virtiofs",
                mount_point=f"{SHARED_DIRECTORY}/",
            )
        )
    if bundle.kind is ContainerKind.SANDBOX or pod_shm(bundle.spec) is not None:
        storages.append(
            agent_pb2.Storage(
                driver="ephemeral",
                source="shm",
                fstype="tmpfs",
                options=[*_SHM_OPTIONS, f"size={shm_bytes or _SHM_BYTES}"],
                mount_point=str(GUEST_SHM),
            )
        )
    return agent_pb2.CreateSandboxRequest(
        hostname=sandbox_hostname(bundle),
        dns=dns,
        storages=storages,
        sandbox_id=bundle.sandbox_id,
        kernel_modules=[
            agent_pb2.KernelModule(name=words[0], parameters=words[1:])
            for words in (module.split() for module in kernel_modules)
            if words
        ],
    )


def container_request(
    bundle: Bundle,
    paths: GuestPaths,
    *,
    terminal: bool,
    seccomp: bool,
    neighbours: Sequence[Bundle] = (),
) -> agent_pb2.CreateContainerRequest:
    """The container's spec as the guest runs it; `neighbours` are the containers that run.

    Raises:
        InvalidArgument: a part of config.json that can't be used.
    """
    request = agent_pb2.CreateContainerRequest(
        container_id=bundle.container_id,
        exec_id=bundle.container_id,
        OCI=guest_spec(
            bundle,
            guest_root=paths.root,
            sources=paths.sources,
            hosts_read_only=paths.hosts_read_only,
            terminal=terminal,
            seccomp=seccomp,
        ),
        storages=paths.storages,
        devices=paths.devices,
        sandbox_pidns=shares_sandbox_pid_namespace(bundle.spec),
    )
    request.OCI.Annotations.pop(_PID_NAMESPACE_OF, None)
    if target := _process_target(bundle, neighbours):
        request.OCI.Annotations[_PID_NAMESPACE_OF] = target
    return request


def _process_target(bundle: Bundle, neighbours: Sequence[Bundle]) -> str:
    """The one container whose processes a container is to see; empty: its pod's, or its own.

    A specification names the process namespace by a pid of the host, and the VMM's stands for all
    of a VM's processes. But either all containers of a pod share one, or each has its own: where
    somebody has its own, it is meant.
    """
    if not shares_sandbox_pid_namespace(bundle.spec):
        return ""
    alone = [
        one.container_id
        for one in neighbours
        if one.kind is ContainerKind.MEMBER and not shares_sandbox_pid_namespace(one.spec)
    ]
    if len(alone) > 1:
        raise InvalidArgument(
            f"container {bundle.container_id} asks for the processes of another container, and "
            f"{len(alone)} run in this VM, which cannot be told apart by a pid of the host; leave "
            "the target out (kubectl debug without --target), or set shareProcessNamespace"
        )
    return alone[0] if alone else ""
