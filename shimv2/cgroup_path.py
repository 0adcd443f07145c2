"""Where a sandbox's cgroup is in each of the host's hierarchies. Pure.

    cgroupsPath of the spec                      sandbox's cgroup, below every mount point
    /kubepods/besteffort/pod1/<container>        /kubepods/besteffort/pod1/kata_<sandbox>
    kubepods-pod1.slice:cri-containerd:<id>      /kubepods.slice/kubepods-pod1.slice/kata_<…>.scope

Source: Kata resourcecontrol: the leaf is renamed to kata_<id>; systemd.slice(5): a slice's name is
its path; cgroups(7), proc_pid_mountinfo(5).
"""

from __future__ import annotations

from typing import Final, NamedTuple

from shimv2.errors import InvalidArgument

PREFIX: Final = "kata_"
OVERHEAD: Final = "/kata_overhead"
# Of version 1: what a VMM's use of is counted or limited. The others only name groups of tasks.
JOINED: Final = frozenset({"cpu", "cpuacct", "cpuset", "memory", "pids", "blkio", "hugetlb"})


class Hierarchy(NamedTuple):
    """One tree of cgroups. `controllers` are version 1's; version 2's one tree has none here."""

    mount_point: str
    controllers: frozenset[str]
    own_path: str  # of the process that looked

    @property
    def is_unified(self) -> bool:
        return not self.controllers

    def directory(self, path: str) -> str:
        return f"{self.mount_point}{path}"


def hierarchies(mountinfo: str, own_cgroups: str) -> tuple[Hierarchy, ...]:
    """Read /proc/self/mountinfo and /proc/self/cgroup.

    A host with both versions (hybrid) limits by version 1; its version 2 is not touched.
    """
    own = membership(own_cgroups)
    found: dict[frozenset[str], Hierarchy] = {}
    for line in mountinfo.splitlines():
        before, separator, after = line.partition(" - ")
        fields, rest = before.split(), after.split()
        if (
            not separator
            or len(fields) < 5
            or len(rest) < 3
            or rest[0] not in ("cgroup", "cgroup2")
        ):
            continue
        controllers = frozenset(rest[2].split(",")) & JOINED
        if (rest[0] == "cgroup" and not controllers) or controllers in found:
            continue
        path = next((own[name] for name in controllers if name in own), own.get("", "/"))
        root = fields[3].rstrip("/")
        inside = path.removeprefix(root) if path.startswith(f"{root}/") else ""
        found[controllers] = Hierarchy(fields[4], controllers, inside.rstrip("/"))
    if len(found) > 1:
        found.pop(frozenset(), None)
    return tuple(found.values())


def membership(text: str) -> dict[str, str]:
    """Read /proc/<pid>/cgroup: the path by controller; version 2's under ""."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        _, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        for name in names.split(","):
            found[name] = path
    return found


def sandbox_path(cgroups_path: str, sandbox_id: str) -> str:
    """Return the sandbox's cgroup: beside where its first container's would be.

    Raises:
        InvalidArgument: a path that leaves the hierarchy.
    """
    parts = cgroups_path.split(":")
    if len(parts) == 3 and (not parts[0] or parts[0].endswith(".slice")):
        parent, leaf = _slice_path(parts[0] or "system.slice"), f"{PREFIX}{sandbox_id}.scope"
    else:
        parent, leaf = cgroups_path.strip("/").rpartition("/")[0], f"{PREFIX}{sandbox_id}"
    names = [name for name in parent.split("/") if name not in ("", ".")]
    if ".." in names or "\0" in parent:
        raise InvalidArgument(f"linux.cgroupsPath is {cgroups_path[:200]!r}: it must not go up")
    return "/".join(["", *names, leaf])


def overhead_path(sandbox_id: str) -> str:
    """Return the sandbox's cgroup outside of its pod's."""
    return f"{OVERHEAD}/{sandbox_id}"


def _slice_path(name: str) -> str:
    """A dash in a slice's name is a level: a-b.slice is in a.slice."""
    words = name.removesuffix(".slice").split("-")
    if words in ([""], ["", ""]):
        return ""  # -.slice is the root
    if "" in words or "/" in name:
        raise InvalidArgument(f"linux.cgroupsPath names {name[:200]!r}: not a slice of systemd's")
    return "/".join("-".join(words[: count + 1]) + ".slice" for count in range(len(words)))
