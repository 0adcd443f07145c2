"""Find what a test left behind on its node, and who holds it.

A snapshot lists, by kind, everything a shim may take: processes, mounts, links, sockets, cgroups,
files, fds of long-lived processes. Two snapshots are compared; what is only in the later one is a
leak. Things end asynchronously after a Delete (a process exits, containerd removes a bundle), so
the comparison is repeated until a deadline.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tests.harness.containerd_daemon import ROOT, STATE
from tests.harness.patience import patient
from tests.harness.pod_network import ADDRESSES, BRIDGE, NETWORKS

if TYPE_CHECKING:
    from tests.harness.node import Node

# A leak stays; what a busy machine has yet to take down goes, if late.
DEADLINE_S = 20.0
_POLL_S = 0.05
_TASKS = "io.containerd.runtime.v2.task"
_SANDBOXES = "io.containerd.sandbox.controller.v1.shim"
_FILE_ROOTS = (
    "/run", "/tmp", "/dev/shm", "/var/lib/cni", f"{ROOT}/{_TASKS}", f"{ROOT}/{_SANDBOXES}",
)  # fmt: skip
# Failure reports outlive their sandbox on purpose (at most 32).
_SKIPPED = (ROOT, "/run/.node", "/run/kata-reports")
#: Parents that stay once made; what lies in them doesn't.
_KEPT_DIRECTORIES = {
    "/run/kata",
    "/run/kata-containers",
    "/run/vc",
    "/run/runc",
    "/run/mount",
    "/run/containerd/s",
    "/run/containerd/fifo",
    "/run/containerd/runc",
    "/run/containerd/runc/k8s.io",
    "/run/containerd/io.containerd.grpc.v1.cri/containers",
    "/run/containerd/io.containerd.grpc.v1.cri/sandboxes",
    f"{STATE}/{_TASKS}/k8s.io",
    f"{STATE}/{_TASKS}/moby",
    f"{ROOT}/{_TASKS}/moby",
    f"{ROOT}/{_TASKS}/k8s.io",
    *(f"{ADDRESSES}/{network}" for network in NETWORKS),
    f"{STATE}/{_SANDBOXES}/k8s.io",
    f"{ROOT}/{_SANDBOXES}/k8s.io",
    ADDRESSES,
    "/var/lib/cni/results",
}
#: What the first pod of a node makes for all that follow.
_KEPT_LINKS = {BRIDGE}
_KEPT_FILES = {
    f"{ADDRESSES}/{network}/{name}"
    for network in NETWORKS
    for name in ("lock", "last_reserved_ip.0", "last_reserved_ip.1")
}


@dataclass(frozen=True)
class Leak:
    """One thing that is there after the test and wasn't before."""

    kind: str
    name: str
    owner: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.name}" + (f" (owner: {self.owner})" if self.owner else "")


@dataclass
class Snapshot:
    """Names of what exists, by kind. `inodes` leads from a socket's name to its holders."""

    things: dict[str, dict[str, str]] = field(default_factory=dict)

    def add(self, kind: str, name: str, hint: str = "") -> None:
        self.things.setdefault(kind, {})[name] = hint


def take_snapshot(node: Node, long_lived: Iterable[int] = ()) -> Snapshot:
    """List what exists on the node; `long_lived` are outer pids whose fds are listed, too."""
    snapshot = Snapshot()
    for name, hint in _processes(node):
        snapshot.add("process", name, hint)
    for line in _lines(Path(f"/proc/{node.pid}/mountinfo")):
        fields = line.split()
        source = " ".join(fields[fields.index("-") + 1 :])
        snapshot.add("mount", f"{fields[4]} [{fields[0]}]", source)
    for name, hint in _loop_devices(node):
        snapshot.add("loop device", name, hint)
    for line in _lines(Path("/proc/self/mountinfo")):
        if node.name in line:
            snapshot.add("mount outside the node", line.split()[4])
    for line in _lines(Path(f"/proc/{node.pid}/net/dev"))[2:]:
        name = line.partition(":")[0].strip()
        if name not in _KEPT_LINKS:
            snapshot.add("link", name)
    for line in _lines(Path(f"/proc/{node.pid}/net/unix"))[1:]:
        fields = line.split()
        if len(fields) > 7:
            snapshot.add("socket", fields[7], f"socket:[{fields[6]}]")
    for path in node.cgroups():
        if path.name != node.name:
            snapshot.add("cgroup", str(path))
    for root in _FILE_ROOTS:
        for name in _files(node, root):
            snapshot.add("file", name)
    for name in _held_paths(node, node.containerd.pid):
        snapshot.add("fd of containerd", name)
    for pid in long_lived:
        for name in _held_paths(node, pid):
            snapshot.add(f"fd of pid {pid}", name)
    return snapshot


def find_leaks(node: Node, before: Snapshot, after: Snapshot) -> list[Leak]:
    """Return what is only in `after`, with its owner where one can be found."""
    leaks: list[Leak] = []
    for kind, names in after.things.items():
        known = before.things.get(kind, {})
        leaks += [Leak(kind, name, hint) for name, hint in names.items() if name not in known]
    if not any(leak.kind in {"socket", "file"} for leak in leaks):
        return leaks
    holders = _holders(node)
    return [
        Leak(leak.kind, leak.name, holders.get(leak.owner or leak.name, ""))
        if leak.kind in {"socket", "file"}
        else leak
        for leak in leaks
    ]


def wait_for_no_leaks(
    node: Node, before: Snapshot, *, long_lived: Iterable[int] = (), deadline_s: float = DEADLINE_S
) -> list[Leak]:
    """Compare with `before` until nothing is left or the deadline has passed; return the rest."""
    pids = tuple(long_lived)
    deadline = time.monotonic() + patient(deadline_s)
    while True:
        leaks = find_leaks(node, before, take_snapshot(node, pids))
        if not leaks or time.monotonic() > deadline:
            return leaks
        time.sleep(_POLL_S)  # processes and files of others have no event that says "all gone"


def _processes(node: Node) -> Iterator[tuple[str, str]]:
    for process in node.processes():
        if process.comm == "containerd" and process.parent in {0, 1}:
            continue  # the daemon itself, which a test may have restarted
        name = f"{process.comm} pid={process.pid} start={process.start_ticks}"
        yield name, f"state {process.state}, child of {process.parent}: {process.command}"


def _loop_devices(node: Node) -> Iterator[tuple[str, str]]:
    """Loop devices over files of the node's own file systems; others' belong to the machine."""
    of_node, of_machine = (
        {line.split()[2] for line in _lines(Path(f"/proc/{pid}/mountinfo"))}
        for pid in (node.pid, "self")
    )
    listing = subprocess.run(
        ["losetup", "--list", "--noheadings", "--raw", "-O", "NAME,BACK-MAJ:MIN,BACK-FILE"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    for line in listing.stdout.splitlines():
        match line.split(maxsplit=2):
            case name, device, file if device in of_node - of_machine:
                yield name, file
            case _:
                pass  # of the machine's, or freed while losetup looked: then it has no file


def _files(node: Node, root: str) -> Iterator[str]:
    base = str(node.path("")).rstrip("/")
    for directory, names, files in os.walk(base + root):
        inside = directory[len(base) :]
        names[:] = [
            name
            for name in names
            if f"{inside}/{name}" not in _SKIPPED
            and _device(f"{directory}/{name}") == _device(directory)
        ]
        if inside in _KEPT_DIRECTORIES or inside.rpartition("/")[2] == node.name:
            pass
        elif inside not in {root, STATE}:
            yield inside + "/"
        yield from {f"{inside}/{name}" for name in files} - _KEPT_FILES


def _device(path: str) -> int:
    try:
        return os.lstat(path).st_dev
    except FileNotFoundError:
        return -1


def _held_paths(node: Node, pid: int) -> Iterator[str]:
    try:
        entries = os.listdir(f"/proc/{pid}/fd")
    except OSError:
        return
    for entry in entries:
        try:
            target = os.readlink(f"/proc/{pid}/fd/{entry}")
        except OSError:
            continue
        ours = node.name in target or f"/{_TASKS}/" in target or target.endswith("(deleted)")
        if ours and target != str(node.containerd.log_path):
            yield target


def _holders(node: Node) -> dict[str, str]:
    """Map what an fd of the node's processes leads to onto `comm pid` of its holder."""
    holders: dict[str, str] = {}
    for process in node.processes():
        with contextlib.suppress(OSError):
            for entry in (process.directory / "fd").iterdir():
                holders[os.readlink(entry)] = f"{process.comm} pid={process.pid}"
    return holders


def _lines(path: Path) -> list[str]:
    return path.read_text(errors="replace").splitlines()
