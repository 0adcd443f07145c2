"""Signals from outside reach the process they are meant for."""

from __future__ import annotations

import subprocess

import pytest

from tests.harness.containerd_api import CallFailed, Tasks
from tests.harness.ctr import Ctr, fresh_id
from tests.harness.patience import patient

_TRAPS = (
    'trap "echo got USR1" USR1; trap "echo got TERM; exit 21" TERM; echo ready; '
    "while :; do sleep 0.1; done"
)


def test_signals_run_the_traps_of_init(ctr: Ctr) -> None:
    container = fresh_id("traps")
    with ctr.popen(
        container, "sh", "-c", _TRAPS, options=["--rm"], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        ctr.task("kill", "-s", "SIGUSR1", container)
        assert process.stdout.readline() == b"got USR1\n"
        ctr.task("kill", container)  # SIGTERM is ctr's default
        assert process.stdout.readline() == b"got TERM\n"
        assert process.wait(patient(20)) == 21


def test_kill_of_an_exec_leaves_the_container(ctr: Ctr) -> None:
    container = fresh_id("killexec")
    ctr.start(container, "sleep", "1000")
    with Tasks(ctr.node) as tasks:
        tasks.exec(container, "one", ["sleep", "1000"])
        with pytest.raises(CallFailed) as early:
            tasks.kill(container, 9, exec_id="one")
        assert early.value.code == "FAILED_PRECONDITION"
        tasks.start(container, "one")
        tasks.kill(container, 15, exec_id="one")
        assert tasks.wait(container, "one") == 143
        with pytest.raises(CallFailed) as late:
            tasks.kill(container, 15, exec_id="one")
        assert late.value.code == "NOT_FOUND"
        assert tasks.status(container) == "RUNNING"
    ctr.remove(container)


def test_kill_all_reaches_every_process_of_the_container(ctr: Ctr) -> None:
    container = fresh_id("killall")
    ctr.start(container, "sleep", "1000")
    with Tasks(ctr.node) as tasks:
        tasks.exec(container, "other", ["sleep", "1000"])
        tasks.start(container, "other")
        waiting = tasks.wait_later(container, "other")
        ctr.task("kill", "--all", "-s", "SIGKILL", container)
        assert tasks.wait(container) == 137
        assert waiting.exit_status() == 137
        tasks.delete_exec(container, "other")
    ctr.remove(container)


def test_processes_end_with_their_init(ctr: Ctr) -> None:
    container = fresh_id("endsall")
    ctr.start(container, "sleep", "1000")
    with Tasks(ctr.node) as tasks:
        tasks.exec(container, "other", ["sleep", "1000"])
        tasks.start(container, "other")
        tasks.kill(container, 9)
        assert tasks.wait(container, "other") == 137
        assert tasks.wait(container) == 137
        with pytest.raises(CallFailed) as late:
            tasks.kill(container, 9)
        assert late.value.code == "NOT_FOUND"
        tasks.delete_exec(container, "other")
        assert tasks.delete(container) == 137
    ctr.remove(container)
