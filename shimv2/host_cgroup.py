"""A sandbox's cgroup through the life of its host resources: where it is, and who is told what.

On a host without cgroups, and before `make` and after `leave`, every call does nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shimv2.cgroup_path import overhead_path, sandbox_path
from shimv2.cgroup_stats import read_statistics
from shimv2.sandbox_cgroup import SandboxCgroup

if TYPE_CHECKING:
    from collections.abc import Callable

    from agent_proto.pb import agent_pb2
    from shimv2.bundle import Bundle
    from shimv2.cgroup_path import Hierarchy
    from shimv2.config import RuntimeConfig
    from shimv2.container import Log
    from shimv2.journal import Journal
    from shimv2.sandbox_cgroup import HostLimits


class HostCgroup:
    """The one cgroup of a sandbox, or none."""

    def __init__(self, find: Callable[[], tuple[Hierarchy, ...]], log: Log) -> None:
        self._find = find
        self._log = log
        self._cgroup: SandboxCgroup | None = None
        self._left: SandboxCgroup | None = None
        self._journal: Journal | None = None
        self._is_pods = False  # below the pod's own, not beside all pods

    def make(self, bundle: Bundle, config: RuntimeConfig, journal: Journal) -> None:
        """Make it and begin to move the shim there. Raises `ShimError`."""
        hierarchies = self._find()
        if not hierarchies:
            return
        self._journal = journal
        self._is_pods = config.runtime.sandbox_cgroup_only
        named = str((bundle.spec.get("linux") or {}).get("cgroupsPath") or "")
        path = overhead_path(bundle.sandbox_id)
        if self._is_pods:
            path = sandbox_path(named, bundle.sandbox_id)
        self._cgroup = SandboxCgroup.make(hierarchies, path, journal)

    async def settle(self) -> None:
        """Return when all that was started so far is inside. Raises `ShimError`."""
        if self._cgroup is not None:
            for problem in await self._cgroup.settle(self._started):
                self._log.warning("cgroup", text=problem)

    def limit(self, limits: HostLimits) -> None:
        """Limit the sandbox on the host; what the kernel refuses is logged."""
        if self._cgroup is not None and self._is_pods:
            for problem in self._cgroup.limit(limits):
                self._log.warning("cgroup", text=problem)

    def why_dead(self) -> str:
        """Say what the host did to the sandbox, if it did."""
        return self._cgroup.oom_report() if self._cgroup is not None else ""

    def statistics(self) -> agent_pb2.StatsContainerResponse | None:
        """Count what the whole sandbox uses of the host."""
        return read_statistics(self._cgroup) if self._cgroup is not None else None

    async def leave(self) -> None:
        """Take the shim out; the journal then removes the directories. Idempotent."""
        if self._cgroup is not None:
            for problem in await self._cgroup.leave():
                self._log.warning("cgroup", text=problem)
            self._cgroup, self._left = None, self._cgroup

    async def emptied(self) -> None:
        """After `leave`: return when those are dead that were killed inside. Bounded."""
        if self._left is not None:
            await self._left.emptied()
            self._left = None

    def _started(self) -> list[int]:
        held = self._journal.held if self._journal is not None else ()
        return [int(entry.fields["pid"]) for entry in held if entry.kind == "process"]
