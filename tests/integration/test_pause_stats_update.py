"""Pause and resume, metrics, ps, and limits that change while the container runs."""

from __future__ import annotations

import json
import subprocess

import pytest

from tests.harness.containerd_api import EventLog, Tasks
from tests.harness.ctr import Ctr, fresh_id
from tests.harness.patience import patient

_CGROUP = ["--mount", "type=cgroup,src=cgroup,dst=/sys/fs/cgroup,options=ro:nosuid:noexec:nodev"]
# A cgroup v1 host's container sees its own cgroups, a guest's (v2) the tree: find our place in it.
_HERE = "here=/sys/fs/cgroup$(sed -n s/^0:://p /proc/self/cgroup); "
_MEMORY = _HERE + "cat $here/memory.max /sys/fs/cgroup/memory/memory.limit_in_bytes 2>/dev/null"
_CPU = (
    _HERE + "cat $here/cpu.max 2>/dev/null || "
    "echo $(cat /sys/fs/cgroup/cpu/cpu.cfs_quota_us /sys/fs/cgroup/cpu/cpu.cfs_period_us)"
)


@pytest.mark.smoke
def test_paused_container_stands_still_and_goes_on(ctr: Ctr) -> None:
    container = fresh_id("paused")
    with (
        EventLog(ctr.node) as events,
        ctr.popen(
            container,
            "sh",
            "-c",
            'trap "exit 4" TERM; while :; do echo tick; sleep 0.05; done',
            stdout=subprocess.PIPE,
        ) as process,
    ):
        assert process.stdout is not None
        assert process.stdout.readline() == b"tick\n"
        ctr.task("pause", container)
        assert ctr.status(container) == "PAUSED"
        events.expect("/tasks/paused", container)
        ctr.task("resume", container)
        assert ctr.status(container) == "RUNNING"
        events.expect("/tasks/resumed", container)
        for _ in range(20):
            assert process.stdout.readline() == b"tick\n"
        ctr.task("kill", container)
        process.stdout.read()
        assert process.wait(patient(20)) == 4


def test_paused_container_can_be_killed(ctr: Ctr) -> None:
    container = fresh_id("pausekill")
    ctr.start(container, "sleep", "1000")
    ctr.task("pause", container)
    with Tasks(ctr.node) as tasks:
        tasks.kill(container, 9)
        assert tasks.wait(container, timeout_s=15) == 137
    ctr.remove(container)


def test_metrics_and_ps_show_the_container(ctr: Ctr) -> None:
    container = fresh_id("metrics")
    ctr.start(
        container,
        "sh",
        "-c",
        "i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; sleep 1000",
        options=["--memory-limit", str(96 << 20)],
    )
    ctr.exec(container, "sh", "-c", "dd if=/dev/zero of=/big bs=1M count=8 2>/dev/null")
    metrics = ctr.metrics(container)
    text = json.dumps(metrics)
    memory = metrics["memory"]
    assert isinstance(memory, dict)
    usage = memory.get("usage")
    if isinstance(usage, dict):  # cgroup v1's form
        assert int(usage["usage"]) > 0
        assert int(usage["limit"]) == 96 << 20
    else:
        assert int(memory["usage"]) > 0
        assert int(memory["usage_limit"]) == 96 << 20
    assert '"cpu"' in text
    assert '"pids"' in text
    rows = ctr.task("ps", container).stdout.splitlines()
    assert rows[0].split() == ["PID", "INFO"]
    assert len(rows) >= 2
    assert int(rows[1].split()[0]) > 0
    ctr.remove(container)


def test_limits_are_seen_inside_and_change_by_update(ctr: Ctr) -> None:
    container = fresh_id("limits")
    ctr.start(
        container,
        "sleep",
        "1000",
        options=[
            *_CGROUP,
            "--memory-limit",
            str(64 << 20),
            "--cpu-quota",
            "50000",
            "--cpu-period",
            "100000",
        ],
    )
    assert ctr.exec(container, "sh", "-c", _MEMORY).stdout.split() == [str(64 << 20)]
    assert ctr.exec(container, "sh", "-c", _CPU).stdout.split() == ["50000", "100000"]
    with Tasks(ctr.node) as tasks:
        tasks.update(
            container, {"memory": {"limit": 128 << 20}, "cpu": {"quota": 20000, "period": 100000}}
        )
    assert ctr.exec(container, "sh", "-c", _MEMORY).stdout.split() == [str(128 << 20)]
    assert ctr.exec(container, "sh", "-c", _CPU).stdout.split() == ["20000", "100000"]
    ctr.remove(container)


def test_container_over_its_memory_limit_is_killed_and_reported(ctr: Ctr) -> None:
    container = fresh_id("oom")
    with EventLog(ctr.node) as events:
        done = ctr.run(
            container,
            "sh",
            "-c",
            "dd if=/dev/zero of=/dev/null bs=200M count=1; exit $?",
            options=["--rm", "--memory-limit", str(32 << 20)],
        )
        assert done.returncode == 137, done
        events.expect("/tasks/oom", container)
