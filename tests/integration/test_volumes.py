"""Volumes as one container and as a pod sees them: what files can do there, and who sees what."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from tests.harness.configuration import changed_configuration, with_value
from tests.harness.ctr import KATA, RUNTIME, Ctr, fresh_id
from tests.harness.ctr_pod import Pod, bind
from tests.harness.parts import find_shims
from tests.integration.volumes import PYTHON, probe

if TYPE_CHECKING:
    from pathlib import Path

    from tests.harness.node import Node


@pytest.fixture
def volume(node: Node) -> Iterator[Path]:
    """A directory of the node at /tmp/volume, on a mount whose later mounts reach others."""
    directory = node.path("/tmp/volume")
    directory.mkdir()
    node.run(["mount", "--bind", "/tmp/volume", "/tmp/volume"])
    node.run(["mount", "--make-shared", "/tmp/volume"])
    yield directory
    node.run(["umount", "--lazy", "--recursive", "/tmp/volume"])
    node.run(["rm", "-r", "/tmp/volume"])


@pytest.fixture
def pod(ctr: Ctr, kata_only: None) -> Iterator[Pod]:
    pod = Pod(ctr, fresh_id("pod"))
    pod.start_sandbox()
    yield pod
    pod.remove()


FILES = {
    "mode": "0o4751",
    "owner": "12345:54321",
    "links": [2, True],
    "symlinks": ["/etc/passwd", False],
    "absolute symlink leads to": "root:",
    "fifo": "fifo",
    "socket": "socket",
    "device": None,
    "open device": None,
    "open device where devices are off": "EACCES",
    "execute where programs are off": "EACCES",
    "sparse": {"size": 6 << 30, "little": True, "data at": 5 << 30},
    "map": "mapped",
    "odd name": True,
    "long name": 1,
    "too long name": "ENAMETOOLONG",
    "many": 600,
    "renamed over": "mapped",
}


@pytest.mark.needs("shared_directory")
def test_files_of_every_kind_behave_in_a_volume_and_on_the_root(ctr: Ctr, volume: Path) -> None:
    os.chown(volume, 4711, 4712)
    volume.chmod(0o2777)
    inert = bind("/tmp/volume", "/inert", "rbind:rw:nodev:nosuid:noexec:relatime")
    container = fresh_id("files")
    options = [*PYTHON, *bind("/tmp/volume", "/data"), *inert]
    ctr.start(container, "sleep", "1000", options=options)
    done = ctr.exec(container, *probe("files", "/data", "/inert"), timeout_s=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.pop("owner of the directory") == "4711:4712"
    assert found.pop("xattr") == ("ENOTSUP" if RUNTIME == KATA else None)
    assert found == FILES
    status = os.stat(volume / "hard")
    assert (status.st_uid, status.st_gid) == (12345, 54321)
    assert os.readlink(volume / "absolute") == "/etc/passwd"
    assert os.stat(volume / "sparse").st_size == 6 << 30
    assert ctr.exec(container, "mkdir", "/own").returncode == 0
    done = ctr.exec(container, *probe("files", "/own", "/own"), timeout_s=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    without = ("owner of the directory", "xattr", *[name for name in FILES if " where " in name])
    assert {key: value for key, value in found.items() if key not in without} == {
        key: value for key, value in FILES.items() if key not in without
    }
    ctr.remove(container)


@pytest.mark.needs("shared_directory")
def test_containers_of_a_pod_meet_in_a_volume(pod: Pod, volume: Path) -> None:
    """Locks, maps, sockets and inotify need one file system in the guest, not one a container."""
    options = [*PYTHON, *bind("/tmp/volume", "/data")]
    one = pod.start("serve", *probe("serve", "/data"), options=options)
    two = pod.start("meet", "sleep", "1000", options=options)
    done = pod.ctr.exec(two, *probe("meet", "/data"), timeout_s=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "flock": "EAGAIN",
        "fcntl": "EAGAIN",
        "socket": "done",
        "map": ["\0" * 5, "truth"],
        "inotify": True,
    }
    # The directory stays while one of them has it.
    pod.ctr.remove(one)
    pod.members.remove(one)
    (volume / "late").write_text("late\n")
    assert pod.ctr.exec(two, "cat", "/data/late").stdout == "late\n"


@pytest.mark.needs("shared_directory")
def test_later_mounts_of_the_host_appear_as_the_volume_asks(
    ctr: Ctr, node: Node, volume: Path, kata_only: None
) -> None:
    (volume / "below").mkdir()
    container = fresh_id("propagation")
    ctr.start(
        container,
        "sleep",
        "1000",
        options=[
            *bind("/tmp/volume", "/follows", "rbind:rslave:rw"),
            *bind("/tmp/volume", "/private", "rbind:rprivate:rw"),
            *bind("/tmp/volume", "/both", "rbind:rshared:rw"),
        ],
    )
    node.run(["mount", "-t", "tmpfs", "tmpfs", "/tmp/volume/below"])
    (volume / "below" / "file").write_text("mounted\n")
    wait = "for i in $(seq 100); do [ -e {} ] && exit; sleep 0.1; done; exit 1"
    for place in ("/follows", "/both"):
        found = ctr.exec(container, "sh", "-c", wait.format(f"{place}/below/file"))
        assert found.returncode == 0, place
    assert ctr.exec(container, "ls", "/private/below").stdout == ""
    # What the guest has looked at is busy: it goes lazily, and the guest then sees what is below.
    node.run(["umount", "--lazy", "/tmp/volume/below"])
    gone = wait.format("/follows/below/file").replace("[ -e", "[ ! -e")
    assert ctr.exec(container, "sh", "-c", gone).returncode == 0
    assert "what the container mounts there stays in the VM" in node.containerd.log_path.read_text()
    ctr.remove(container)


@pytest.mark.needs("shared_directory")
def test_read_only_volume_stays_so_for_a_privileged_container(
    ctr: Ctr, node: Node, volume: Path, kata_only: None
) -> None:
    """It is root of its VM and may mount what it likes there; the host's side is read-only."""
    (volume / "greeting").write_text("hello\n")
    node.write("/tmp/operators/note", "for the guest\n")
    script = """
    mount -o remount,rw /data; mount -o remount,rw,bind /data; grep ' /data ' /proc/mounts >&2
    for place in /data /one; do (echo x >>$place/greeting) 2>/dev/null || echo refused; done
    touch /data/new || echo refused; rm /data/greeting || echo refused
    mknod /data/null c 1 3 || echo refused; chmod 0 /data/greeting || echo refused
    ln -s /etc /data/link || echo refused
    """
    container = fresh_id("hostile")
    with changed_configuration(node, with_sandbox_mount):
        ctr.start(
            container,
            "sleep",
            "1000",
            options=["--privileged", *bind("/tmp/volume", "/data", "rbind:ro")],
        )
    done = ctr.exec(container, "sh", "-c", script)
    assert done.stdout == "refused\n" * 7, done.stderr
    assert os.listdir(volume) == ["greeting"]
    assert (volume / "greeting").read_text() == "hello\n"
    (shim,) = find_shims(ctr)
    (note,) = (shim.directory / "root/run/kata").glob("*/share/sandbox-mounts/note")
    assert note.read_text() == "for the guest\n"
    with pytest.raises(OSError, match="Read-only"):
        note.write_text("x")
    ctr.remove(container)
    node.run(["rm", "-r", "/tmp/operators"])


def with_sandbox_mount(text: str) -> str:
    """The configuration with a file of the operator's in every guest."""
    if "\nsandbox_bind_mounts =" in text:
        return with_value(text, "sandbox_bind_mounts", '["/tmp/operators/note"]')
    return text.replace("[runtime]\n", '[runtime]\nsandbox_bind_mounts = ["/tmp/operators/note"]\n')


@pytest.mark.parametrize(
    ("mount", "text"),
    [
        (
            "type=nfs,src=server:/x,dst=/data,options=rw",
            "mount /data: filesystem type 'nfs' cannot be mounted in the VM; mount it on the host "
            "and bind it",
        ),
        (
            "type=cifs,src=//server/x,dst=/data,options=rw",
            "mount /data: filesystem type 'cifs' cannot be mounted in the VM",
        ),
        (
            "type=bind,src=/run/socket,dst=/data,options=rbind",
            "mount /data: /run/socket is a unix socket of the host, which a VM cannot reach; "
            "remove the mount",
        ),
        (
            "type=bind,src=/run/fifo,dst=/data,options=rbind",
            "mount /data: /run/fifo is a fifo of the host",
        ),
        (
            "type=bind,src=/run/node,dst=/data,options=rbind",
            "mount /data: /run/node is a character device of the host",
        ),
    ],
    ids=["nfs", "cifs", "socket", "fifo", "device"],
)
def test_volume_that_no_vm_can_have_is_refused_with_a_sentence(
    ctr: Ctr, node: Node, kata_only: None, mount: str, text: str
) -> None:
    listen = "import socket; socket.socket(socket.AF_UNIX).bind('/run/socket')"
    node.run(["python3", "-c", listen])
    node.run(["mkfifo", "/run/fifo"])
    node.run(["mknod", "/run/node", "c", "10", "200"])
    container = fresh_id("refused")
    done = ctr.run(container, "true", options=["--rm", "--mount", mount])
    assert done.returncode != 0
    assert text in done.stderr
    node.run(["rm", "/run/socket", "/run/fifo", "/run/node"])
    ctr.remove(container)
