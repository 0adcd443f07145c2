"""nerdctl: its hooks make the network, its logger takes the output, its users expect Docker's ways.

With KATA_TEST_RUNTIME=io.containerd.runc.v2 the same expectations are those that runc meets.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest

from tests.harness.ctr import KATA, RUNTIME, Ctr, Terminal, fresh_id
from tests.harness.nerdctl import Nerdctl, NerdctlMissing
from tests.harness.oci_image import BUSYBOX_IMAGE, PAUSE_IMAGE
from tests.harness.parts import find_shims
from tests.harness.patience import patient

if TYPE_CHECKING:
    from tests.harness.node import Node

_SERVE = "mkdir -p /www; echo page > /www/index.html; echo started; exec httpd -f -p 80 -h /www"
_COMPOSE = f"""
services:
  web:
    image: {BUSYBOX_IMAGE}
    runtime: {RUNTIME}
    command: sh -c "echo from the web > /tmp/index.html; exec httpd -f -p 80 -h /tmp"
  client:
    image: {BUSYBOX_IMAGE}
    runtime: {RUNTIME}
    command: sleep 1000
    depends_on: [web]
"""


@pytest.fixture
def nerdctl(node: Node, ctr: Ctr) -> Iterator[Nerdctl]:
    """nerdctl on the node; containers and networks are removed after the test."""
    try:
        made = Nerdctl(node)
    except NerdctlMissing as missing:
        pytest.skip(str(missing))
    yield made
    made.remove_everything()


def soon(ask: Callable[[], str], wanted: str, deadline_s: float = 20) -> str:
    """Ask until the answer has `wanted` in it: that a server listens, no event tells."""
    deadline = time.monotonic() + patient(deadline_s)
    while wanted not in (answer := ask()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert wanted in answer
    return answer


def test_a_server_from_run_to_rm(node: Node, nerdctl: Nerdctl) -> None:
    name = fresh_id("web")
    limits = ["--memory", "128m", "--cpus", "1", "-e", "WHO=me"]
    ports = ["-p", "18080:80"]
    nerdctl("run", "-d", "--name", name, *ports, *limits, BUSYBOX_IMAGE, "sh", "-c", _SERVE)

    def fetch(address: str, port: int = 80) -> str:
        command = ["busybox", "nc", "-w", "5", address, str(port)]
        return node.run(command, check=False, stdin=b"GET / HTTP/1.0\r\n\r\n").stdout

    soon(lambda: fetch("127.0.0.1", 18080), "page")
    address = nerdctl.address(name)
    assert "page\n" in fetch(address)
    assert nerdctl.inspect(name)["State"]["Status"] == "running"
    soon(lambda: nerdctl("logs", name).stdout, "started")

    inside = nerdctl("exec", name, "sh", "-c", "ip addr show eth0; echo $WHO; cat /etc/hosts")
    assert f"{address}/24" in inside.stdout
    assert "\nme\n" in inside.stdout
    assert re.search(rf"^{address}\s.*{name}", inside.stdout, re.MULTILINE)
    failed = nerdctl("exec", name, "sh", "-c", "exit 5", check=False)
    assert "exec failed with exit code 5" in failed.stderr
    terminal = Terminal(node, nerdctl.argv("exec", "-it", name, "sh"))
    terminal.send("tty; stty size; exit 6\n")
    terminal.expect("/dev/pts/")
    terminal.expect("24 80")
    terminal.expect("exec failed with exit code 6")
    terminal.close()

    usage = nerdctl("stats", "--no-stream", "--format", "{{.MemUsage}} {{.NetIO}}", name).stdout
    assert "/ 128MiB" in usage
    assert "0B / 0B" not in usage
    nerdctl("pause", name)
    assert nerdctl.inspect(name)["State"]["Status"] == "paused"
    nerdctl("unpause", name)
    assert "page\n" in fetch(address)

    # nerdctl looks for a running container's files below /proc/<pid>/root. A VMM has none there.
    into = nerdctl("cp", "/etc/hostname", f"{name}:/etc/copied", check=False)
    assert (into.returncode == 0) == (RUNTIME != KATA), into
    assert not node.path("/etc/copied").exists()
    nerdctl("stop", "-t", "1", name)
    assert nerdctl.inspect(name)["State"]["Status"] == "exited"
    nerdctl("cp", "/etc/hostname", f"{name}:/www/copied")
    nerdctl("cp", f"{name}:/www/index.html", "/tmp/copied")
    assert node.path("/tmp/copied").read_text() == "page\n"
    node.path("/tmp/copied").unlink()
    nerdctl("start", name)
    soon(lambda: fetch("127.0.0.1", 18080), "page")
    assert nerdctl("exec", name, "cat", "/www/copied").stdout
    nerdctl("restart", "-t", "1", name)
    soon(lambda: fetch(nerdctl.address(name)), "page")
    nerdctl("rm", "-f", name)
    assert fetch("127.0.0.1", 18080) == ""
    assert nerdctl.held_addresses("bridge") == []


def test_run_passes_status_terminal_and_volumes(node: Node, nerdctl: Nerdctl) -> None:
    node.write("/tmp/volume/there", "from the node\n")
    script = "cat /v/there; echo back > /v/here; echo kept > /n/file; hostname; exit 7"
    volumes = ["-v", "/tmp/volume:/v", "-v", "named:/n", "--hostname", "chosen"]
    try:
        done = nerdctl("run", "--rm", *volumes, BUSYBOX_IMAGE, "sh", "-c", script, check=False)
        assert (done.returncode, done.stdout) == (7, "from the node\nchosen\n")
        assert node.path("/tmp/volume/here").read_text() == "back\n"
    finally:
        node.run(["rm", "-r", "/tmp/volume"])
    terminal = Terminal(
        node,
        nerdctl.argv("run", "--rm", "-it", "--net", "none", "-v", "named:/n", BUSYBOX_IMAGE, "sh"),
    )
    terminal.send("tty; cat /n/file; ip -o link | wc -l; exit 3\n")
    terminal.expect("/dev/pts/")
    terminal.expect("kept\n1\n")
    assert terminal.close() == 3
    nerdctl("volume", "rm", "named")


def test_containers_of_a_user_network_reach_each_other_by_address_and_name(
    nerdctl: Nerdctl,
) -> None:
    network, server = fresh_id("net"), fresh_id("server")
    nerdctl("network", "create", "--subnet", "10.97.0.0/24", network)
    on = ["--net", network]
    nerdctl("run", "-d", "--name", server, *on, BUSYBOX_IMAGE, "sh", "-c", _SERVE)
    address = nerdctl.address(server)
    assert address.startswith("10.97.0.")
    # The server has booted long before its client, and answers ARP at once.
    script = f"ping -c 2 -W 5 {address} && wget -qO- http://{server}/"
    done = nerdctl("run", "--rm", *on, BUSYBOX_IMAGE, "sh", "-c", script)
    assert " 0% packet loss" in done.stdout
    assert done.stdout.endswith("page\n")
    if RUNTIME == KATA:
        refused = nerdctl.run("--rm", "--net", f"container:{server}", command=["true"])
        assert "another one has it; containers share a network only in one pod" in refused.stderr
        refused = nerdctl.run("--rm", "--net", "host", command=["true"])
        assert "the host's network was asked for" in refused.stderr


@pytest.mark.parametrize("driver", ["macvlan", "ipvlan"])
def test_container_has_the_link_of_its_network_s_driver(
    node: Node, nerdctl: Nerdctl, driver: str
) -> None:
    made = node.run(["ip", "link", "add", "ktlower", "type", "dummy"], check=False)
    if made.returncode:
        node.run(["ip", "link", "add", "ktlower", "type", "veth", "peer", "name", "ktupper"])
    try:
        probe = ["ip", "link", "add", "link", "ktlower", "name", "ktprobe", "type", driver]
        if node.run(probe, check=False).returncode:
            pytest.skip(f"the machine's kernel has no {driver}: runc has no such network either")
        node.run(["ip", "link", "delete", "ktprobe"])
        network = fresh_id("net")
        options = ["--subnet", "10.96.0.0/24", "-o", "parent=ktlower"]
        nerdctl("network", "create", "-d", driver, *options, network)
        done = nerdctl("run", "--rm", "--net", network, BUSYBOX_IMAGE, "ip", "addr", "show", "eth0")
        assert " 10.96.0." in done.stdout
        nerdctl("network", "rm", network)
    finally:
        node.run(["ip", "link", "delete", "ktlower"])


def test_services_of_a_compose_file_find_each_other(node: Node, nerdctl: Nerdctl) -> None:
    node.write("/tmp/project/compose.yaml", _COMPOSE)
    compose = ("compose", "-f", "/tmp/project/compose.yaml")
    try:
        nerdctl(*compose, "up", "-d", timeout_s=120)
        ask = (*compose, "exec", "-T", "client", "wget", "-qO-", "http://web/")
        soon(lambda: nerdctl(*ask, check=False).stdout, "from the web")
    finally:
        nerdctl(*compose, "down", "-t", "1", check=False)
        node.run(["rm", "-r", "/tmp/project"])


@pytest.mark.usefixtures("kata_only")
def test_killed_shim_leaves_neither_address_nor_namespace(
    node: Node, ctr: Ctr, nerdctl: Nerdctl
) -> None:
    name = fresh_id("killed")
    nerdctl("run", "-d", "--name", name, BUSYBOX_IMAGE, "sleep", "1000")
    assert nerdctl.held_addresses("bridge") == [nerdctl.address(name)]
    (shim,) = find_shims(ctr)
    node.signal(shim.pid, "KILL")
    # The hooks of `delete` have given the address back; the link went with the namespace.
    deadline = time.monotonic() + 20
    while nerdctl.held_addresses("bridge") and time.monotonic() < deadline:
        time.sleep(0.1)  # containerd tells nobody that `delete` has ended
    assert nerdctl.held_addresses("bridge") == []
    assert "veth" not in node.run(["ip", "-o", "link"]).stdout


@pytest.mark.usefixtures("kata_only")
def test_interfaces_that_docker_makes_after_create_come_and_go(node: Node, ctr: Ctr) -> None:
    """Docker from 26 on: no hook, no path; it works on the namespace of the task's pid."""
    container = fresh_id("docker")
    docker = ["ctr", "-n", "moby"]
    node.import_images("moby")
    run = ["run", "-d", "--null-io", "--runtime", RUNTIME, "--cgroup", f"/{node.name}/{container}"]
    try:
        node.run([*docker, *run, BUSYBOX_IMAGE, container, "sleep", "1000"])
        pid = node.run([*docker, "task", "ls"]).stdout.splitlines()[1].split()[1]
        enter = f"nsenter -t {pid} -n"
        node.run(["sh", "-ec", f"""
            ip link add ktdocker type veth peer name eth0 netns {pid}
            ip link set ktdocker up; ip addr add 10.95.0.1/24 dev ktdocker
            {enter} ip addr add 10.95.0.2/24 dev eth0
            {enter} ip link set eth0 up
        """])  # fmt: skip

        def look() -> str:
            show = ["task", "exec", "--exec-id", fresh_id("look"), container, "ip", "addr"]
            return node.run([*docker, *show]).stdout

        soon(look, "10.95.0.2/24")
        node.run(["busybox", "ping", "-c", "2", "-W", "5", "10.95.0.2"])
        node.run(["ip", "link", "delete", "ktdocker"])
        deadline = time.monotonic() + patient(60)
        while "eth0" in look() and time.monotonic() < deadline:
            time.sleep(0.1)  # the guest's kernel lets the device go in its own time
        assert "eth0" not in look()
    finally:
        node.run([*docker, "task", "rm", "-f", container], check=False)
        node.run([*docker, "container", "rm", container], check=False)
        node.run([*docker, "images", "rm", "--sync", BUSYBOX_IMAGE, PAUSE_IMAGE], check=False)
