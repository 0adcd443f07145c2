"""The harness itself: a node runs containers with runc's shim, and its leak check sees leaks."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator

import pytest

from tests.harness.ctr import RUNC, Ctr, fresh_id
from tests.harness.leaks import take_snapshot, wait_for_no_leaks
from tests.harness.node import Node
from tests.harness.patience import read_line

Planter = Callable[[Node], contextlib.AbstractContextManager[object]]


@contextlib.contextmanager
def command(node: Node, plant: str, remove: str) -> Iterator[None]:
    node.run(["sh", "-c", plant])
    yield
    node.run(["sh", "-c", remove])


@contextlib.contextmanager
def background(node: Node, *argv: str) -> Iterator[None]:
    """Run a command in the node that prints a line when it's ready and lasts until killed."""
    process = node.popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdin is not None
    with process.stdout, process.stdin:
        assert read_line(process.stdout)
        yield
        for found in node.processes():
            if found.parent == 0 and found.comm == "python3":
                node.signal(found.pid, "KILL")
        process.wait(30)


def listen(node: Node, name: str) -> contextlib.AbstractContextManager[object]:
    script = f"import socket; s = socket.socket(1); s.bind({name!r}); s.listen()"
    return background(node, "/usr/bin/python3", "-c", f"{script}; print(1, flush=True); input()")


PLANTED: dict[str, tuple[str, Planter]] = {
    "process": (
        "process: python3",
        lambda node: background(node, "/usr/bin/python3", "-c", "print(1, flush=True); input()"),
    ),
    "mount": (
        "mount: /run/lock",
        lambda node: command(node, "mount -t tmpfs leaked /run/lock", "umount /run/lock"),
    ),
    "link": (
        "link: tap9",
        lambda node: command(node, "ip tuntap add tap9 mode tap", "ip link del tap9"),
    ),
    "netns": (
        "mount: /run/netns/leaked",
        lambda node: command(node, "ip netns add leaked", "ip netns del leaked; umount /run/netns"),
    ),
    "socket": ("socket: @leaked", lambda node: listen(node, "\0leaked")),
    "cgroup": (
        "cgroup: ",
        lambda node: command(
            node,
            f"mkdir -p /sys/fs/cgroup/memory/kata_{node.name}/c1",
            f"cd /sys/fs/cgroup/memory && rmdir kata_{node.name}/c1 kata_{node.name}",
        ),
    ),
    "run": (
        "file: /run/kata/abc/journal",
        lambda node: command(
            node, "mkdir -p /run/kata/abc && echo > /run/kata/abc/journal", "rm -r /run/kata/abc"
        ),
    ),
    "shm": (
        "file: /dev/shm/ram",
        lambda node: command(node, "echo > /dev/shm/ram", "rm /dev/shm/ram"),
    ),
    "tmp": ("file: /tmp/x", lambda node: command(node, "echo > /tmp/x", "rm /tmp/x")),
    "bundle": (
        "file: /run/containerd/io.containerd.runtime.v2.task/",
        lambda node: command(
            node,
            f"mkdir -p /run/containerd/io.containerd.runtime.v2.task/{node.name}/gone",
            f"rmdir /run/containerd/io.containerd.runtime.v2.task/{node.name}/gone",
        ),
    ),
}


@pytest.mark.parametrize("kind", PLANTED)
def test_leak_check_names_a_planted_leak(node: Node, kind: str) -> None:
    expected, planter = PLANTED[kind]
    before = take_snapshot(node)
    with planter(node):
        leaks = wait_for_no_leaks(node, before, deadline_s=0)
        assert [str(leak) for leak in leaks if expected in str(leak)], leaks
    assert wait_for_no_leaks(node, before) == []


def test_leak_check_names_the_owner_of_a_socket(node: Node) -> None:
    before = take_snapshot(node)
    with listen(node, "/run/kata-leaked.sock"):
        leaks = wait_for_no_leaks(node, before, deadline_s=0)
        owners = [leak.owner for leak in leaks if leak.kind == "socket"]
        assert owners
        assert owners[0].startswith("python3 pid=")
    node.path("/run/kata-leaked.sock").unlink()


def test_leak_check_sees_fds_of_long_lived_processes(node: Node) -> None:
    path = node.path("/tmp/held")
    before = take_snapshot(node, [os.getpid()])
    with path.open("w"):
        path.unlink()
        leaks = wait_for_no_leaks(node, before, long_lived=[os.getpid()], deadline_s=0)
        assert any(leak.kind == f"fd of pid {os.getpid()}" for leak in leaks)


def test_runc_container_runs_in_the_node_and_leaves_nothing(node: Node) -> None:
    done = Ctr(node, RUNC).run(fresh_id("runc"), "sh", "-c", "hostname; exit 7")
    assert (done.returncode, done.stdout) == (7, f"{node.name}\n"), done.stderr


def test_runc_container_survives_a_killed_containerd(node: Node) -> None:
    ctr, container = Ctr(node, RUNC), fresh_id("runc")
    ctr.start(container, "sleep", "1000")
    node.containerd.restart()
    assert ctr.status(container) == "RUNNING"
    ctr.remove(container)
