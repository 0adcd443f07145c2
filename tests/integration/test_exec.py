"""Further processes in a running container."""

from __future__ import annotations

import hashlib
import os

import pytest

from tests.harness.containerd_api import CallFailed, Tasks
from tests.harness.ctr import KATA, RUNTIME, Ctr, fresh_id
from tests.harness.parts import find_shims


@pytest.mark.smoke
def test_exec_statuses_streams_and_stdin(ctr: Ctr) -> None:
    container = fresh_id("exec")
    ctr.start(container, "sleep", "1000")
    for script, status in (
        ("exit 0", 0),
        ("exit 7", 7),
        ("kill -9 $$", 137),
        ("kill -TERM $$", 143),
    ):
        assert ctr.exec(container, "sh", "-c", script).returncode == status
    done = ctr.exec(container, "sh", "-c", "echo out; echo err >&2; exit 3")
    assert (done.returncode, done.stdout, done.stderr) == (3, "out\n", "err\n")
    given = os.urandom(500_000)
    done = ctr.exec(container, "sha256sum", stdin=given)
    assert done.stdout == f"{hashlib.sha256(given).hexdigest()}  -\n"
    done = ctr.exec(container, "pwd", options=["--cwd", "/var"])
    assert done.stdout == "/var\n"
    assert ctr.status(container) == "RUNNING"
    ctr.remove(container)


def test_exec_of_a_missing_command_fails_at_once_and_is_named(ctr: Ctr) -> None:
    container = fresh_id("missing")
    ctr.start(container, "sleep", "1000")
    # What it waits for otherwise takes the agent a minute. Source: native/mod.rs STEP_TIMEOUT.
    done = ctr.exec(container, "/no/such/command", timeout_s=30)
    assert done.returncode != 0
    assert "/no/such/command" in done.stderr
    assert ctr.exec(container, "true").returncode == 0
    ctr.remove(container)


def test_exec_ids_are_unique_until_deleted(ctr: Ctr) -> None:
    container = fresh_id("ids")
    ctr.start(container, "sleep", "1000")
    with Tasks(ctr.node) as tasks:
        tasks.exec(container, "one", ["true"])
        assert tasks.status(container, "one") == "CREATED"
        with pytest.raises(CallFailed) as refused:
            tasks.exec(container, "one", ["true"])
        assert refused.value.code == "ALREADY_EXISTS"
        waiting = tasks.wait_later(container, "one")
        assert tasks.start(container, "one") > 0
        assert waiting.exit_status() == 0
        assert tasks.wait(container, "one") == 0
        assert tasks.status(container, "one") == "STOPPED"
        assert tasks.delete_exec(container, "one") == 0
        tasks.exec(container, "one", ["false"])
        assert tasks.delete_exec(container, "one") == 0
        with pytest.raises(CallFailed) as gone:
            tasks.start(container, "one")
        assert gone.value.code == "NOT_FOUND"
    ctr.remove(container)


def test_exec_in_a_stopped_container_is_refused(ctr: Ctr) -> None:
    container = fresh_id("stopped")
    ctr.start(container, "sleep", "1000")
    with Tasks(ctr.node) as tasks:
        tasks.kill(container, 9)
        assert tasks.wait(container) == 137
        with pytest.raises(CallFailed) as refused:
            tasks.exec(container, "late", ["true"])
        assert "stopped" in refused.value.message
    ctr.remove(container)


def test_exec_joins_init_where_its_container_has_divided_its_cgroup(
    ctr: Ctr, kata_only: None
) -> None:
    """As systemd and Docker do in one: the kernel lets no process into the cgroup itself then."""
    container = fresh_id("divided")
    mount = "type=cgroup,src=cgroup,dst=/sys/fs/cgroup,options=rw"
    ctr.start(container, "sleep", "1000", options=["--privileged", "--mount", mount])
    script = (
        "here=/sys/fs/cgroup$(sed -n s/^0:://p /proc/self/cgroup); mkdir $here/init && "
        "for pid in 1 $$; do echo $pid >$here/init/cgroup.procs || exit 1; done; "
        "echo +pids >$here/cgroup.subtree_control"
    )
    divided = ctr.exec(container, "sh", "-c", script)
    assert divided.returncode == 0, divided
    done = ctr.exec(container, "cat", "/proc/self/cgroup")
    assert done.stdout.endswith("/init\n"), done
    ctr.remove(container)


@pytest.mark.timeout(900)
def test_200_execs_in_a_row_leave_the_shim_as_it_was(ctr: Ctr) -> None:
    container = fresh_id("many")
    ctr.start(container, "sleep", "1000")
    with Tasks(ctr.node) as tasks:

        def batch(count: int) -> None:
            for number in range(count):
                tasks.exec(container, f"e{number}", ["true"])
                tasks.start(container, f"e{number}")
                assert tasks.wait(container, f"e{number}") == 0
                assert tasks.delete_exec(container, f"e{number}") == 0

        batch(20)
        before = shim_size(ctr)
        batch(200)
        after = shim_size(ctr)
    assert after["fds"] == before["fds"]
    assert after["threads"] <= before["threads"] + (0 if RUNTIME == KATA else 4)
    assert after["rss_kib"] < before["rss_kib"] + 2048
    ctr.remove(container)


def shim_size(ctr: Ctr) -> dict[str, int]:
    (shim,) = find_shims(ctr)
    status = dict(
        line.split(":", 1) for line in (shim.directory / "status").read_text().splitlines()
    )
    return {
        "fds": len(list((shim.directory / "fd").iterdir())),
        "threads": int(status["Threads"]),
        "rss_kib": int(status["VmRSS"].split()[0]),
    }
