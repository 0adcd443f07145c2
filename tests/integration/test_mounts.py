"""Host files and directories inside the container: written through, or read-only for good."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from tests.harness.ctr import Ctr, fresh_id

if TYPE_CHECKING:
    from pathlib import Path

    from tests.harness.node import Node


@pytest.fixture
def shared(node: Node) -> Iterator[Path]:
    """A directory of the node at /tmp/shared with one file, `greeting`."""
    directory = node.path("/tmp/shared")
    directory.mkdir()
    (directory / "greeting").write_text("hello\n")
    yield directory
    node.run(["rm", "-r", "/tmp/shared"])


def bind(source: str, target: str, options: str = "rbind:rw") -> list[str]:
    return ["--mount", f"type=bind,src={source},dst={target},options={options}"]


@pytest.mark.needs("shared_directory")
def test_directory_and_file_are_shared_both_ways(ctr: Ctr, shared: Path) -> None:
    done = ctr.run(
        fresh_id("bind"),
        "sh",
        "-c",
        "cat /data/greeting && echo from inside >/data/answer && echo more >>/one && ls /data",
        options=["--rm", *bind("/tmp/shared", "/data"), *bind("/tmp/shared/greeting", "/one")],
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "hello\nanswer\ngreeting\n"
    assert (shared / "answer").read_text() == "from inside\n"
    assert (shared / "greeting").read_text() == "hello\nmore\n"


@pytest.mark.needs("shared_directory")
def test_what_the_host_writes_later_is_seen(ctr: Ctr, shared: Path) -> None:
    container = fresh_id("later")
    ctr.start(container, "sleep", "1000", options=bind("/tmp/shared", "/data"))
    (shared / "late").write_text("late\n")
    assert ctr.exec(container, "cat", "/data/late").stdout == "late\n"
    ctr.remove(container)


@pytest.mark.parametrize("source", ["/tmp/shared", "/tmp/shared/greeting"])
def test_read_only_bind_refuses_writes(ctr: Ctr, shared: Path, source: str) -> None:
    target = "/data" if source == "/tmp/shared" else "/data/greeting"
    done = ctr.run(
        fresh_id("readonly"),
        "sh",
        "-c",
        "cat /data/greeting; echo x >>/data/greeting || echo refused; "
        "mount -o remount,rw /data 2>/dev/null; echo x >>/data/greeting || echo refused",
        options=["--rm", "--cap-add", "CAP_SYS_ADMIN", *bind(source, target, "rbind:ro")],
    )
    assert done.stdout == "hello\nrefused\nrefused\n", done
    assert (shared / "greeting").read_text() == "hello\n"


def test_missing_source_is_named(ctr: Ctr) -> None:
    container = fresh_id("nosource")
    done = ctr.run(container, "true", options=["--rm", *bind("/no/such/source", "/data")])
    assert done.returncode != 0
    assert "/no/such/source" in done.stderr
    ctr.remove(container)


@pytest.mark.needs("shared_directory")
def test_two_containers_share_a_directory_of_the_host(ctr: Ctr, shared: Path) -> None:
    options = bind("/tmp/shared", "/data")
    first, second = fresh_id("first"), fresh_id("second")
    ctr.start(first, "sleep", "1000", options=options)
    ctr.start(second, "sleep", "1000", options=options)
    ctr.exec(first, "sh", "-c", "echo one >/data/file", check=True)
    assert ctr.exec(second, "cat", "/data/file").stdout == "one\n"
    assert (shared / "file").read_text() == "one\n"
    ctr.remove(first, second)


def test_tmpfs_and_shm_are_the_containers_own(ctr: Ctr) -> None:
    done = ctr.run(
        fresh_id("tmpfs"),
        "sh",
        "-c",
        "grep -c ' /scratch tmpfs ' /proc/mounts; echo x >/scratch/x; echo y >/dev/shm/y; "
        "cat /scratch/x /dev/shm/y",
        options=["--rm", "--mount", "type=tmpfs,src=tmpfs,dst=/scratch,options=size=8m"],
    )
    assert done.stdout == "1\nx\ny\n", done
