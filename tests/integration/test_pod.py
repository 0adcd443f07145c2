"""A pod: a pause container and others, grouped by the annotations that CRI sets."""

from __future__ import annotations

import contextlib
import signal
import subprocess
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from tests.harness.containerd_api import Tasks
from tests.harness.ctr import Ctr, fresh_id
from tests.harness.ctr_pod import Pod
from tests.harness.parts import VMM, find_parts, find_shims
from tests.harness.patience import patient

if TYPE_CHECKING:
    from tests.harness.node import Node

pytestmark = pytest.mark.usefixtures("kata_only")


@pytest.fixture
def pod(ctr: Ctr) -> Iterator[Pod]:
    pod = Pod(ctr, fresh_id("pod"))
    pod.start_sandbox()
    yield pod
    pod.remove()


@pytest.mark.smoke
def test_pod_shares_one_vm_one_shim_ipc_and_uts_but_no_root(node: Node, ctr: Ctr, pod: Pod) -> None:
    one, two = pod.start("one", "sleep", "1000"), pod.start("two", "sleep", "1000")
    assert len(find_parts(node, VMM)) == 1
    assert len(find_shims(ctr)) == 1

    def inside(container: str, script: str) -> str:
        done = ctr.exec(container, "sh", "-c", script)
        assert done.returncode == 0, done.stderr
        return done.stdout

    spaces = "readlink /proc/self/ns/{}"
    assert inside(one, spaces.format("ipc")) == inside(two, spaces.format("ipc"))
    assert inside(one, spaces.format("uts")) == inside(two, spaces.format("uts"))
    assert inside(one, spaces.format("mnt")) != inside(two, spaces.format("mnt"))
    assert inside(one, spaces.format("pid")) != inside(two, spaces.format("pid"))
    inside(one, "echo mine >/tmp/file")
    assert inside(two, "ls /tmp") == ""
    assert inside(one, "hostname") == inside(two, "hostname")


# Has always much to read ahead, and reads under way.
_READER = """\
for file in 1 2 3 4 5 6 7 8; do cp /bin/busybox /$file; done
touch /ready
while :; do
    for file in 1 2 3 4 5 6 7 8; do head -c 5000 /$file; done >/dev/null
    echo 3 >/proc/sys/vm/drop_caches
done
"""


@pytest.mark.needs("shared_directory")
def test_container_killed_while_it_reads_leaves_the_guest_well(
    node: Node, ctr: Ctr, pod: Pod
) -> None:
    """Linux takes a file system of the host's down without waiting for what is read ahead there."""
    neighbour = pod.start("neighbour", "sleep", "1000")
    daemons = [process.pid for process in node.processes() if process.comm == "virtiofsd"]
    assert daemons
    for _ in range(8):
        reader = pod.start("reader", "sh", "-c", _READER, options=["--privileged"])
        ctr.exec(reader, "sh", "-c", "until [ -e /ready ]; do :; done", check=True)
        for daemon in daemons:
            node.signal(daemon, "STOP")
        removal = node.popen(["ctr", "task", "rm", "-f", reader], stdout=subprocess.DEVNULL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            removal.wait(0.1)  # what is killed can't end: it has something to read
        for daemon in daemons:
            node.signal(daemon, "CONT")
        removal.wait(patient(60))
    # If the kernel does find a fault in itself, it ends rather than leave somebody waiting.
    assert ctr.exec(neighbour, "cat", "/proc/sys/kernel/panic_on_oops").stdout == "1\n"


def test_container_joins_after_another_was_removed(node: Node, ctr: Ctr, pod: Pod) -> None:
    first = pod.start("first", "sleep", "1000")
    (vmm,) = find_parts(node, VMM)
    with Tasks(node) as tasks:
        tasks.kill(first, signal.SIGKILL)
        assert tasks.wait(first) == 137
        assert tasks.delete(first) == 137
        assert ctr.status(pod.sandbox) == "RUNNING"
        second = pod.start("second", "sh", "-c", "exit 5")
        assert tasks.wait(second) == 5
        third = pod.start("third", "sleep", "1000")
        assert ctr.exec(third, "echo", "here").stdout == "here\n"
    assert [part.pid for part in find_parts(node, VMM)] == [vmm.pid]


def test_pods_vm_outlives_its_containers_and_ends_with_the_sandbox(
    node: Node, ctr: Ctr, pod: Pod
) -> None:
    container = pod.start("only", "sleep", "1000")
    ctr.remove(container)
    assert ctr.status(pod.sandbox) == "RUNNING"
    assert len(find_parts(node, VMM)) == 1
    with Tasks(node) as tasks:
        tasks.kill(pod.sandbox, signal.SIGTERM)
        assert tasks.wait(pod.sandbox) == 0  # the pause program ends in order
        tasks.delete(pod.sandbox)
    assert find_parts(node, VMM) == []


def test_last_words_of_many_short_containers_all_arrive(ctr: Ctr, pod: Pod) -> None:
    """Clients close their fifos when they hear of an exit: output must be there before."""
    for turn in range(8):
        started = []
        for number in range(4):
            container = fresh_id("short")
            script = f"seq 1 3000; echo {container}; exit {number}"
            started.append(
                (
                    number,
                    container,
                    ctr.popen(
                        container,
                        "sh",
                        "-c",
                        script,
                        stdout=subprocess.PIPE,
                        options=["--rm", *pod.annotations("container", "short")],
                    ),
                )
            )
        for number, container, process in started:
            output, _ = process.communicate(timeout=patient(60))
            assert output.decode().split() == [*map(str, range(1, 3001)), container], turn
            assert process.returncode == number


def test_pod_survives_a_restart_of_containerd(node: Node, ctr: Ctr, pod: Pod) -> None:
    before = pod.start("before", "sleep", "1000")
    node.containerd.restart()
    assert ctr.exec(before, "echo", "still").stdout == "still\n"
    after = pod.start("after", "sleep", "1000")
    assert ctr.exec(after, "echo", "new").stdout == "new\n"
    assert len(find_shims(ctr)) == 1


def test_shared_process_namespace_is_the_pause_containers(node: Node, ctr: Ctr, pod: Pod) -> None:
    shared = ["--with-ns", f"pid:/proc/{ctr.pid(pod.sandbox)}/ns/pid"]
    pod.start("init", "true", options=shared)  # its end is no other's
    one = pod.start("one", "sleep", "1111", options=shared)
    two = pod.start("two", "sleep", "2222", options=shared)
    alone = pod.start("alone", "sleep", "3333")
    for container in (one, two):
        seen = ctr.exec(container, "ps", "-o", "pid,args", check=True).stdout
        assert " 1 /pause" in seen
        assert "sleep 1111" in seen
        assert "sleep 2222" in seen
        assert "sleep 3333" not in seen
    seen = ctr.exec(alone, "ps", "-o", "pid,args", check=True).stdout
    assert " 1 sleep 3333" in seen
    assert "sleep 1111" not in seen
    # A signal from one container to another, and its end, end nobody else.
    script = "kill -KILL $(ps -o pid,args | awk '/slee[p] 2222/ {print $1}')"
    ctr.exec(one, "sh", "-c", script, check=True)
    with Tasks(node) as tasks:
        assert tasks.wait(two) == 137
    assert ctr.status(one) == "RUNNING"
    assert "sleep 2222" not in ctr.exec(one, "ps", "-o", "pid,args", check=True).stdout


def test_container_sees_the_processes_of_the_one_that_it_examines(ctr: Ctr, pod: Pod) -> None:
    """What `kubectl debug --target` asks for: in a pod whose containers don't share processes."""
    target = ["--with-ns", f"pid:/proc/{ctr.pid(pod.sandbox)}/ns/pid"]
    pod.start("app", "sleep", "1111")
    debugger = pod.start("debugger", "sleep", "2222", options=target)
    seen = ctr.exec(debugger, "ps", "-o", "pid,args", check=True).stdout
    assert " 1 sleep 1111" in seen
    assert "sleep 2222" in seen
    assert "/pause" not in seen
    pod.start("other", "sleep", "3333")
    with pytest.raises(AssertionError, match="2 run in this VM, which cannot be told apart"):
        pod.start("ambiguous", "true", options=target)
