"""Where a sandbox's cgroup is, what is written into its files and read out of them."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
from pathlib import Path

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from shimv2 import cgroup_move, undo
from shimv2.cgroup_move import Move
from shimv2.cgroup_path import Hierarchy, hierarchies, membership, overhead_path, sandbox_path
from shimv2.cgroup_stats import read_statistics
from shimv2.errors import FailedPrecondition, InvalidArgument
from shimv2.journal import Journal
from shimv2.sandbox_cgroup import HostLimits, SandboxCgroup
from shimv2.stats import metrics
from tests.harness.limitations import documented

MIB = 1 << 20

HYBRID = """\
24 1 0:22 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755
25 24 0:23 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw,nsdelegate
26 24 0:24 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd
27 24 0:25 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct
28 24 0:26 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
29 24 0:27 / /sys/fs/cgroup/freezer rw - cgroup cgroup rw,freezer
30 24 0:26 / /mnt/again rw - cgroup cgroup rw,memory
"""
OWN = """\
4:memory:/system.slice/containerd.service
3:cpu,cpuacct:/
1:name=systemd:/system.slice/containerd.service
0::/system.slice/containerd.service
"""


def test_a_hybrid_host_limits_by_version_1() -> None:
    found = hierarchies(HYBRID, OWN)
    assert [(one.mount_point, one.own_path) for one in found] == [
        ("/sys/fs/cgroup/cpu,cpuacct", ""),
        ("/sys/fs/cgroup/memory", "/system.slice/containerd.service"),
    ]
    assert not any(one.is_unified for one in found)


def test_a_host_of_version_2_has_one_hierarchy() -> None:
    (one,) = hierarchies("30 1 0:26 / /sys/fs/cgroup rw - cgroup2 none rw\n", "0::/a/b\n")
    assert one == Hierarchy("/sys/fs/cgroup", frozenset(), "/a/b")
    assert one.is_unified
    assert one.directory("/x") == "/sys/fs/cgroup/x"


def test_a_host_without_cgroups_has_none() -> None:
    assert hierarchies("24 1 0:22 / / rw - ext4 /dev/sda rw\nnonsense\n", "") == ()


def test_paths_below_a_mounts_own_root_are_seen_without_it() -> None:
    line = "30 1 0:26 /docker/1 /sys/fs/cgroup rw - cgroup2 none rw\n"
    assert hierarchies(line, "0::/docker/1/init\n")[0].own_path == "/init"


@pytest.mark.parametrize(
    ("cgroups_path", "path"),
    [
        ("/kubepods/besteffort/pod1/c1", "/kubepods/besteffort/pod1/kata_s1"),
        ("/default/c1", "/default/kata_s1"),
        ("default/./c1", "/default/kata_s1"),
        ("", "/kata_s1"),
        (
            "kubepods-besteffort-pod1.slice:cri-containerd:c1",
            "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod1.slice/kata_s1.scope",
        ),
        ("-.slice:cri:c1", "/kata_s1.scope"),
        (":docker:c1", "/system.slice/kata_s1.scope"),
    ],
)
def test_the_cgroup_is_beside_where_the_first_containers_would_be(
    cgroups_path: str, path: str
) -> None:
    assert sandbox_path(cgroups_path, "s1") == path


@pytest.mark.parametrize(
    "cgroups_path", ["/a/../../b/c", "../x/c", "/a\0/c", "a--b.slice:x:y", "a/../b.slice:x:y"]
)
def test_a_path_that_leaves_the_hierarchy_is_refused(cgroups_path: str) -> None:
    with pytest.raises(InvalidArgument, match=r"linux.cgroupsPath"):
        sandbox_path(cgroups_path, "s1")


@given(st.text(max_size=60))
def test_no_text_leads_out_of_the_hierarchy(text: str) -> None:
    try:
        path = sandbox_path(text, "s1")
    except InvalidArgument:
        return
    assert path.startswith("/")
    assert ".." not in path.split("/")
    assert path.rpartition("/")[2].startswith("kata_s1")
    assert "\0" not in path


def test_membership_is_by_controller() -> None:
    found = membership(OWN)
    assert (found["cpuacct"], found["memory"]) == ("/", "/system.slice/containerd.service")
    assert found[""] == "/system.slice/containerd.service"


def prepared(root: Path, files: dict[str, str], *controllers: str) -> SandboxCgroup:
    """Make a directory that looks like a cgroup, with its files."""
    (root / "pod").mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (root / "pod" / name).write_text(text)
    hierarchy = Hierarchy(str(root), frozenset(controllers), "")
    return SandboxCgroup([hierarchy], "/pod")


def test_limits_are_written_in_each_versions_words(tmp_path: Path) -> None:
    limits = HostLimits(memory_bytes=64 * MIB, millicpus=1500, shares=1024, cpus="0-1")
    files = dict.fromkeys(("memory.max", "cpu.max", "cpu.weight", "cpuset.cpus"), "")
    assert prepared(tmp_path / "2", files).limit(limits) == []
    pod = tmp_path / "2" / "pod"
    assert [(pod / name).read_text() for name in files] == [
        str(64 * MIB), "150000 100000", "39", "0-1",
    ]  # fmt: skip
    files = dict.fromkeys(
        ("memory.limit_in_bytes", "cpu.cfs_period_us", "cpu.cfs_quota_us", "cpu.shares"), ""
    )
    cgroup = prepared(tmp_path / "1", files, "cpu", "memory")
    assert cgroup.limit(limits) == []
    pod = tmp_path / "1" / "pod"
    assert [(pod / name).read_text() for name in files] == [
        str(64 * MIB), "100000", "150000", "1024",
    ]  # fmt: skip


def test_only_what_changes_is_written_and_what_cant_be_is_told(tmp_path: Path) -> None:
    cgroup = prepared(tmp_path, {"memory.max": "max", "cpuset.cpus": ""})
    assert cgroup.limit(HostLimits(memory_bytes=5, cpus="0")) == []
    (tmp_path / "pod" / "memory.max").write_text("")
    assert cgroup.limit(HostLimits(memory_bytes=5, cpus="")) == []
    assert (tmp_path / "pod" / "memory.max").read_text() == ""
    assert (tmp_path / "pod" / "cpuset.cpus").read_text().strip() != "0"
    problems = cgroup.limit(HostLimits(millicpus=1000))
    assert problems == [f"{tmp_path}/pod/cpu.max: 100000 100000: No such file or directory"]


def test_statistics_of_version_2_become_its_metrics(tmp_path: Path) -> None:
    files = {
        "cpu.stat": "usage_usec 30\nuser_usec 20\nsystem_usec 10\nnr_periods 3\nnr_throttled 2\n",
        "memory.stat": "anon 5\nfile 7\ninactive_file 3\npgfault 9\n",
        "memory.current": "100\n",
        "memory.max": "max\n",
        "memory.events": "oom 2\noom_kill 1\nmax 4\n",
        "pids.current": "12\n",
        "io.stat": "8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0\nbroken\n",
    }
    found = read_statistics(prepared(tmp_path, files))
    kind, encoded = metrics(found, unified=True)
    from shimv2.pb.cgroups_v2_pb2 import Metrics

    shown = Metrics.FromString(encoded)
    assert kind == "io.containerd.cgroups.v2.Metrics"
    assert (shown.cpu.usage_usec, shown.cpu.user_usec, shown.cpu.nr_throttled) == (30, 20, 2)
    assert (shown.memory.usage, shown.memory.inactive_file, shown.memory.anon) == (100, 3, 5)
    assert shown.memory.usage_limit == (1 << 64) - 1
    assert (shown.pids.current, shown.memory_events.oom_kill) == (12, 1)
    assert (shown.io.usage[0].rbytes, shown.io.usage[0].wios) == (1, 4)


def test_statistics_of_version_1_become_its_metrics(tmp_path: Path) -> None:
    files = {
        "cpuacct.usage": "3000\n",
        "cpuacct.stat": "user 2\nsystem 1\n",
        "cpu.stat": "nr_periods 3\nnr_throttled 2\nthrottled_time 5\n",
        "memory.stat": "cache 5\nrss 7\ntotal_inactive_file 3\n",
        "memory.usage_in_bytes": "100\n",
        "memory.limit_in_bytes": "500\n",
        "memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 1\n",
        "pids.current": "12\n",
        "blkio.throttle.io_serviced_recursive": "8:0 Read 3\n8:0 Total 3\nTotal 3\n",
    }
    cgroup = prepared(tmp_path, files, "cpu", "cpuacct", "memory", "pids", "blkio")
    kind, encoded = metrics(read_statistics(cgroup), unified=False)
    from shimv2.pb.cgroups_v1_pb2 import Metrics

    shown = Metrics.FromString(encoded)
    assert kind == "io.containerd.cgroups.v1.Metrics"
    assert shown.cpu.usage.total == 3000
    assert shown.cpu.usage.user == 2 * 1_000_000_000 // os.sysconf("SC_CLK_TCK")
    assert (shown.memory.usage.usage, shown.memory.usage.limit) == (100, 500)
    assert (shown.memory.rss, shown.memory.total_inactive_file) == (7, 3)
    assert (shown.pids.current, shown.memory_oom_control.oom_kill) == (12, 1)
    assert [entry.op for entry in shown.blkio.io_serviced_recursive] == ["Read", "Total"]


def test_an_oom_kill_names_the_nearest_limit(tmp_path: Path) -> None:
    files = {"memory.events": "oom_kill 1\n", "memory.max": "max\n"}
    cgroup = prepared(tmp_path, files)
    assert cgroup.oom_report() == "killed by the host, which is out of memory"
    (tmp_path / "pod" / "memory.max").write_text(f"{64 * MIB}\n")
    assert cgroup.oom_report() == "killed by the host for the memory limit of 64 MiB of /pod"
    (tmp_path / "pod" / "memory.events").write_text("oom_kill 0\n")
    assert cgroup.oom_report() == ""


def test_a_cgroup_that_cant_be_made_is_refused_and_the_journal_knows_it(tmp_path: Path) -> None:
    (tmp_path / "none").write_text("no directory")
    journal = Journal.open(str(tmp_path / "journal"))
    hierarchy = Hierarchy(str(tmp_path / "none"), frozenset({"memory"}), "")
    text = documented(
        "the sandbox's cgroup … cannot be made (…); let containerd make cgroups there"
    )
    with pytest.raises(FailedPrecondition, match=text):
        SandboxCgroup.make([hierarchy], "/pod/kata_s1", journal)
    assert [entry.kind for entry in journal.held] == ["cgroup"]
    assert journal.undo() == []
    journal.close()


def sleeper() -> subprocess.Popen[bytes]:
    return subprocess.Popen(["sleep", "60"])


async def test_a_move_tells_which_directory_refused(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "cgroup.procs").write_text("")
    directories = [str(tmp_path / "one"), str(tmp_path / "two")]
    # A process without children: a plain file keeps only what is written last.
    with sleeper() as process:
        async with Move.start([process.pid], directories) as move:
            failures = await move.done()
        process.kill()
    assert list(failures) == [directories[1]]
    assert failures[directories[1]].strerror == "No such file or directory"
    assert (tmp_path / "one" / "cgroup.procs").read_text() == str(process.pid)


async def test_a_move_that_is_stuck_in_the_kernel_holds_nobody_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with sleeper() as stuck:
        reading, writing = os.pipe()
        os.close(writing)
        move = Move(stuck.pid, os.pidfd_open(stuck.pid), reading, [str(tmp_path)])
        with monkeypatch.context() as patched:
            patched.setattr(signal, "pidfd_send_signal", lambda *_: None)  # it is not heard
            patched.setattr(cgroup_move, "EXIT_S", 0.05)
            with trio.fail_after(30):
                await move.aclose()
                await move.aclose()
        assert stuck.poll() is None
        stuck.kill()


async def test_what_was_killed_inside_is_waited_for_beside_the_loop(tmp_path: Path) -> None:
    cgroup = prepared(tmp_path, {}, "memory")
    with sleeper() as dying:
        (tmp_path / "pod" / "cgroup.procs").write_text(f"{dying.pid}\n{os.getpid()}\n")
        is_empty = []

        async def wait() -> None:
            await cgroup.emptied()
            is_empty.append(dying.poll())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            assert not is_empty
            dying.kill()
        assert is_empty == [-signal.SIGKILL]


def test_a_shim_that_serves_waits_for_no_strangers_cgroup(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy(_: str) -> None:
        raise OSError(errno.EBUSY, "busy")

    def left(*_: object) -> None:
        raise AssertionError("waited")

    journal = Journal.open(str(tmp_path / "journal"))
    journal.take("cgroup", path=str(tmp_path / "s1"), back="")
    with monkeypatch.context() as patched:
        patched.setattr(os, "rmdir", busy)
        patched.setattr(undo, "LIVE_LEAVE_DEADLINE_S", 0.0)
        patched.setattr(undo, "_wait_for_a_change", left)
        (problem,) = journal.undo()
    assert "are still in it" in problem
    assert [entry.kind for entry in journal.held] == ["cgroup"]
    assert journal.undo() == []
    journal.close()


async def test_a_shim_that_has_no_process_to_leave_with_tells_it_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused() -> int:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(os, "fork", refused)
    cgroup = prepared(tmp_path, {}, "memory")
    monkeypatch.setattr(SandboxCgroup, "_is_inside", lambda *_: True)
    (problem,) = await cgroup.leave()
    assert problem.startswith("the shim did not leave /pod: ")
    assert "Resource temporarily unavailable" in problem


def test_the_overhead_cgroup_is_outside_of_every_pods() -> None:
    assert overhead_path("s1") == "/kata_overhead/s1"


def test_undoing_removes_an_empty_cgroup_and_the_last_one_its_parent(tmp_path: Path) -> None:
    one, two = tmp_path / "kata_overhead" / "s1", tmp_path / "kata_overhead" / "s2"
    one.mkdir(parents=True)
    two.mkdir()
    assert undo.cgroup({"path": str(one), "back": ""}) is None
    assert two.exists()
    assert undo.cgroup({"path": str(two), "back": ""}) is None
    assert not two.parent.exists()
    assert undo.cgroup({"path": str(one), "back": ""}) is None


def test_a_shim_whose_service_is_gone_leaves_to_the_root_of_the_hierarchy(tmp_path: Path) -> None:
    root, own = tmp_path / "memory", tmp_path / "memory" / "pod" / "s1"
    own.mkdir(parents=True)
    for each in (root, root / "pod", own):
        (each / "cgroup.procs").write_text("")
    (own / "cgroup.procs").write_text(f"{os.getpid()}\n")
    undo._leave(str(own), str(root / "system.slice" / "containerd.service"))
    assert (root / "cgroup.procs").read_text() == str(os.getpid())
    assert (root / "pod" / "cgroup.procs").read_text() == ""
