"""Pods without a pause container: containerd 2.x with `sandboxer = "shim"`, over CRI."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

import pytest

from tests.harness.node import CRI_NAMESPACE
from tests.harness.parts import VMM, find_one, find_shims
from tests.harness.patience import patient
from tests.integration.test_cri import GET, SERVE, fetched

if TYPE_CHECKING:
    from tests.harness.crictl import Crictl
    from tests.harness.ctr import Ctr

pytestmark = pytest.mark.usefixtures("kata_only")

_POLL_S = 0.2
_OWN_PIDS = {"linux": {"security_context": {"namespace_options": {"pid": 1}}}}


@pytest.fixture
def pods(crictl: Crictl) -> Crictl:
    """`crictl` with the handler of the Sandbox API."""
    if crictl.node.version.major < 2:
        pytest.skip("containerd 1.6 has no Sandbox API")
    crictl.handler = "kata-sandbox"
    return crictl


def wait_not_ready(pods: Crictl, pod: str) -> None:
    """Wait for the state. While containerd cleans up after a shim, the answer is an error."""
    deadline = time.monotonic() + patient(10)
    while "SANDBOX_NOTREADY" not in (told := pods.call("inspectp", pod, check=False)).stdout:
        assert time.monotonic() < deadline, told
        time.sleep(_POLL_S)  # as kubelet does


def test_pod_without_a_pause_container_runs_what_a_pod_runs(pods: Crictl) -> None:
    pod = pods.run_pod(
        hostname="no-pause",
        dns_config={"servers": ["192.0.2.53"], "searches": ["pods.test"], "options": ["ndots:5"]},
        linux={"sysctls": {"kernel.msgmax": "9000"}},
    )
    assert pods.pod_status(pod)["state"] == "SANDBOX_READY"
    shares_pids = pods.create(pod, "true")
    refused = pods.call("start", shares_pids, check=False)
    assert "shareProcessNamespace: false" in refused.stderr
    web = pods.run(pod, "sh", "-c", SERVE, **_OWN_PIDS)
    script = (
        "hostname; cat /etc/hostname /etc/resolv.conf; grep -c localhost /etc/hosts;"
        "cat /proc/sys/kernel/msgmax; echo shared >/dev/shm/file; echo to stderr >&2; exit 3"
    )
    job = pods.run(pod, "sh", "-c", script, **_OWN_PIDS)
    assert pods.wait_exited(job) == 3
    lines = pods.logs(job).splitlines()
    assert lines[:5] == [
        "no-pause", "no-pause", "search pods.test", "nameserver 192.0.2.53", "options ndots:5",
    ]  # fmt: skip
    assert int(lines[5]) > 0
    assert lines[6:] == ["9000", "to stderr"]
    assert pods.output(web, "cat", "/dev/shm/file") == "shared\n"
    assert pods.exec(web, "cat", stdin=b"to cat").stdout == "to cat"
    assert pods.exec(web, "false", sync=True, check=False).returncode != 0
    assert fetched(pods, web, "http://127.0.0.1/") == "content\n"
    get = [sys.executable, "-I", "-S", "-c", GET, f"http://{pods.addresses(pod)[0]}/"]
    assert pods.node.run(get).stdout == "content\n"
    tasks = pods.node.run(["ctr", "-n", CRI_NAMESPACE, "tasks", "ls", "-q"]).stdout.split()
    assert web in tasks
    assert pod not in tasks
    looks_at = {"security_context": {"namespace_options": {"pid": 3, "target_id": web}}}
    debugger = pods.run(pod, "cat", "/proc/1/cmdline", linux=looks_at)
    assert pods.wait_exited(debugger) == 0
    assert pods.logs(debugger).startswith("httpd")
    pods.call("stopp", pod)
    assert pods.pod_status(pod)["state"] == "SANDBOX_NOTREADY"
    assert not pods.node.find(VMM)
    pods.call("stopp", pod)
    pods.call("rmp", pod)


def test_killed_vm_of_such_a_pod_is_noticed_also_after_containerds_restart(pods: Crictl) -> None:
    pod = pods.run_pod()
    container = pods.run(pod, "sleep", "1000", **_OWN_PIDS)
    pods.node.containerd.restart()
    assert pods.pod_status(pod)["state"] == "SANDBOX_READY"
    assert pods.output(container, "echo", "alive") == "alive\n"
    pods.node.signal(find_one(pods.node, VMM).pid, "KILL")
    assert pods.wait_exited(container) == 137
    wait_not_ready(pods, pod)
    info = pods.json("inspectp", pod)["info"]
    assert "SIGKILL" in str(info)


def test_killed_shim_of_such_a_pod_leaves_nothing(pods: Crictl, ctr: Ctr) -> None:
    pod = pods.run_pod()
    container = pods.run(pod, "sleep", "1000", **_OWN_PIDS)
    (shim,) = find_shims(ctr)
    pods.node.signal(shim.pid, "KILL")
    wait_not_ready(pods, pod)
    assert pods.wait_exited(container) != 0
    pods.call("stopp", pod)
    pods.call("rmp", pod)
