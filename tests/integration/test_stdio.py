"""Standard streams: complete, in order, at the reader's pace; stdin and its end; loggers."""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
import threading
from pathlib import Path
from typing import IO, TYPE_CHECKING

import pytest

from tests.harness.ctr import Ctr, fresh_id
from tests.harness.patience import patient

if TYPE_CHECKING:
    from tests.harness.node import Node

_BLOCK = "".join(f"{number}\n" for number in range(1, 170_001)).encode()[: 1 << 20]
_BLOCKS = 100
#: Prints `_BLOCKS` times a line with the block's number and then the block.
_FLOOD = (
    "seq 1 170000 | head -c 1048576 >/tmp/block; i=0; "
    f"while [ $i -lt {_BLOCKS} ]; do echo block $i; cat /tmp/block; i=$((i+1)); done"
)


def flood_digest() -> str:
    digest = hashlib.sha256()
    for number in range(_BLOCKS):
        digest.update(b"block %d\n" % number + _BLOCK)
    return digest.hexdigest()


def read_digest(stream: IO[bytes], pause_s: float) -> str:
    """Hash the stream; after each chunk, and for a second after 10 MB, don't read."""
    digest, total, stalled = hashlib.sha256(), 0, False
    pause = threading.Event()
    while chunk := os.read(stream.fileno(), 1 << 16):
        digest.update(chunk)
        total += len(chunk)
        if pause_s:
            pause.wait(pause_s)
        if pause_s and total > 10 << 20 and not stalled:
            stalled = True
            pause.wait(1)
    return digest.hexdigest()


@pytest.mark.parametrize("pause_s", [0, 0.002], ids=["fast reader", "slow reader"])
def test_100_mb_of_output_arrive_complete_and_in_order(ctr: Ctr, pause_s: float) -> None:
    with ctr.popen(fresh_id("flood"), "sh", "-c", _FLOOD, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert read_digest(process.stdout, pause_s) == flood_digest()
        assert process.wait(patient(30)) == 0


@pytest.mark.smoke
def test_stdin_is_delivered_and_its_end_seen(ctr: Ctr) -> None:
    given = os.urandom(3_000_000)
    done = ctr.run(fresh_id("stdin"), "sh", "-c", "sha256sum; echo end", stdin=given)
    digest = hashlib.sha256(given).hexdigest()
    assert done.stdout == f"{digest}  -\nend\n", done.stderr


def test_output_of_both_streams_stays_apart(ctr: Ctr) -> None:
    done = ctr.run(
        fresh_id("both"), "sh", "-c", "for i in 1 2 3 4 5; do echo out $i; echo err $i >&2; done"
    )
    assert done.stdout == "".join(f"out {number}\n" for number in range(1, 6))
    assert done.stderr == "".join(f"err {number}\n" for number in range(1, 6))


def test_file_logger_gets_both_streams(node: Node, ctr: Ctr) -> None:
    container = fresh_id("filelog")
    node.run(
        ctr.run_argv(
            container,
            ["sh", "-c", "echo out; echo err >&2; sleep 0.1; exit 4"],
            ["-d", "--log-uri", "file:///tmp/logs/a/container.log"],
        )
    )
    wait_until_stopped(ctr, container)
    log = node.path("/tmp/logs/a/container.log")
    assert sorted(log.read_text().split()) == ["err", "out"]
    ctr.remove(container)
    node.run(["rm", "-r", "/tmp/logs"])


_LOGGER = """\
#!/bin/sh
trap "" TERM
echo "$CONTAINER_ID $CONTAINER_NAMESPACE $*" >/tmp/logger.start
cat <&4 >/tmp/logger.err 5>&- &
exec 5>&-
cat <&3 >/tmp/logger.out
wait
echo done >>/tmp/logger.start
"""


def test_binary_logger_gets_streams_arguments_and_environment(node: Node, ctr: Ctr) -> None:
    install(node, "/tmp/logger", _LOGGER)
    container = fresh_id("binlog")
    node.run(
        ctr.run_argv(
            container,
            ["sh", "-c", "echo out; echo err >&2; exit 4"],
            ["-d", "--log-uri", "binary:///tmp/logger?key=value"],
        )
    )
    wait_until_stopped(ctr, container)
    ctr.remove(container)
    start = node.path("/tmp/logger.start").read_text().splitlines()
    assert start == [f"{container} {node.name} key value", "done"]
    assert node.path("/tmp/logger.out").read_text() == "out\n"
    assert node.path("/tmp/logger.err").read_text() == "err\n"
    node.run(["sh", "-c", "rm /tmp/logger*"])


@pytest.mark.parametrize("uri", ["binary:///no/such/logger", "carrier-pigeon://coop"])
def test_logger_that_cannot_be_is_refused_by_name(node: Node, ctr: Ctr, uri: str) -> None:
    container = fresh_id("nolog")
    argv = ctr.run_argv(container, ["true"], ["-d", "--log-uri", uri])
    done = node.run(argv, check=False)
    assert done.returncode != 0
    assert uri.partition("://")[2].strip("/") in done.stderr or "carrier-pigeon" in done.stderr
    ctr.remove(container)


def test_exit_is_reported_though_a_child_holds_the_output(ctr: Ctr) -> None:
    container = fresh_id("holder")
    with ctr.popen(
        container, "sh", "-c", "echo out; sleep 1000 & exit 5", stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.read() == b"out\n"
        assert process.wait(patient(20)) == 5


def install(node: Node, inside: str, script: str) -> None:
    node.write(inside, script)
    path: Path = node.path(inside)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def wait_until_stopped(ctr: Ctr, container: str) -> None:
    """Wait until a detached container has exited (`ctr task attach` is no wait: no stdio)."""
    from tests.harness.containerd_api import Tasks

    with Tasks(ctr.node) as tasks:
        tasks.wait(container)
