"""containerd is killed and started again under running containers."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from tests.harness.containerd_api import EventLog, Tasks
from tests.harness.ctr import Ctr, fresh_id
from tests.harness.patience import patient

if TYPE_CHECKING:
    from tests.harness.node import Node


def test_running_container_survives_and_is_fully_usable(node: Node, ctr: Ctr) -> None:
    container = fresh_id("survivor")
    ctr.start(container, "sh", "-c", 'trap "exit 12" TERM; while :; do sleep 0.1; done')
    pid = ctr.pid(container)
    node.containerd.restart()
    assert ctr.status(container) == "RUNNING"
    assert ctr.pid(container) == pid
    done = ctr.exec(container, "sh", "-c", "cat; exit 3", stdin=b"hello")
    assert (done.returncode, done.stdout) == (3, "hello")
    with Tasks(node) as tasks, EventLog(node) as events:
        waiting = tasks.wait_later(container)
        tasks.kill(container, 15)
        assert waiting.exit_status() == 12
        events.expect("/tasks/exit", container)
        assert tasks.delete(container) == 12
    ctr.remove(container)


def test_exit_while_containerd_is_down_is_there_afterwards(node: Node, ctr: Ctr) -> None:
    container = fresh_id("absent")
    node.path("/tmp/shared").mkdir()
    ctr.start(
        container,
        "sh",
        "-c",
        "until [ -e /mnt/go ]; do sleep 0.1; done; touch /mnt/gone; exit 13",
        options=["--mount", "type=bind,src=/tmp/shared,dst=/mnt,options=rbind:rw"],
    )
    node.containerd.kill()
    node.write("/tmp/shared/go", "")
    wait_for_file(node, "/tmp/shared/gone")
    node.containerd.start()
    with Tasks(node) as tasks:
        assert tasks.wait(container) == 13
        assert tasks.delete(container) == 13
    ctr.remove(container)
    node.run(["rm", "-r", "/tmp/shared"])


def test_containers_keep_their_output_over_a_restart(node: Node, ctr: Ctr) -> None:
    container = fresh_id("writer")
    node.run(
        ctr.run_argv(
            container,
            ["sh", "-c", "for i in 1 2 3 4 5 6 7 8 9 10; do echo $i; sleep 0.2; done"],
            ["-d", "--log-uri", "file:///tmp/writer.log"],
        )
    )
    node.containerd.restart()
    with Tasks(node) as tasks:
        assert tasks.wait(container) == 0
        assert tasks.delete(container) == 0
    assert node.path("/tmp/writer.log").read_text().split() == [str(n) for n in range(1, 11)]
    ctr.remove(container)
    node.path("/tmp/writer.log").unlink()


def wait_for_file(node: Node, inside: str, timeout_s: float = 20) -> None:
    """Wait until a file exists (virtio-fs makes no inotify event for what the guest does)."""
    deadline = time.monotonic() + patient(timeout_s)
    while not node.path(inside).exists():
        assert time.monotonic() < deadline, f"no {inside} within {timeout_s} s"
        time.sleep(0.05)
