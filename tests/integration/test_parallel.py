"""Several containers at once, each in a VM of its own, none disturbing another."""

from __future__ import annotations

import subprocess

from tests.harness.ctr import Ctr, fresh_id
from tests.harness.patience import patient


def test_four_containers_at_once_keep_output_and_status_apart(ctr: Ctr) -> None:
    containers = [fresh_id("parallel") for _ in range(4)]
    started = [
        ctr.popen(
            container,
            "sh",
            "-c",
            f"echo {container}; sleep 0.2; exit {number + 10}",
            stdout=subprocess.PIPE,
        )
        for number, container in enumerate(containers)
    ]
    for number, (container, process) in enumerate(zip(containers, started, strict=True)):
        output, _ = process.communicate(timeout=patient(90))
        assert output.decode() == f"{container}\n"
        assert process.returncode == number + 10


def test_execs_at_once_in_one_container_keep_apart(ctr: Ctr) -> None:
    container = fresh_id("execs")
    ctr.start(container, "sleep", "1000")
    started = [
        ctr.node.popen(
            [
                "ctr",
                "task",
                "exec",
                "--exec-id",
                f"e{number}",
                container,
                "sh",
                "-c",
                f"seq 1 2000; echo {number}; exit {number}",
            ],
            stdout=subprocess.PIPE,
        )
        for number in range(8)
    ]
    for number, process in enumerate(started):
        output, _ = process.communicate(timeout=patient(60))
        assert output.decode().split() == [*map(str, range(1, 2001)), str(number)]
        assert process.returncode == number
    ctr.remove(container)
