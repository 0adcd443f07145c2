"""What clients do with the fifos: leave them unread, vanish, close stdin twice."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.harness.containerd_api import Tasks
from tests.harness.ctr import Ctr, fresh_id
from tests.harness.oci_image import BUSYBOX_IMAGE
from tests.harness.patience import patient

if TYPE_CHECKING:
    from tests.harness.node import Node


@pytest.fixture
def fifos(node: Node) -> Iterator[Path]:
    """Three fifos of the node in /tmp/io: in, out, err."""
    directory = node.path("/tmp/io")
    directory.mkdir()
    for name in ("in", "out", "err"):
        os.mkfifo(directory / name)
    yield directory
    node.run(["rm", "-r", "/tmp/io"])


def create(ctr: Ctr, tasks: Tasks, stem: str, *command: str, stdin: str = "") -> str:
    container = fresh_id(stem)
    ctr.node.run(
        ["ctr", "container", "create", "--runtime", ctr.runtime, BUSYBOX_IMAGE, container, *command]
    )
    tasks.create(container, stdin=stdin, stdout="/tmp/io/out", stderr="/tmp/io/err")
    return container


def open_outputs(fifos: Path) -> list[int]:
    return [os.open(fifos / name, os.O_RDONLY | os.O_NONBLOCK) for name in ("out", "err")]


def read_to_end(descriptor: int, timeout_s: float = 20) -> bytes:
    data, deadline = b"", time.monotonic() + patient(timeout_s)
    while True:
        ready, _, _ = select.select([descriptor], [], [], deadline - time.monotonic())
        assert ready, f"no end within {timeout_s} s after {data!r}"
        chunk = os.read(descriptor, 65536)
        if not chunk:
            return data
        data += chunk


def close(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def test_output_that_nobody_reads_blocks_neither_kill_nor_delete(ctr: Ctr, fifos: Path) -> None:
    outputs = open_outputs(fifos)
    with Tasks(ctr.node) as tasks:
        container = create(ctr, tasks, "unread", "yes")
        tasks.start(container)
        select.select(outputs[:1], [], [], 20)
        begin = time.monotonic()
        assert tasks.status(container) == "RUNNING"
        tasks.kill(container, 9)
        assert tasks.wait(container) == 137
        assert time.monotonic() - begin < patient(10)
        close(outputs)
        assert tasks.delete(container) == 137
        assert time.monotonic() - begin < patient(20)
    ctr.remove(container)


def test_reader_that_vanishes_does_not_end_the_container(ctr: Ctr, fifos: Path) -> None:
    outputs = open_outputs(fifos)
    with Tasks(ctr.node) as tasks:
        container = create(ctr, tasks, "vanish", "yes")
        tasks.start(container)
        select.select(outputs[:1], [], [], 20)
        close(outputs)
        assert ctr.exec(container, "true").returncode == 0
        assert tasks.status(container) == "RUNNING"
        outputs = open_outputs(fifos)
        ready, _, _ = select.select(outputs[:1], [], [], 20)
        assert ready
        tasks.kill(container, 9)
        assert tasks.wait(container) == 137
        close(outputs)
        tasks.delete(container)
    ctr.remove(container)


def test_stdin_ends_after_what_was_written_before_close(ctr: Ctr, fifos: Path) -> None:
    outputs = open_outputs(fifos)
    with Tasks(ctr.node) as tasks:
        container = create(ctr, tasks, "closeio", "cat", stdin="/tmp/io/in")
        tasks.start(container)
        writer = os.open(fifos / "in", os.O_WRONLY)
        os.write(writer, b"first\n")
        os.write(writer, b"last\n")
        os.close(writer)
        tasks.close_stdin(container)
        assert read_to_end(outputs[0]) == b"first\nlast\n"
        assert tasks.wait(container) == 0
        assert tasks.delete(container) == 0
    close(outputs)
    ctr.remove(container)


def test_close_of_stdin_before_start_and_without_stdin_answers(ctr: Ctr, fifos: Path) -> None:
    outputs = open_outputs(fifos)
    with Tasks(ctr.node) as tasks:
        container = create(ctr, tasks, "nostdin", "sleep", "1000")
        tasks.close_stdin(container)
        tasks.start(container)
        tasks.close_stdin(container)
        assert tasks.status(container) == "RUNNING"
    close(outputs)
    ctr.remove(container)


def test_fifo_that_does_not_exist_is_refused_soon(ctr: Ctr, fifos: Path) -> None:
    (fifos / "out").unlink()
    with Tasks(ctr.node) as tasks:
        begin = time.monotonic()
        with pytest.raises(Exception, match="/tmp/io/out"):
            create(ctr, tasks, "nofifo", "true")
        assert time.monotonic() - begin < patient(15)
    for row in ctr.node.run(["ctr", "container", "ls", "-q"]).stdout.split():
        ctr.remove(row)
