"""Kata's own agent in the guest, under this shim: what docs/compatibility.md says of it.

With KATA_TEST_AGENT=PROGRAM every end-to-end test has that agent; those here are the ones that must
pass with it. Without, none of them runs.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.harness import foreign_agent
from tests.harness.containerd_api import EventLog, Tasks
from tests.harness.ctr import Ctr, Terminal, fresh_id
from tests.harness.ctr_pod import Pod, bind
from tests.harness.oci_image import BUSYBOX_IMAGE

if TYPE_CHECKING:
    from tests.harness.node import Node

pytestmark = [
    pytest.mark.skipif(
        foreign_agent.find_agent() is None,
        reason=f"{foreign_agent.VARIABLE} names no agent of Kata's (docs/compatibility.md)",
    ),
    pytest.mark.usefixtures("kata_only"),
]

POD = "ktforeign"
_NETWORK = f"""
ip netns add {POD}
ip link add ktforeign0 type veth peer name eth0 netns {POD}
ip addr add 10.78.0.1/24 dev ktforeign0
ip link set ktforeign0 up
ip -n {POD} link set lo up
ip -n {POD} addr add 10.78.0.2/24 dev eth0
ip -n {POD} link set eth0 up
ip -n {POD} route add default via 10.78.0.1
"""


@pytest.fixture
def network(node: Node) -> Iterator[list[str]]:
    """Options of `ctr run` for a network namespace as CNI leaves it."""
    node.run(["sh", "-ec", _NETWORK])
    yield ["--with-ns", f"network:/run/netns/{POD}"]
    node.run(["sh", "-c", f"ip link del ktforeign0; ip netns del {POD}; umount /run/netns; true"])


@pytest.fixture
def volume(node: Node) -> Iterator[Path]:
    directory = node.path("/tmp/volume")
    directory.mkdir()
    (directory / "key").write_text("from the host\n")
    yield directory
    node.run(["rm", "-rf", "/tmp/volume"])


def test_run_has_streams_status_and_a_network(ctr: Ctr, network: list[str]) -> None:
    script = "echo err >&2; ip addr show eth0; ip route; ping -c 1 -W 5 10.78.0.1; exit 7"
    container = fresh_id("up")
    done = ctr.run(container, "sh", "-c", script, options=["--rm", *network])
    assert (done.stderr, done.returncode) == ("err\n", 7)
    assert "10.78.0.2/24" in done.stdout
    assert "default via 10.78.0.1" in done.stdout
    assert " 0% packet loss" in done.stdout


def test_exec_terminal_pause_metrics_update_and_kill(ctr: Ctr) -> None:
    container = fresh_id("up")
    ctr.start(container, "sleep", "1000", options=["--memory-limit", str(96 << 20)])
    done = ctr.exec(container, "sh", "-c", "cat; exit 3", stdin=b"typed\n")
    assert (done.stdout, done.returncode) == ("typed\n", 3)
    assert ctr.exec(container, "no-such-program").returncode != 0
    argv = ["ctr", "task", "exec", "-t", "--exec-id", "shell", container, "sh"]
    terminal = Terminal(ctr.node, argv, rows=20, columns=70)
    terminal.expect("# ")
    terminal.send("stty size; exit 6\n")
    terminal.expect("20 70\n")
    assert terminal.close() == 6
    ctr.task("pause", container)
    assert ctr.status(container) == "PAUSED"
    ctr.task("resume", container)
    memory = ctr.metrics(container)["memory"]
    assert str(96 << 20) in json.dumps(memory), memory
    with Tasks(ctr.node) as tasks:
        tasks.kill(container, signal.SIGKILL)
        assert tasks.wait(container) == 137
    ctr.remove(container)


def test_pod_has_two_containers_a_volume_and_oom_events(ctr: Ctr, volume: Path) -> None:
    pod = Pod(ctr, fresh_id("up"))
    pod.start_sandbox()
    mount = bind("/tmp/volume", "/data")
    one = pod.start("one", "sleep", "1000", options=mount)
    two = pod.start("two", "sleep", "1000", options=mount)
    assert ctr.exec(one, "cat", "/data/key").stdout == "from the host\n"
    assert ctr.exec(one, "sh", "-c", "echo one >/data/said").returncode == 0
    assert ctr.exec(two, "cat", "/data/said").stdout == "one\n"
    assert (volume / "said").read_text() == "one\n"
    spaces = "readlink /proc/self/ns/ipc; readlink /proc/self/ns/uts"
    said = [ctr.exec(each, "sh", "-c", spaces).stdout for each in (one, two)]
    assert said[0] == said[1] != ""
    with EventLog(ctr.node) as events, Tasks(ctr.node) as tasks:
        limit = ["--memory-limit", str(32 << 20)]
        eater = pod.start("eater", "dd", "if=/dev/zero", "of=/dev/null", "bs=200M", options=limit)
        assert tasks.wait(eater) == 137
        events.expect("/tasks/oom", eater)
    pod.remove()


def test_created_container_can_be_killed(ctr: Ctr) -> None:
    container = fresh_id("up")
    argv = [
        "ctr",
        "container",
        "create",
        "--runtime",
        ctr.runtime,
        BUSYBOX_IMAGE,
        container,
        "true",
    ]
    ctr.node.run(argv)
    with Tasks(ctr.node) as tasks:
        tasks.create(container)
        tasks.kill(container, signal.SIGKILL)
        assert tasks.wait(container) == 137
        tasks.delete(container)
    ctr.remove(container)
