"""Pods over Kubernetes' CRI, as kubelet makes them, on a CNI network with IPv4 and IPv6."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.harness.crictl import Crictl


@pytest.mark.smoke
def test_pod_of_two_containers_runs_execs_and_logs(crictl: Crictl) -> None:
    pod = crictl.run_pod(hostname="pod-of-two")
    assert crictl.pod_status(pod)["state"] == "SANDBOX_READY"
    web = crictl.run(pod, "sh", "-c", "echo content > /tmp/index.html; exec httpd -f -h /tmp")
    job = crictl.run(pod, "sh", "-c", "hostname; echo to stderr >&2; exit 3")
    assert crictl.wait_exited(job) == 3
    assert crictl.logs(job).splitlines() == ["pod-of-two", "to stderr"]
    assert crictl.container_status(job)["reason"] == "Error"
    other = crictl.run(pod, "sleep", "1000")
    assert crictl.output(other, "wget", "-qO-", "http://127.0.0.1/") == "content\n"
    assert crictl.exec(web, "cat", stdin=b"to cat").stdout == "to cat"
    failed = crictl.exec(web, "sh", "-c", "exit 7", check=False)
    assert "command terminated with exit code 7" in failed.stderr
    assert crictl.exec(web, "echo", "probed", sync=True).stdout.strip() == "probed"
    assert crictl.exec(web, "false", sync=True, check=False).returncode != 0


def test_two_pods_reach_each_other_by_ipv4_and_ipv6(crictl: Crictl) -> None:
    first, second = crictl.run_pod(), crictl.run_pod()
    command = ("sh", "-c", "echo content > /tmp/index.html; exec httpd -f -h /tmp")
    crictl.run(first, *command)
    client = crictl.run(second, "sleep", "1000")
    ipv4, ipv6 = crictl.addresses(first)
    for address in (ipv4, f"[{ipv6}]"):
        assert crictl.output(client, "wget", "-qO-", f"http://{address}/") == "content\n"
