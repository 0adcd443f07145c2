"""Every call in every state, through containerd's API: the answer, the code, the event."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest

from tests.harness.containerd_api import CallFailed, EventLog, Tasks, field_values
from tests.harness.ctr import Ctr, fresh_id
from tests.harness.oci_image import BUSYBOX_IMAGE
from tests.harness.patience import patient

if TYPE_CHECKING:
    from tests.harness.node import Node


@pytest.fixture
def tasks(node: Node) -> Iterator[Tasks]:
    with Tasks(node) as connection:
        yield connection


def make_container(ctr: Ctr, stem: str, *command: str) -> str:
    container = fresh_id(stem)
    ctr.node.run(
        ["ctr", "container", "create", "--runtime", ctr.runtime, BUSYBOX_IMAGE, container, *command]
    )
    return container


def test_life_of_a_container_state_by_state(ctr: Ctr, tasks: Tasks) -> None:
    container = make_container(ctr, "life", "sleep", "1000")
    with EventLog(ctr.node) as events:
        pid = tasks.create(container)
        assert pid > 0
        waiting = tasks.wait_later(container)
        assert tasks.status(container) == "CREATED"
        assert tasks.pids(container)
        assert refusal(tasks.create, container) == "ALREADY_EXISTS"
        assert tasks.start(container) > 0
        assert tasks.status(container) == "RUNNING"
        assert refusal(tasks.start, container)
        assert refusal(tasks.delete, container)
        assert tasks.status(container) == "RUNNING"
        assert waiting.is_pending()
        assert refusal(tasks.kill, container, 9, exec_id="unknown") == "NOT_FOUND"
        assert refusal(tasks.wait, container, "unknown") == "NOT_FOUND"
        assert refusal(tasks.start, container, "unknown") == "NOT_FOUND"
        tasks.kill(container, signal.SIGKILL)
        assert waiting.exit_status() == 137
        assert tasks.status(container) == "STOPPED"
        assert tasks.wait(container) == 137
        assert refusal(tasks.start, container)
        assert refusal(tasks.kill, container, signal.SIGTERM) == "NOT_FOUND"
        state = tasks.get(container)
        assert state.exit_status == 137
        exited = events.expect("/tasks/exit", container)
        fields = field_values(exited.event.value)
        assert fields[2] == container.encode()
        assert fields[4] == 137
        assert fields[5] == state.exited_at.SerializeToString()
        assert tasks.delete(container) == 137
        events.expect("/tasks/delete", container)
        assert events.topics(container) == [
            "/tasks/create",
            "/tasks/start",
            "/tasks/exit",
            "/tasks/delete",
        ]
    for call in (tasks.status, tasks.delete, tasks.start, tasks.wait, tasks.pids):
        assert refusal(call, container) == "NOT_FOUND"
    assert refusal(tasks.kill, container, 9) == "NOT_FOUND"
    ctr.remove(container)


def test_created_container_can_be_deleted_with_status_0(ctr: Ctr, tasks: Tasks) -> None:
    container = make_container(ctr, "unstarted", "true")
    tasks.create(container)
    assert tasks.delete(container) == 0
    ctr.remove(container)


def test_created_container_can_be_killed(ctr: Ctr, tasks: Tasks) -> None:
    container = make_container(ctr, "killedearly", "true")
    tasks.create(container)
    waiting = tasks.wait_later(container)
    tasks.kill(container, signal.SIGKILL)
    assert waiting.exit_status() == 137
    assert tasks.delete(container) == 137
    ctr.remove(container)


def test_same_container_runs_again_after_its_task_was_deleted(ctr: Ctr, tasks: Tasks) -> None:
    container = make_container(ctr, "again", "false")
    for _ in range(2):
        tasks.create(container)
        waiting = tasks.wait_later(container)
        tasks.start(container)
        assert waiting.exit_status() == 1
        assert tasks.delete(container) == 1
    ctr.remove(container)


def test_instant_exit_comes_after_start_in_the_events(ctr: Ctr, tasks: Tasks) -> None:
    container = make_container(ctr, "instant", "sleep", "1000")
    tasks.create(container)
    tasks.start(container)
    with EventLog(ctr.node) as events:
        for number in range(5):
            tasks.exec(container, f"e{number}", ["true"])
            tasks.start(container, f"e{number}")
            exited = events.expect("/tasks/exit", container)
            assert field_values(exited.event.value)[2] == f"e{number}".encode()
            tasks.delete_exec(container, f"e{number}")
        assert (
            events.topics(container)
            == ["/tasks/exec-added", "/tasks/exec-started", "/tasks/exit"] * 5
        )
    ctr.remove(container)


@pytest.mark.parametrize("bad", ["a/b", "..", "x" * 77, "a b"])
def test_bad_container_ids_are_refused_by_name(ctr: Ctr, bad: str) -> None:
    done = ctr.run(bad, "true")
    assert done.returncode != 0
    assert bad in done.stderr


@pytest.mark.parametrize("bad", ["../../../tmp/x", "a/b", "", "."])
@pytest.mark.usefixtures("kata_only")
def test_bad_ids_are_refused_by_the_shim_itself(ctr: Ctr, bad: str) -> None:
    node = ctr.node
    bundle = node.path("/tmp/bundle")
    bundle.mkdir()
    done = subprocess.run(
        node.argv(
            [
                "sh",
                "-c",
                "cd /tmp/bundle && exec containerd-shim-kata-v2 -namespace ns "
                '-address /run/containerd/containerd.sock -publish-binary /x -id "$1" start',
                "sh",
                bad,
            ]
        ),
        env=node.environment(),
        capture_output=True,
        text=True,
        timeout=patient(20),
        check=False,
    )
    assert done.returncode == 1, done
    assert repr(bad)[1:-1] in done.stderr + done.stdout
    assert " id" in done.stderr + done.stdout
    node.run(["rm", "-r", "/tmp/bundle"])


def test_exec_with_a_bad_id_is_refused(ctr: Ctr, tasks: Tasks) -> None:
    container = make_container(ctr, "badexec", "sleep", "1000")
    tasks.create(container)
    tasks.start(container)
    for bad in ("a/b", "..", "x" * 1024):
        assert refusal(tasks.exec, container, bad, ["true"]) == "INVALID_ARGUMENT"
    ctr.remove(container)


def refusal(call: Callable[..., object], *arguments: object, **keywords: object) -> str:
    """Return the code a call is refused with."""
    with pytest.raises(CallFailed) as refused:
        call(*arguments, **keywords)
    assert refused.value.message
    code: str = refused.value.code
    return code
