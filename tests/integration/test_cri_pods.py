"""The shapes of pods over CRI: who runs beside whom, what they share, and how they come and go."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from tests.harness.ctr import KATA, RUNTIME, Terminal
from tests.harness.kubelet import PodVolumes
from tests.harness.patience import patient
from tests.harness.pod_network import SECOND_MTU

if TYPE_CHECKING:
    from tests.harness.crictl import Crictl
    from tests.harness.node import Node

SLEEP = ("sleep", "1000")
# Numbers of CRI's NamespaceMode.
POD, CONTAINER, NODE, TARGET = range(4)
#: How many pods come and go in the soak: 50 are for those who have half an hour.
SOAK = int(os.environ.get("KATA_TEST_SOAK", "6"))
_SIZE_LOOP = 'while [ "$(stty size)" != "{size}" ]; do :; done; echo "now {size}."\n'
_GET = "for i in $(seq 100); do busybox wget -qO- '{url}' && break; sleep 0.1; done"


@pytest.fixture
def volumes(node: Node) -> Iterator[PodVolumes]:
    volumes = PodVolumes(node)
    yield volumes
    volumes.remove()


def mounts(**sources: str) -> list[dict[str, str]]:
    """CRI's mounts of these directories of the node, each at `/NAME`."""
    return [{"host_path": path, "container_path": f"/{name}"} for name, path in sources.items()]


def namespaces(**options: Any) -> dict[str, Any]:
    """The `linux` part of a pod or container with these namespace options."""
    return {"security_context": {"namespace_options": options}}


def told(crictl: Crictl, container: str, script: str) -> str:
    return crictl.output(container, "sh", "-c", script)


def wait_for_log(crictl: Crictl, container: str, text: str) -> None:
    """Wait until this is the log of a container that runs, which arrives as it likes."""
    deadline = time.monotonic() + patient(30)
    while (log := crictl.logs(container)) != text:
        assert time.monotonic() < deadline, log


def wait_for_file(crictl: Crictl, container: str, path: str) -> None:
    """Wait for a file in the container, by ExecSync as hooks and probes are run."""
    script = f"until [ -e {path} ]; do usleep 20000; done"
    crictl.exec(container, "timeout", "30", "sh", "-c", script, sync=True)


def test_init_restarted_and_ephemeral_containers_live_in_one_pod(
    volumes: PodVolumes, crictl: Crictl
) -> None:
    data = mounts(data=volumes.empty_dir("data"))
    pod = crictl.run_pod()
    init = crictl.run(pod, "sh", "-c", "echo prepared > /data/file", mounts=data)
    assert crictl.wait_exited(init) == 0
    assert crictl.container_status(init)["reason"] == "Completed"
    script = "cat /data/file; echo app > /dev/shm/app; exec sleep 1000"
    app = crictl.run(pod, "sh", "-c", script, mounts=data)
    wait_for_file(crictl, app, "/dev/shm/app")
    wait_for_log(crictl, app, "prepared\n")

    restart_sidecar(volumes, crictl, pod)
    refused = crictl.call("start", init, check=False)  # one record is one run
    assert "CONTAINER_EXITED" in refused.stderr

    ephemeral = crictl.run(pod, "sh", stdin=True, tty=True, mounts=data)
    assert told(crictl, ephemeral, "cat /data/file /dev/shm/app") == "prepared\napp\n"
    shared = "readlink /proc/self/ns/ipc /proc/self/ns/uts /proc/self/ns/net; hostname"
    assert told(crictl, ephemeral, shared) == told(crictl, app, shared)
    own = "readlink /proc/self/ns/mnt"
    assert told(crictl, ephemeral, own) != told(crictl, app, own)
    crictl.call("stop", "-t", "0", ephemeral)
    crictl.call("rm", ephemeral)
    assert crictl.container_status(app)["state"] == "CONTAINER_RUNNING"
    assert crictl.pod_status(pod)["state"] == "SANDBOX_READY"


def restart_sidecar(volumes: PodVolumes, crictl: Crictl, pod: str) -> None:
    """Do what kubelet does when a sidecar ends: make the next attempt, drop the last one's record.

    Each attempt has a termination log of its own, and a user who is not root writes it.
    """
    last = ""
    for attempt in range(3):
        path = f"{volumes.directory}/containers/sidecar/5f3a9c0{attempt}"
        log = volumes.outside(path)
        log.parent.mkdir(parents=True, exist_ok=True)
        log.touch()
        log.chmod(0o666)
        end = "exec sleep 1000" if attempt == 2 else f"exit {attempt + 4}"
        sidecar = crictl.run(
            pod,
            "sh",
            "-c",
            f"echo attempt {attempt} | tee /dev/termination-log; {end}",
            metadata={"name": "sidecar", "attempt": attempt},
            log_path=f"sidecar-{attempt}.log",
            mounts=[{"host_path": path, "container_path": "/dev/termination-log"}],
            linux={"security_context": {"run_as_user": {"value": 1000}}},
        )
        if last:
            crictl.call("rm", last)
        last = sidecar
        if attempt < 2:
            assert crictl.wait_exited(sidecar) == attempt + 4
            assert log.read_text() == f"attempt {attempt}\n"
        wait_for_log(crictl, sidecar, f"attempt {attempt}\n")
    status = crictl.container_status(last)
    assert (status["state"], status["metadata"]["attempt"]) == ("CONTAINER_RUNNING", 2)


def test_processes_are_shared_as_the_pod_asks(crictl: Crictl) -> None:
    shared = namespaces(pid=POD)
    pod = crictl.run_pod(linux=shared)
    one = crictl.run(pod, "sleep", "1111", linux=shared)
    two = crictl.run(
        pod, "sh", "-c", "trap 'exit 6' USR1; while :; do sleep 0.1; done", linux=shared
    )
    seen = told(crictl, one, "ps -o pid,args")
    assert " 1 /pause" in seen
    assert "trap 'exit 6' USR1" in seen
    told(crictl, one, "kill -USR1 $(ps -o pid,args | awk '/tra[p] / {print $1}')")
    assert crictl.wait_exited(two) == 6
    assert "sleep 1111" in told(crictl, one, "ps -o args")
    crictl.remove_pod(pod)

    apart = namespaces(pid=CONTAINER)
    pod = crictl.run_pod(linux=apart)
    app = crictl.run(pod, "sleep", "1111", linux=apart)
    examining = namespaces(pid=TARGET, target_id=app)
    debugger = crictl.run(pod, "sleep", "2222", linux=examining)
    for container in (app, debugger):
        seen = told(crictl, container, "ps -o pid,args")
        assert " 1 sleep 1111" in seen
        assert "sleep 2222" in seen
    other = crictl.run(pod, "sleep", "3333", linux=apart)
    seen = told(crictl, other, "ps -o pid,args")
    assert " 1 sleep 3333" in seen
    assert "sleep 1111" not in seen


def test_people_attach_and_hooks_and_stops_reach_the_process(node: Node, crictl: Crictl) -> None:
    pod = crictl.run_pod()
    once = crictl.run(pod, "sh", "-c", "cat; echo end", stdin=True, stdin_once=True)
    attached(node, crictl, once, "hello")
    assert crictl.wait_exited(once) == 0
    assert crictl.logs(once) == "hello\nend\n"
    again = crictl.run(pod, "cat", stdin=True)
    for word in ("first", "second"):
        attached(node, crictl, again, word)
    wait_for_log(crictl, again, "first\nsecond\n")
    assert crictl.container_status(again)["state"] == "CONTAINER_RUNNING"

    shell = crictl.run(pod, "sh", stdin=True, tty=True)
    for verb, status in (("exec", 1), ("attach", 0)):
        program = ["sh"] if verb == "exec" else []
        argv = crictl.argv(verb, "-i", "-t", shell, *program)
        terminal = Terminal(node, argv, rows=33, columns=101)
        terminal.send("tty; " + _SIZE_LOOP.format(size="33 101"))
        terminal.expect("/dev/")
        terminal.expect("now 33 101.\n")
        terminal.resize(44, 132)
        terminal.send(_SIZE_LOOP.format(size="44 132"))
        terminal.expect("now 44 132.\n")
        terminal.send("exit 9\n")
        assert terminal.close() == status, verb
    assert crictl.wait_exited(shell) == 9

    # postStart and preStop are execs; then comes SIGTERM, and SIGKILL after the grace.
    script = "trap 'cat /tmp/hooks; exit 5' TERM; touch /tmp/ready; while :; do usleep 50000; done"
    polite = crictl.run(pod, "sh", "-c", script)
    crictl.exec(polite, "sh", "-c", "echo started >> /tmp/hooks", sync=True)
    wait_for_file(crictl, polite, "/tmp/ready")
    crictl.exec(polite, "sh", "-c", "echo stopping >> /tmp/hooks", sync=True)
    crictl.call("stop", "-t", "60", polite)
    assert crictl.wait_exited(polite) == 5
    assert crictl.logs(polite) == "started\nstopping\n"
    script = "trap 'echo heard' TERM; touch /tmp/ready; while :; do usleep 50000; done"
    stubborn = crictl.run(pod, "sh", "-c", script)
    wait_for_file(crictl, stubborn, "/tmp/ready")
    start = time.monotonic()
    crictl.call("stop", "-t", "2", stubborn)
    assert time.monotonic() - start >= 2
    assert crictl.wait_exited(stubborn) == 137
    assert crictl.logs(stubborn) == "heard\n"
    if RUNTIME == KATA:  # nobody waits for a process that cannot hear
        deaf = crictl.run(pod, *SLEEP)
        crictl.call("stop", "-t", "1000", deaf)
        assert crictl.wait_exited(deaf) == 137


def attached(node: Node, crictl: Crictl, container: str, word: str) -> None:
    """Attach, say a word that the container repeats, and go."""
    process = node.popen(
        crictl.argv("attach", "-i", container), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{word}\n".encode())
    process.stdin.flush()
    assert process.stdout.readline() == f"{word}\n".encode()
    process.stdin.close()
    process.stdout.close()
    process.wait(patient(30))


@pytest.mark.usefixtures("kata_only")
def test_pod_on_two_networks_is_reached_by_each_and_has_its_names_and_settings(
    node: Node, volumes: PodVolumes, crictl: Crictl
) -> None:
    crictl.handler = "kata-two"
    pod = crictl.run_pod(
        hostname="web-0",
        dns_config={
            "servers": ["10.96.0.10", "fd00:96::a"],
            "searches": ["tests.svc.cluster.local", "cluster.local"],
            "options": ["ndots:5"],
        },
        linux={"sysctls": {"net.core.somaxconn": "77", "kernel.shm_rmid_forced": "1"}},
    )
    web = crictl.run(pod, "sh", "-c", "echo page > /tmp/index.html; exec httpd -f -h /tmp")
    links = told(crictl, web, "ls /sys/class/net; cat /sys/class/net/eth1/mtu").split()
    assert links == ["eth0", "eth1", "lo", str(SECOND_MTU)]
    shown = told(crictl, web, "ip -o addr show scope global | awk '{print $2, $4}'").splitlines()
    addresses = [line.split()[1].partition("/")[0] for line in sorted(shown)]
    assert sorted(crictl.addresses(pod)) == sorted(addresses[:2])
    assert [address.partition(":" if ":" in address else ".")[0] for address in addresses] == [
        "10", "fd00", "10", "fd00",
    ]  # fmt: skip
    for address in addresses:
        url = f"http://[{address}]/" if ":" in address else f"http://{address}/"
        assert node.run(["sh", "-c", _GET.format(url=url)]).stdout == "page\n", address
    ping = "ping -q -c 1 -W 20"
    told(
        crictl,
        web,
        f"for a in 10.88.0.1 10.89.0.1 fd00:88::1 fd00:89::1; do {ping} $a || exit; done",
    )

    assert told(crictl, web, "hostname; cat /etc/hostname") == "web-0\nweb-0\n"
    assert told(crictl, web, "cat /etc/hosts") == node.path("/etc/hosts").read_text()
    assert told(crictl, web, "cat /etc/resolv.conf").splitlines() == [
        "search tests.svc.cluster.local cluster.local",
        "nameserver 10.96.0.10",
        "nameserver fd00:96::a",
        "options ndots:5",
    ]
    sysctls = told(crictl, web, "sysctl -n net.core.somaxconn kernel.shm_rmid_forced")
    assert sysctls.split() == ["77", "1"]
    # kubelet writes each pod's own hosts, with its hostAliases, and binds the file.
    hosts = f"{volumes.directory}/etc-hosts"
    node.write(hosts, "# Kubernetes-managed hosts file.\n127.0.0.1\tlocalhost\n127.0.0.1\tother\n")
    mount = {"host_path": hosts, "container_path": "/etc/hosts"}
    client = crictl.run(pod, *SLEEP, mounts=[mount])
    assert told(crictl, client, "wget -qO- http://other/") == "page\n"


@pytest.mark.usefixtures("kata_only")
def test_pod_without_a_network_has_its_loopback_only(crictl: Crictl) -> None:
    crictl.handler = "kata-none"
    pod = crictl.run_pod()
    container = crictl.run(pod, "sh", "-c", "echo here; exec sleep 1000")
    assert told(crictl, container, "ls /sys/class/net; ip route") == "lo\n"
    assert " 0% packet loss" in told(crictl, container, "ping -c 1 127.0.0.1; ping -c 1 ::1")
    failed = crictl.exec(container, "ping", "-c", "1", "10.88.0.1", check=False)
    assert "Network is unreachable" in failed.stderr + failed.stdout
    wait_for_log(crictl, container, "here\n")


@pytest.mark.usefixtures("kata_only")
def test_pod_that_wants_the_hosts_network_is_refused_with_the_fix(crictl: Crictl) -> None:
    done = crictl.try_run_pod(linux=namespaces(network=NODE))
    assert done.returncode != 0
    assert (
        "the host's network was asked for (no network namespace in the spec): a virtual machine "
        "cannot share it; run the pod without hostNetwork"
    ) in done.stderr
    assert crictl.call("pods", "-q").stdout == ""


@pytest.mark.timeout(300 + 60 * SOAK)
def test_pods_that_come_and_go_at_once_leave_nothing(crictl: Crictl) -> None:
    """The leak check of the fixture `node` follows. `KATA_TEST_SOAK=50` is the long form."""

    def come_and_go(number: int) -> None:
        pod = crictl.run_pod()
        job = crictl.create(pod, "sh", "-c", f"echo job {number}; exit {number % 7}")
        others = [crictl.create(pod, *SLEEP) for _ in range(2)]
        crictl.call("start", job, *others)
        assert crictl.wait_exited(job) == number % 7
        assert crictl.logs(job) == f"job {number}\n"
        assert crictl.output(others[1], "echo", str(number)) == f"{number}\n"
        crictl.call("stop", "-t", "0", others[0])
        crictl.call("rm", job, others[0])
        crictl.remove_pod(pod)  # with one that runs
        assert crictl.call("pods", "-q", "--id", pod).stdout == ""

    with ThreadPoolExecutor(max_workers=4 if SOAK >= 50 else 3) as pool:
        list(pool.map(come_and_go, range(SOAK)))
    assert crictl.call("ps", "-a", "-q").stdout == ""
