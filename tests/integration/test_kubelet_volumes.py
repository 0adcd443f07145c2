"""The volumes of a pod as kubelet makes them: in memory, on disk, and changed while in use."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from tests.harness.ctr import Ctr, fresh_id
from tests.harness.ctr_pod import Pod, bind
from tests.harness.kubelet import PodVolumes
from tests.harness.node import REPOSITORY
from tests.harness.oci_image import busybox_entries, write_rootfs
from tests.integration.volumes import PYTHON, probe

if TYPE_CHECKING:
    from tests.harness.node import Node

VECTORS = REPOSITORY / "tests" / "vectors" / "oci"

pytestmark = pytest.mark.usefixtures("kata_only")


@pytest.fixture
def volumes(node: Node) -> Iterator[PodVolumes]:
    volumes = PodVolumes(node)
    yield volumes
    volumes.remove()


@pytest.fixture
def pod(ctr: Ctr) -> Iterator[Pod]:
    pod = Pod(ctr, fresh_id("pod"))
    yield pod
    pod.remove()


def said(pod: Pod, container: str, script: str) -> str:
    done = pod.ctr.exec(container, "sh", "-c", script)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_empty_dir_in_memory_is_the_guests_and_the_pods(pod: Pod, volumes: PodVolumes) -> None:
    cache = volumes.memory("cache", "size=4m", group=2000)
    shm = volumes.memory("shm", "size=24m")
    part = volumes.sub_path(cache, "part", "two")
    trap = volumes.sub_path(cache, "trap", "four")
    pod_shm = "/tmp/kubelet/shm"
    volumes.outside(pod_shm).mkdir()
    volumes.mount(pod_shm, "tmpfs", "size=8m,mode=1777")
    pod.start_sandbox(bind(pod_shm, "/dev/shm", "rbind:ro"))
    pods = bind(pod_shm, "/dev/shm")
    one = pod.start("one", "sleep", "1000", options=[*bind(cache, "/cache"), *pods])
    two = pod.start("two", "sleep", "1000", options=[*bind(part, "/part"), *bind(shm, "/dev/shm")])
    three = pod.start(
        "three", "sleep", "1000", options=[*bind(cache, "/cache", "rbind:rprivate:ro"), *pods]
    )
    size = "df -k {} | tail -1 | awk '{{print $2}}'"
    assert said(pod, one, "stat -c '%a %u:%g' /cache; grep -c ' /cache tmpfs ' /proc/mounts") == (
        "2777 0:2000\n1\n"
    )
    assert said(pod, one, size.format("/cache")) == "4096\n"
    full = pod.ctr.exec(one, "dd", "if=/dev/zero", "of=/cache/big", "bs=1M", "count=5")
    assert "No space left on device" in full.stderr
    said(pod, one, "rm /cache/big; echo mine >/cache/part/file; echo x >/dev/shm/x")
    assert said(pod, two, "cat /part/file; echo yours >/part/file") == "mine\n"
    assert said(pod, three, "cat /cache/part/file /dev/shm/x") == "yours\nx\n"
    assert "Read-only" in pod.ctr.exec(three, "touch", "/cache/no").stderr
    assert said(pod, three, size.format("/dev/shm")) == "8192\n"
    assert said(pod, two, size.format("/dev/shm")) == "24576\n"
    # Nothing of it is on the host but what kubelet made there.
    assert {path.name for path in volumes.outside(cache).iterdir()} == {"part", "trap"}

    # A container that puts a link where another's subPath is leads it nowhere.
    said(pod, one, "ln -s / /cache/trap")
    with pytest.raises(AssertionError, match="trap"):
        pod.start("four", "sleep", "1000", options=bind(trap, "/trap"))


@pytest.mark.needs("shared_directory")
def test_empty_dir_on_disk_is_the_hosts(pod: Pod, volumes: PodVolumes) -> None:
    """kubelet counts what lies there, and evicts a pod that exceeds its sizeLimit."""
    data = volumes.empty_dir("data", group=2000)
    pod.start_sandbox()
    reader = pod.start("reader", "sleep", "1000", options=bind(data, "/data", "rbind:ro"))
    writer = pod.start("writer", "sleep", "1000", options=bind(data, "/data"))
    said(pod, writer, "echo counted >/data/file; mkfifo /data/fifo")
    written = volumes.outside(data) / "file"
    assert (written.read_text(), written.stat().st_gid) == ("counted\n", 2000)
    assert said(pod, reader, "cat /data/file") == "counted\n"
    assert "Read-only" in pod.ctr.exec(reader, "touch", "/data/no").stderr
    # One directory for both: what one writes into a fifo the other reads.
    pod.ctr.exec(writer, "sh", "-c", "echo through >/data/fifo & sleep 0.1")
    assert said(pod, reader, "cat /data/fifo") == "through\n"


def test_updates_of_configmaps_and_secrets_are_seen_with_events(
    ctr: Ctr, node: Node, volumes: PodVolumes
) -> None:
    watched = volumes.volume("configmap", "watched")
    large = volumes.volume("projected", "large")
    many = {f"key{number:03}": "x" for number in range(200)}
    volumes.write_atomically(watched, {"key": "0", "gone": "x"})
    volumes.write_atomically(large, {**many, "key": "0"})
    container = fresh_id("watch")
    process = ctr.popen(
        container,
        *probe("watch", "/config/key", "/config"),
        options=["--rm", *PYTHON, *bind(watched, "/config", "rbind:rprivate:ro"),
                 *bind(large, "/large", "rbind:rprivate:ro")],
        stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    assert json.loads(process.stdout.readline())[0] == "0"
    for turn in ("1", "2"):
        volumes.write_atomically(watched, {"key": turn, "new": "x"})
        volumes.write_atomically(large, {**many, "key": turn})
        seen, _, events = json.loads(process.stdout.readline())
        assert seen == turn
        assert "..data" in events
    names = ctr.exec(container, "ls", "/config").stdout.split()
    assert names == ["key", "new"]
    deadline = time.monotonic() + 30
    while ctr.exec(container, "cat", "/large/key").stdout != "2":
        assert time.monotonic() < deadline
    assert "Read-only" in ctr.exec(container, "touch", "/config/no").stderr
    ctr.remove(container)
    process.wait(30)
    process.stdout.close()


def test_empty_dir_of_huge_pages_has_the_containers_pages(
    ctr: Ctr, node: Node, volumes: PodVolumes
) -> None:
    """Without CRI, which knows no such limits where the host has no hugetlb cgroup."""
    pages = volumes.volume("empty-dir", "pages")
    volumes.mount(pages, "hugetlbfs", "pagesize=2M")
    volumes.outside(pages).chmod(0o777)
    root = "/tmp/kubelet/root"
    write_rootfs(busybox_entries(), node.path(root))
    spec = json.loads((VECTORS / "ctr-run.json").read_text())
    spec["root"]["path"] = root
    spec["process"] |= {"args": ["sleep", "1000"], "terminal": False}
    spec["mounts"].append({"destination": "/pages", "type": "bind", "source": pages,
                           "options": ["rbind", "rw"]})  # fmt: skip
    spec["linux"].setdefault("resources", {})["hugepageLimits"] = [
        {"pageSize": "2MB", "limit": 4 << 20}
    ]
    node.write("/tmp/kubelet/config.json", json.dumps(spec))
    container = fresh_id("pages")
    start = ["ctr", "run", "-d", "--null-io", "--runtime", ctr.runtime]
    node.run([*start, "--config", "/tmp/kubelet/config.json", container])
    (line,) = [
        line
        for line in ctr.exec(container, "cat", "/proc/mounts").stdout.splitlines()
        if " /pages " in line
    ]
    assert line.split()[2] == "hugetlbfs"
    assert {"pagesize=2M", f"size={4 << 20}", "mode=777"} <= set(line.split()[3].split(","))
    meminfo = ctr.exec(container, "cat", "/proc/meminfo").stdout
    assert dict(row.split()[:2] for row in meminfo.splitlines())["HugePages_Total:"] == "2"
    ctr.remove(container)
