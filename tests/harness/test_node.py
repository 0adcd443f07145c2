"""What a node takes for its own, and gives back, without one being started."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.harness import leaks, node
from tests.harness.containerd_daemon import ContainerdVersion
from tests.harness.node import Node


@pytest.fixture
def of_tests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Node:
    """A node that is named kt1n1, with a hierarchy of cgroups at `tmp_path`."""
    monkeypatch.setattr(node, "_cgroup_mounts", lambda: [str(tmp_path / "cgroup")])
    made = Node(ContainerdVersion("2.2", tmp_path), log_directory=tmp_path)
    made.name = "kt1n1"
    return made


def test_cgroups_of_a_node_are_not_those_of_one_whose_number_begins_with_its_own(
    of_tests: Node, tmp_path: Path
) -> None:
    own = [tmp_path / "cgroup" / path for path in ("kt1n1", "kt1n1/kata_c", "kata_kt1n1-c")]
    for directory in (*own, tmp_path / "cgroup/kt1n10/kata_c"):
        directory.mkdir(parents=True)
    assert sorted(of_tests.cgroups()) == sorted(own)


def test_node_that_does_not_end_in_time_still_gives_its_cgroups_back(
    of_tests: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cgroup/kt1n1").mkdir(parents=True)
    process = subprocess.Popen(["sleep", "1000"])
    of_tests._started.append(process)

    def late(timeout: float) -> int:
        raise subprocess.TimeoutExpired("sleep", timeout)

    monkeypatch.setattr(process, "wait", late)
    with pytest.raises(subprocess.TimeoutExpired):
        of_tests.stop()
    subprocess.Popen.wait(process)
    assert of_tests.cgroups() == []


def test_loop_device_without_a_file_is_nobodys(
    of_tests: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_tests.pid = 1
    rows = {"/proc/1/mountinfo": ["1 0 7:1 /"], "/proc/self/mountinfo": ["1 0 8:1 /"]}
    monkeypatch.setattr(leaks, "_lines", lambda path: rows[str(path)])
    listing = "/dev/loop0 7:1\n/dev/loop1 7:1 /a file\n/dev/loop2 8:1 /other\n"
    monkeypatch.setattr(
        subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0, listing)
    )
    assert list(leaks._loop_devices(of_tests)) == [("/dev/loop1", "/a file")]
