"""A sandbox: one virtual machine and the containers in it. One per shim.

    (empty) ──create──> booting ──> up ──> ended (the VM or a part of it died, or its init left)
                           └──rollback──> (empty)

The first container boots the VM, inside of its Create: whatever ends that request early (deadline,
Kill, a client that leaves, a part that dies) undoes it all. The VM lives as long as the sandbox:
until the container that it was made for ends, or the shim is shut down. A pod of the Sandbox API
has no such container: `found` boots its VM, `end` ends it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Final

import trio

from shimv2.bundle import ContainerKind
from shimv2.container import Container, Log
from shimv2.errors import (
    AlreadyExists,
    NotFound,
    representative,
)
from shimv2.guest_spec import check_hooks, check_spec
from shimv2.host_resources import HostResources, Parts
from shimv2.jobs import Jobs
from shimv2.lifecycle import Operation, State
from shimv2.oom_watch import watch_oom
from shimv2.process import ProcessExit, exit_now
from shimv2.sandbox_creation import SandboxCreation
from shimv2.sandbox_end import SandboxEnd
from shimv2.sandbox_network import namespace_path

if TYPE_CHECKING:
    from agent_proto.client import AgentClient
    from agent_proto.pb import agent_pb2
    from netns.model import Statistics
    from shimv2.bootstrap import ShimInvocation
    from shimv2.bundle import Bundle
    from shimv2.sandbox_creation import Creation
    from shimv2.sandbox_resources import SandboxResources
    from shimv2.state_dir import StateDir
    from shimv2.stdio import Logger, LoggerCommand
    from shimv2.task_events import TaskEvents
    from shimv2.timeline import Timeline

SETTLE_DEADLINE_S: Final = 2.0  # containerd gives a Shutdown 3 s


class Sandbox:
    """The one writer of what a shim runs. `run` must be going for anything else to work."""

    def __init__(
        self,
        invocation: ShimInvocation,
        state_dir: StateDir,
        events: TaskEvents,
        log: Log,
        parts: Parts,
    ) -> None:
        self.events = events
        self.containers: dict[str, Container] = {}
        self._invocation = invocation
        self.log = log
        self._jobs = Jobs(self._defect)
        self._host = HostResources(invocation, state_dir, parts, log)
        self._end = SandboxEnd(
            invocation.sandbox_id, self._host, self.containers, log, self.start_job
        )
        self._creation = SandboxCreation(
            invocation,
            state_dir,
            parts,
            self._host,
            self._end,
            self.containers,
            self._jobs,
            log,
        )
        self._is_watching_oom = False

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Hold the sandbox's jobs until cancelled; then nothing is left of it."""

        async def at_end() -> None:
            await self._end.take_down("the shim is shutting down")

        await self._jobs.run(at_end, task_status=task_status)

    async def stop(self, reason: str) -> None:
        """End everything, as when the VM dies."""
        self.fail(reason)
        await self._end.take_down(reason)

    async def settled(self) -> None:
        """Wait, within containerd's patience, for a creation that is being undone."""
        with trio.move_on_after(SETTLE_DEADLINE_S):
            for container in list(self.containers.values()):
                if container.creation is not None and container.creation.cancel_called:
                    await container.init.exited.wait()

    # --- What containers ask of their host ---

    @property
    def ended(self) -> trio.Event:
        """Set when the sandbox has ended, or is about to."""
        return self._end.ended

    @property
    def timeline(self) -> Timeline:
        """When the sandbox reached what; a new one for each attempt."""
        return self._creation.timeline

    @property
    def agent(self) -> AgentClient:
        """The agent, while there is one; raises as `SandboxEnd.agent`."""
        return self._end.agent

    @property
    def resources(self) -> SandboxResources:
        """What the containers may use, from the first one's Create on."""
        return self._creation.resources

    @property
    def keeps_output(self) -> bool:
        return self._host.machine is not None and self._host.machine.keeps_output

    @property
    def reported_pid(self) -> int:
        """The VMM's pid stands for every process: the guest's have none on the host."""
        return self._host.machine.pid if self._host.machine is not None else 0

    async def explain(self) -> str:
        """Why the sandbox has ended; waits a moment for whoever finds out."""
        return await self._end.explain()

    def fail(self, reason: str) -> None:
        """The VM can't go on: end every process with the reason, then take the rest down."""
        self._end.fail(reason)

    def init_exited(self, container: Container) -> None:
        """The container that the VM was made for has ended: so does the VM, once it is quiet."""
        self._report_timeline()
        if container.bundle.kind is not ContainerKind.MEMBER:
            self.start_job(self._end.with_container, container)

    def start_job(self, job: Callable[..., Awaitable[Any]], *args: object) -> None:
        """Run something for as long as it takes, beside the requests.

        A defect in it ends this sandbox with its text, not the shim.
        """
        self._jobs.start(job, *args)

    async def start_logger(self, command: LoggerCommand, container_id: str) -> Logger:
        """Start a `binary://` logger under the journal."""
        reason = self._end.reason or "the sandbox has ended"
        return await self._host.start_logger(command, container_id, reason=reason)

    # --- Containers ---

    def container(self, container_id: str) -> Container:
        """The container a request names.

        Raises:
            NotFound: there is none.
        """
        try:
            return self.containers[container_id]
        except KeyError:
            raise NotFound(f"container {container_id} not found") from None

    def neighbours(self) -> list[Bundle]:
        """What runs, or is ready to."""
        return self._creation.neighbours()

    async def create(self, creation: Creation) -> Container:
        """Create a container, and for the sandbox's first the VM. Undone whole if it fails.

        Raises:
            ShimError: with phase, time and what the guest last said.
        """
        bundle = creation.bundle
        if bundle.container_id in self.containers:
            raise AlreadyExists(f"container {bundle.container_id} already exists")
        check_spec(bundle.spec)
        if bundle.kind is not ContainerKind.MEMBER:
            namespace_path(bundle.spec)  # the host's network is none that a VM can have
        check_hooks(bundle.spec)
        container = Container(bundle, creation.stdio, self)
        self.containers[container.id] = container
        try:
            await self._creation.create(container, creation)
        except BaseException:
            self.containers.pop(container.id, None)
            container.init.vanish()
            container.init.settle(exit_now(0))
            raise
        container.creation = None
        return container

    async def found(self, creation: Creation) -> None:
        """Boot the VM of a pod that has no container of its own. Undone whole if it fails.

        Raises:
            ShimError: as `create`.
        """
        check_spec(creation.bundle.spec)
        namespace_path(creation.bundle.spec)
        await self._creation.create(None, creation)

    async def end(self, reason: str) -> None:
        """End what `found` has made, to the end even if the client leaves. Idempotent."""
        await self._jobs.finish(self._end.in_order, reason)

    async def start(self, container: Container, exec_id: str) -> None:
        """Start a process to the end, even if the client that asked for it leaves."""
        await self._jobs.finish(self._start, container, exec_id)
        if not self._is_watching_oom and not self.ended.is_set():
            self._is_watching_oom = True
            self.start_job(watch_oom, self.agent, self.containers.get, self._tell_oom)

    async def delete(self, container: Container, exec_id: str) -> ProcessExit:
        """Delete a process; with the init process, its container."""
        process = container.process(exec_id)
        if exec_id:
            ended: ProcessExit = await self._jobs.finish(container.delete_exec, process)
            return ended
        await process.admit(Operation.DELETE)
        never_ran = process.state is State.CREATED
        process.become(State.DELETING)
        ended = await self._jobs.finish(self._delete, container, never_ran)
        return ended

    async def statistics(self, container: Container) -> agent_pb2.StatsContainerResponse:
        """A container's counters, from the guest; those of a pod's sandbox are the host's.

        CRI takes them for what the whole pod costs, the VMM included.
        """
        if container.bundle.kind is ContainerKind.SANDBOX:
            await container.init.admit(Operation.STATS)
            if (of_host := self.host_statistics()) is not None:
                return of_host
        return await container.stats()

    def host_statistics(self) -> agent_pb2.StatsContainerResponse | None:
        """What the sandbox costs the host; None without a VM, or on a host without cgroups."""
        return self._host.cgroup.statistics()

    def network_statistics(self) -> tuple[Statistics, ...]:
        """What the host counted on the pod's interfaces."""
        network = self._host.network
        return network.statistics() if network is not None else ()

    async def _start(self, container: Container, exec_id: str) -> None:
        if not exec_id and not self.ended.is_set():
            await self._host.catch_up_network(self.agent)
        await container.start(exec_id)
        if not exec_id:
            await self._host.run_poststart(container.id)

    # --- The end of things ---

    async def _delete(self, container: Container, never_ran: bool) -> ProcessExit:
        try:
            return await self._remove(container, never_ran)
        except BaseException:
            # The client may try again; that would wait for ever for this Delete's end.
            container.init.become(State.STOPPED)
            raise

    async def _remove(self, container: Container, never_ran: bool) -> ProcessExit:
        owns_machine = container.bundle.kind is not ContainerKind.MEMBER
        process = container.init
        if never_ran:
            process.settle(exit_now(0))
        ended = process.exit
        assert ended is not None
        await container.close()
        if owns_machine:
            await self._end.in_order(f"container {container.id} was deleted")
        else:
            await self._end.remove_in_guest(container)
            self._creation.leave(container)
            await self._host.remove_files(container.id)
        await self._host.run_poststop(container.id)
        self.events.deleted(container, ended)
        self.containers.pop(container.id, None)
        process.vanish()
        return ended

    # --- Small jobs ---

    def _defect(self, job: str, error: Exception) -> None:
        self.log.exception("job failed", error, job=job)
        self.fail(f"internal error in the shim: {representative(error)!r}")

    def _tell_oom(self, container: Container) -> None:
        self.events.oom(container)
        # CRI-O has no events of containerd's and looks for this file. Source: Kata service.go.
        with contextlib.suppress(OSError):
            (container.bundle.path / "oom").touch()

    def _report_timeline(self) -> None:
        if not self.timeline.is_reported:
            self.timeline.is_reported = True
            vm = self._host.machine.vm if self._host.machine is not None else None
            self.log.info(
                "sandbox timeline",
                sandbox_id=self._invocation.sandbox_id,
                accelerator=vm.accelerator if vm is not None else "none",
                **self.timeline.as_ms(),
            )
