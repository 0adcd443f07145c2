"""Pods over Kubernetes' CRI, as kubelet makes them, on a CNI network with IPv4 and IPv6."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.harness.crictl import Crictl


SERVE = "echo content > /tmp/index.html; exec httpd -f -h /tmp"
GET = "import sys, urllib.request as r; sys.stdout.buffer.write(r.urlopen(sys.argv[1]).read())"


def fetched(crictl: Crictl, container: str, url: str) -> str:
    """Fetch a page from inside of a container; its server may still be starting."""
    script = f"for i in $(seq 50); do wget -qO- {url} && break; sleep 0.2; done"
    return crictl.output(container, "sh", "-c", script)


@pytest.mark.smoke
def test_pod_of_two_containers_runs_execs_and_logs(crictl: Crictl) -> None:
    pod = crictl.run_pod(hostname="pod-of-two")
    assert crictl.pod_status(pod)["state"] == "SANDBOX_READY"
    web = crictl.run(pod, "sh", "-c", SERVE)
    job = crictl.run(pod, "sh", "-c", "hostname; echo to stderr >&2; exit 3")
    assert crictl.wait_exited(job) == 3
    assert crictl.logs(job).splitlines() == ["pod-of-two", "to stderr"]
    assert crictl.container_status(job)["reason"] == "Error"
    other = crictl.run(pod, "sleep", "1000")
    assert fetched(crictl, other, "http://127.0.0.1/") == "content\n"
    assert crictl.exec(web, "cat", stdin=b"to cat").stdout == "to cat"
    failed = crictl.exec(web, "sh", "-c", "exit 7", check=False)
    assert "command terminated with exit code 7" in failed.stderr
    assert crictl.exec(web, "echo", "probed", sync=True).stdout.strip() == "probed"
    assert crictl.exec(web, "false", sync=True, check=False).returncode != 0


@pytest.mark.smoke
def test_two_pods_reach_each_other_by_ipv4_and_ipv6(crictl: Crictl) -> None:
    first, second = crictl.run_pod(), crictl.run_pod()
    crictl.run(first, "sh", "-c", SERVE)
    client = crictl.run(second, "sleep", "1000")
    ipv4, ipv6 = crictl.addresses(first)
    for address in (ipv4, f"[{ipv6}]"):
        assert fetched(crictl, client, f"http://{address}/") == "content\n"


def test_ports_are_forwarded_to_what_listens_on_the_pods_loopback(crictl: Crictl) -> None:
    pod = crictl.run_pod()
    server = crictl.run(pod, "sh", "-c", f"{SERVE} -p 127.0.0.1:8080")
    assert fetched(crictl, server, "http://127.0.0.1:8080/") == "content\n"
    forward = crictl.node.popen(
        crictl.argv("port-forward", pod, "18080:8080", "18081:81"), stdout=subprocess.PIPE
    )
    assert forward.stdout is not None
    for port in ("18080", "18081"):  # one line for each, twice if ::1 is there, too
        while f"127.0.0.1:{port}".encode() not in forward.stdout.readline():
            assert forward.poll() is None
    get = [sys.executable, "-I", "-S", "-c", GET]
    for _ in range(3):
        assert crictl.node.run([*get, "http://127.0.0.1:18080/"]).stdout == "content\n"
    assert crictl.node.run([*get, "http://127.0.0.1:18081/"], check=False).returncode != 0
    forward.terminate()
    forward.wait(10)


def test_program_that_is_missing_is_a_start_error_and_the_pod_lives_on(crictl: Crictl) -> None:
    pod = crictl.run_pod()
    missing = crictl.create(pod, "/no/such/program")
    failed = crictl.call("start", missing, check=False)
    assert "/no/such/program" in failed.stderr
    status = crictl.container_status(missing)
    assert (status["state"], status["reason"]) == ("CONTAINER_EXITED", "StartError")
    crictl.call("rm", missing)
    job = crictl.run(pod, "sh", "-c", "exit 3")
    assert crictl.wait_exited(job) == 3
