"""The cgroup of a sandbox on the host: the shim, the VMM and its daemons are in it.

    make ──> settle: all inside, then the VMM is launched ──> limit … ──> leave ──> (journal: gone)

Only the shim is moved: what it starts from then on is born inside, the VMM above all. A daemon that
was faster is fetched. Before the end the shim goes back to where containerd had started it, because
a cgroup with a process in it can't be removed, and kubelet ends what it finds in a dead pod's.
Limits of the pod are kubelet's, on the cgroup above; here are those of a container without a pod.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Final, NamedTuple

import trio

from shimv2.cgroup_files import numbers, read, write
from shimv2.cgroup_move import Move
from shimv2.cgroup_path import Hierarchy, membership
from shimv2.errors import FailedPrecondition
from shimv2.undo import LEAVE_DEADLINE_S, processes

if TYPE_CHECKING:
    from shimv2.journal import Journal

_PERIOD_US: Final = 100_000
_MIB: Final = 1 << 20
# A daemon that was forked while the shim moved is fetched by a second move; a third has no reason.
_ROUNDS: Final = 3
_CPUSET_FILES: Final = ("cpuset.cpus", "cpuset.mems")
_ENABLED: Final = ("cpu", "cpuset", "hugetlb", "io", "memory", "pids")
_UNLIMITED: Final = 1 << 60


class HostLimits(NamedTuple):
    """What a sandbox may use on the host; None: nothing is said here."""

    memory_bytes: int | None = None
    millicpus: int | None = None
    shares: int | None = None
    cpus: str | None = None  # "": any


def host_hierarchies() -> tuple[Hierarchy, ...]:
    """Return the hierarchies that count here; none on a host without cgroups."""
    from shimv2.cgroup_path import hierarchies

    return hierarchies(read("/proc/self/mountinfo"), read("/proc/self/cgroup"))


class SandboxCgroup:
    """One sandbox's directories, one a hierarchy. Made by `make`; `leave` comes last."""

    def __init__(self, hierarchies: Sequence[Hierarchy], path: str) -> None:
        self.path = path
        self._hierarchies = hierarchies
        self._written: dict[str, str] = {}
        self._move: Move | None = None

    @classmethod
    def make(cls, hierarchies: Sequence[Hierarchy], path: str, journal: Journal) -> SandboxCgroup:
        """Make the directories, each journalled before, and begin to move the shim into them.

        Raises:
            FailedPrecondition: one can't be made, or takes no process; the journal undoes all.
        """
        made = cls(hierarchies, path)
        for hierarchy in hierarchies:
            directory = hierarchy.directory(path)
            back = hierarchy.directory(hierarchy.own_path)
            journal.take("cgroup", path=directory, back=back)
            try:
                try:
                    _make(hierarchy, path)
                except FileNotFoundError:
                    # The last sandbox in the directory above has just taken that away.
                    _make(hierarchy, path)
            except OSError as error:
                raise FailedPrecondition(
                    f"the sandbox's cgroup {directory} cannot be made ({error.strerror}); "
                    "let containerd make cgroups there"
                ) from error
        if made.directories:
            made._move = made._start([os.getpid()])
        return made

    @property
    def is_unified(self) -> bool:
        return any(hierarchy.is_unified for hierarchy in self._hierarchies)

    @property
    def directories(self) -> list[str]:
        return [hierarchy.directory(self.path) for hierarchy in self._hierarchies]

    def of(self, controller: str) -> str:
        """Return the directory in which a controller's files are; "" if there is none."""
        for hierarchy in self._hierarchies:
            if hierarchy.is_unified or controller in hierarchy.controllers:
                return hierarchy.directory(self.path)
        return ""

    async def settle(self, started: Callable[[], Iterable[int]]) -> list[str]:
        """Return when the shim and what it has `started` are inside; the texts are for the log.

        Raises:
            FailedPrecondition: memory would not be counted, because the kernel refused.
        """
        if self._move is not None:
            problems = await self._finish(self._move)
            self._move = None
        else:
            problems = {}
        for _ in range(_ROUNDS):
            outside = [pid for pid in started() if not self._holds(pid, problems)]
            if not outside:
                break
            problems |= await self._finish(self._start(outside))
        return [f"{directory}: {error.strerror}" for directory, error in problems.items()]

    def limit(self, limits: HostLimits) -> list[str]:
        """Set what has changed; return what the kernel refused, for the log."""
        problems = []
        for hierarchy in self._hierarchies:
            for name, value in _files(hierarchy, limits):
                path = f"{hierarchy.directory(self.path)}/{name}"
                if self._written.get(path, "") == value:
                    continue
                try:
                    write(path, value or _all_cpus(hierarchy, self.path))
                    self._written[path] = value
                except OSError as error:
                    problems.append(f"{path}: {value}: {error.strerror}")
        return problems

    def oom_report(self) -> str:
        """Say that the host's OOM killer hit the sandbox, and by which limit; "" if it didn't."""
        directory = self.of("memory")
        events = "memory.events" if self.is_unified else "memory.oom_control"
        if not directory or not numbers(read(f"{directory}/{events}")).get("oom_kill"):
            return ""
        limit = "memory.max" if self.is_unified else "memory.limit_in_bytes"
        path = self.path
        while path:
            text = read(directory.removesuffix(self.path) + f"{path}/{limit}").strip()
            if text.isdigit() and int(text) < _UNLIMITED:
                return (
                    f"killed by the host for the memory limit of {int(text) // _MIB} MiB of {path}"
                )
            path = path.rpartition("/")[0]
        return "killed by the host, which is out of memory"

    async def leave(self) -> list[str]:
        """Take the shim out again, so that the directories can be removed. Idempotent.

        What failed is for the log: the journal's undo tries it once more.
        """
        problems = []
        if self._move is not None:
            move, self._move = self._move, None
            await move.aclose()
        for back in {hierarchy.own_path for hierarchy in self._hierarchies}:
            homes = [
                hierarchy.directory(back)
                for hierarchy in self._hierarchies
                if hierarchy.own_path == back and self._is_inside(hierarchy, os.getpid())
            ]
            if homes:
                try:
                    async with Move.start([os.getpid()], homes) as move:
                        await move.done()
                except OSError as error:  # TimeoutError is one
                    problems.append(f"the shim did not leave {self.path}: {error}")
        return problems

    async def emptied(self) -> None:
        """Return when what was killed inside is dead, but within a bound; the undo tells then."""
        with trio.move_on_after(LEAVE_DEADLINE_S):
            inside = {pid for directory in self.directories for pid in processes(directory)}
            for pid in inside - {os.getpid()}:
                await _ended(pid)

    def _start(self, pids: Sequence[int]) -> Move:
        try:
            return Move.start(pids, self.directories)
        except OSError as error:
            raise FailedPrecondition(
                f"the sandbox's cgroup {self.path}: no process can be moved ({error.strerror}): "
                "no child process could be started; raise the limit of processes (pids.max) of "
                "containerd's cgroup, or end what fills it"
            ) from error

    async def _finish(self, move: Move) -> dict[str, OSError]:
        async with move:
            try:
                problems = await move.done()
            except TimeoutError as error:
                raise FailedPrecondition(f"the sandbox's cgroup {self.path}: {error}") from error
        if refusal := problems.get(self.of("memory")):
            raise FailedPrecondition(
                f"the sandbox's cgroup {self.of('memory')} takes no process ({refusal.strerror})"
            )
        return problems

    def _holds(self, pid: int, problems: dict[str, OSError]) -> bool:
        return all(
            self._is_inside(hierarchy, pid)
            for hierarchy in self._hierarchies
            if hierarchy.directory(self.path) not in problems
        )

    def _is_inside(self, hierarchy: Hierarchy, pid: int) -> bool:
        text = read(f"/proc/{pid}/cgroup")
        if not text:
            return True  # gone
        of = membership(text)
        name = next(iter(hierarchy.controllers), "")
        return of.get(name, "").endswith(self.path)


async def _ended(pid: int) -> None:
    try:
        descriptor = os.pidfd_open(pid)
    except OSError:
        return  # most often: it is gone
    try:
        await trio.lowlevel.wait_readable(descriptor)
    finally:
        os.close(descriptor)


def _make(hierarchy: Hierarchy, path: str) -> None:
    """Make it and what is missing above; others use the latter too, so that stays."""
    names = path.split("/")[1:]
    for count in range(len(names)):
        if hierarchy.is_unified:
            _enable(hierarchy.directory("".join(f"/{name}" for name in names[:count])))
        _make_one(hierarchy, hierarchy.directory("/" + "/".join(names[: count + 1])))


def _make_one(hierarchy: Hierarchy, directory: str) -> None:
    with suppress(FileExistsError):
        os.mkdir(directory)
    if "cpuset" not in hierarchy.controllers:
        return
    # Version 1: a new one is empty, and takes no process until it has both.
    for name in _CPUSET_FILES:
        if not read(f"{directory}/{name}").strip():
            write(f"{directory}/{name}", read(f"{os.path.dirname(directory)}/{name}").strip())


def _enable(directory: str) -> None:
    """Let the cgroups below have what this one has. A refusal shows where a limit is set."""
    available = read(f"{directory}/cgroup.controllers").split()
    enabled = read(f"{directory}/cgroup.subtree_control").split()
    for name in _ENABLED:
        if name in available and name not in enabled:
            with suppress(OSError):  # a cgroup with processes of its own, most often
                write(f"{directory}/cgroup.subtree_control", f"+{name}")


def _files(hierarchy: Hierarchy, limits: HostLimits) -> list[tuple[str, str]]:
    has = hierarchy.controllers or frozenset(("memory", "cpu", "cpuset"))
    found: list[tuple[str, str]] = []
    if "memory" in has and limits.memory_bytes is not None:
        name = "memory.max" if hierarchy.is_unified else "memory.limit_in_bytes"
        found.append((name, str(limits.memory_bytes)))
    if "cpu" in has and limits.millicpus is not None:
        quota = max(1000, limits.millicpus * _PERIOD_US // 1000)
        if hierarchy.is_unified:
            found.append(("cpu.max", f"{quota} {_PERIOD_US}"))
        else:
            found += [("cpu.cfs_period_us", str(_PERIOD_US)), ("cpu.cfs_quota_us", str(quota))]
    if "cpu" in has and limits.shares is not None:
        shares = min(max(limits.shares, 2), 262_144)
        if hierarchy.is_unified:
            # Source: the conversion of all OCI runtimes.
            found.append(("cpu.weight", str(1 + (shares - 2) * 9999 // 262_142)))
        else:
            found.append(("cpu.shares", str(shares)))
    if "cpuset" in has and limits.cpus is not None:
        found.append(("cpuset.cpus", limits.cpus))
    return found


def _all_cpus(hierarchy: Hierarchy, path: str) -> str:
    """What is written to be pinned to nothing: version 2 has a word for it, version 1 has none."""
    if hierarchy.is_unified:
        return "\n"
    return read(f"{hierarchy.directory(path.rpartition('/')[0])}/cpuset.cpus").strip()
