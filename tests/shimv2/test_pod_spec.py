"""CRI's description of a pod -> what its VM and its containers are made from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shimv2.bundle import Bundle, ContainerKind
from shimv2.errors import InvalidArgument
from shimv2.pb import cri_pod_sandbox_pb2 as cri
from shimv2.pod_spec import member_bundle, pod_bundle, pod_files
from shimv2.sizing import Limits, sandbox_limits

BUNDLE = Path("/run/pod")


def bundle_of(config: cri.PodSandboxConfig, **more: Any) -> Bundle:
    fields: dict[str, Any] = {"netns_path": "", "annotations": {}, **more}
    return pod_bundle(config, sandbox_id="p1", namespace="k8s.io", path=BUNDLE, **fields)


@pytest.mark.parametrize(
    ("parent", "path"),
    [
        ("", "/k8s.io/p1"),
        ("/kubepods/pod1", "/kubepods/pod1/p1"),
        ("/kubepods.slice/kubepods-pod1.slice", "kubepods-pod1.slice:cri-containerd:p1"),
    ],
)
def test_cgroup_is_below_the_pods_parent(parent: str, path: str) -> None:
    config = cri.PodSandboxConfig()
    config.linux.cgroup_parent = parent
    assert bundle_of(config).spec["linux"]["cgroupsPath"] == path


def test_limits_of_the_pod_size_its_vm_and_its_author_cannot_claim_them() -> None:
    config = cri.PodSandboxConfig(annotations={"io.kubernetes.cri.sandbox-memory": "1", "a": "b"})
    assert sandbox_limits(bundle_of(config).annotations) == Limits()
    config.linux.resources.cpu_quota = 150_000
    config.linux.resources.cpu_period = 100_000
    config.linux.resources.memory_limit_in_bytes = 1 << 30
    pod = bundle_of(config, annotations={"io.katacontainers.x": "y"})
    assert sandbox_limits(pod.annotations) == Limits(millicpus=1500, memory_bytes=1 << 30)
    assert (pod.annotations["a"], pod.annotations["io.katacontainers.x"]) == ("b", "y")


@pytest.mark.parametrize("path", ["relative", "/with\0null"])
def test_network_namespace_must_be_a_path(path: str) -> None:
    with pytest.raises(InvalidArgument, match="netns_path"):
        bundle_of(cri.PodSandboxConfig(), netns_path=path)


def test_without_dns_of_its_own_a_pod_has_the_hosts() -> None:
    config = cri.PodSandboxConfig(hostname="h")
    texts = pod_files(config, bundle_of(config), host_hosts="hosts", host_resolv_conf="host's")
    assert texts == {"hostname": "h\n", "hosts": "hosts", "resolv.conf": "host's"}


def test_container_keeps_mounts_and_sysctls_of_its_own() -> None:
    config = cri.PodSandboxConfig()
    config.linux.sysctls["net.a"] = "1"
    own = {"destination": "/etc/hosts", "type": "bind", "source": "/own"}
    volume = {"destination": "/dev/shm", "type": "bind", "source": "/empty-dir"}
    spec = {
        "root": {"path": "rootfs", "readonly": True},
        "mounts": [own, volume],
        "linux": {"sysctl": {"net.a": "2"}},
    }
    bundle = Bundle(
        container_id="m1", path=Path("/b"), spec=spec, kind=ContainerKind.MEMBER, sandbox_id="p1"
    )
    made = member_bundle(bundle, bundle_of(config)).spec
    assert made["mounts"][:2] == [own, volume]
    added = {mount["destination"]: mount for mount in made["mounts"][2:]}
    assert set(added) == {"/etc/hostname", "/etc/resolv.conf"}
    assert added["/etc/hostname"]["source"] == "/run/pod/hostname"
    assert added["/etc/hostname"]["options"][-1] == "ro"
    assert made["linux"]["sysctl"] == {"net.a": "2"}
    assert bundle.spec["mounts"] == [own, volume]
