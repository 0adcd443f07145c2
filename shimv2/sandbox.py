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
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import trio

from agent_proto.errors import AgentError, AgentUnreachable
from shimv2.boot import Machine, check_machine
from shimv2.bundle import Bundle, ContainerKind
from shimv2.container import Container, Log, loggers_left
from shimv2.errors import (
    AlreadyExists,
    FailedPrecondition,
    NotFound,
    ShimError,
    Unavailable,
    representative,
)
from shimv2.guest_requests import container_request
from shimv2.guest_spec import check_hooks, check_spec
from shimv2.host_resources import HostResources, Parts
from shimv2.jobs import Jobs
from shimv2.lifecycle import Operation, State
from shimv2.machine_plan import plan_machine
from shimv2.oom_watch import watch_oom
from shimv2.post_mortem import Scene, failed, late, scene_of, users_mistake
from shimv2.process import DRAIN_DEADLINE_S, ProcessExit, exit_now
from shimv2.sandbox_network import namespace_path
from shimv2.sandbox_resources import SandboxResources
from shimv2.timeline import Timeline

if TYPE_CHECKING:
    from agent_proto.client import AgentClient
    from agent_proto.pb import agent_pb2
    from netns.model import Statistics
    from shimv2.bootstrap import ShimInvocation
    from shimv2.config import RuntimeConfig
    from shimv2.container_files import Prepared
    from shimv2.mounts import RootfsMount
    from shimv2.rootfs import GuestPaths
    from shimv2.state_dir import StateDir
    from shimv2.stdio import Logger, LoggerCommand, StdioPlan
    from shimv2.task_events import TaskEvents

EXPLAIN_DEADLINE_S: Final = 1.0
REMOVE_DEADLINE_S: Final = 10
SETTLE_DEADLINE_S: Final = 2.0  # containerd gives a Shutdown 3 s


@dataclass(frozen=True, slots=True, kw_only=True)
class Creation:
    """A request to create a container, understood."""

    bundle: Bundle
    stdio: StdioPlan
    rootfs: Sequence[RootfsMount]
    config_path: str | None
    limit_s: float  # what the client waits; inf when it didn't say


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
        self.timeline = Timeline()
        self.containers: dict[str, Container] = {}
        self.ended = trio.Event()
        self._reason = ""
        self._invocation = invocation
        self._state_dir = state_dir
        self.log = log
        self._parts = parts
        self._jobs = Jobs(self._defect)
        self._host = HostResources(invocation, state_dir, parts, log)
        self._config: RuntimeConfig | None = None
        self._resources: SandboxResources | None = None
        self._is_up = trio.Event()
        self._unmounting = trio.Lock()
        self._closing = trio.Lock()  # guards the one teardown; the second caller finds it done
        self._is_watching_oom = False
        self._scene: Scene | None = None  # of a creation that was cut short

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Hold the sandbox's jobs until cancelled; then nothing is left of it."""

        async def at_end() -> None:
            await self._take_down("the shim is shutting down")

        await self._jobs.run(at_end, task_status=task_status)

    async def stop(self, reason: str) -> None:
        """End everything, as when the VM dies."""
        self.fail(reason)
        await self._take_down(reason)

    async def settled(self) -> None:
        """Wait, within containerd's patience, for a creation that is being undone."""
        with trio.move_on_after(SETTLE_DEADLINE_S):
            for container in list(self.containers.values()):
                if container.creation is not None and container.creation.cancel_called:
                    await container.init.exited.wait()

    # --- What containers ask of their host ---

    @property
    def agent(self) -> AgentClient:
        """The agent, while there is one."""
        if self.ended.is_set():
            raise Unavailable(self._reason)
        if self._host.machine is None or self._host.machine.agent is None:
            raise FailedPrecondition(f"sandbox {self._invocation.sandbox_id} has no VM")
        return self._host.machine.agent

    @property
    def resources(self) -> SandboxResources:
        """What the containers may use, from the first one's Create on."""
        if self._resources is None:
            raise FailedPrecondition(f"sandbox {self._invocation.sandbox_id} has no VM")
        return self._resources

    @property
    def keeps_output(self) -> bool:
        return self._host.machine is not None and self._host.machine.keeps_output

    @property
    def reported_pid(self) -> int:
        """The VMM's pid stands for every process: the guest's have none on the host."""
        return self._host.machine.pid if self._host.machine is not None else 0

    async def explain(self) -> str:
        """Why the sandbox has ended; waits a moment for whoever finds out."""
        with trio.move_on_after(EXPLAIN_DEADLINE_S):
            await self.ended.wait()
        return self._reason or "the agent in the guest does not answer"

    def fail(self, reason: str) -> None:
        """The VM can't go on: end every process with the reason, then take the rest down."""
        if self.ended.is_set():
            return
        self._reason = reason
        self.ended.set()
        self.log.error("sandbox failed", sandbox_id=self._invocation.sandbox_id, reason=reason)
        for container in self.containers.values():
            container.end_all(reason)
        self.start_job(self._host.stop_machine)

    def init_exited(self, container: Container) -> None:
        """The container that the VM was made for has ended: so does the VM, once it is quiet."""
        self._report_timeline()
        if container.bundle.kind is not ContainerKind.MEMBER:
            self.start_job(self._end_with, container)

    def start_job(self, job: Callable[..., Awaitable[Any]], *args: object) -> None:
        """Run something for as long as it takes, beside the requests.

        A defect in it ends this sandbox with its text, not the shim.
        """
        self._jobs.start(job, *args)

    async def start_logger(self, command: LoggerCommand, container_id: str) -> Logger:
        """Start a `binary://` logger under the journal."""
        reason = self._reason or "the sandbox has ended"
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
        alive = (State.CREATED, State.RUNNING)
        return [one.bundle for one in self.containers.values() if one.init.state in alive]

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
            await self._create_in_time(container, creation)
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
        await self._create_in_time(None, creation)

    async def end(self, reason: str) -> None:
        """End what `found` has made, to the end even if the client leaves. Idempotent."""
        await self._jobs.finish(self._end, reason)

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

    # --- Creation ---

    def _configure(self, creation: Creation) -> RuntimeConfig:
        """The sandbox's configuration, read at its first container."""
        if self._config is None:
            config = self._parts.load_config(creation.config_path, creation.bundle.annotations)
            for warning in config.warnings:
                self.log.warning("configuration", text=warning)
            self._config = config
        return self._config

    async def _create_in_time(self, container: Container | None, creation: Creation) -> None:
        """Create within the client's limit and the configuration's; or be cancelled by `kill`."""
        limit_s = min(creation.limit_s, self._configure(creation).agent.create_container_timeout_s)
        with trio.move_on_after(limit_s) as scope:
            if container is not None:
                container.creation = scope
            await self._create(container, creation)
        if scope.cancelled_caught:
            raise self._cut_short(container, creation, limit_s)

    async def _create(self, container: Container | None, creation: Creation) -> None:
        bundle = creation.bundle
        if self.ended.is_set():
            raise Unavailable(self._reason)
        if container is not None and bundle.kind is ContainerKind.MEMBER:
            await self._join(container, creation)
        elif self._host.machine is not None:
            raise FailedPrecondition(
                f"sandbox {self._invocation.sandbox_id} has its VM already; "
                f"container {bundle.container_id} is of kind {bundle.kind.value!r}"
            )
        else:
            await self._found(container, creation)

    async def _found(self, container: Container | None, creation: Creation) -> None:
        """Boot the VM, and prepare the container meanwhile, if it has one of its own."""
        bundle, config = creation.bundle, self._configure(creation)
        timeline = self.timeline = Timeline()
        async with AsyncExitStack() as undo:
            undo.push_async_callback(self._take_down_shielded)
            self._resources = SandboxResources(config, self.log, self._host.cgroup.limit)
            machine = await self._prepare_machine(bundle, config)
            timeline.enter("preparing the container's root filesystem")
            prepared: list[Prepared] = []

            async def prepare() -> None:
                # The guest's kernel takes a second to come up; until it does, this costs nothing.
                await machine.launched.wait()
                network.vmm_started()
                if container is not None:
                    await container.open_stdio(container.init)
                    prepared.append(await self._host.files.prepare(bundle, creation.rootfs))
                    timeline.mark("rootfs")

            if container is not None:
                undo.push_async_callback(self._close_stdio, container)
            timeline.mark("prepared")
            try:
                network = await self._host.open_network(bundle, config)
                if network.devices:
                    timeline.mark("network")
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(prepare)
                    nursery.start_soon(network.wire)
                    await machine.boot(network.devices, network.namespace_fd)
                self._resources.running(machine)
                timeline.enter("setting up the sandbox in the guest")
                await self._host.set_up_guest(self.agent, bundle, config, timeline)
                await self._host.run_creation_hooks(bundle)
                if container is not None:
                    paths = await self._host.hand_over(prepared[0])
                    timeline.enter("creating the container in the guest")
                    await self._create_in_guest(container, paths)
            except Exception as exc:
                raise await self._explained(exc) from exc
            except BaseException:
                self._scene = self._look()
                raise
            timeline.mark("created")
            undo.pop_all()
        self._is_up.set()
        if not self.ended.is_set():
            self._host.start_followers(self.start_job, self.agent, config)

    async def _join(self, container: Container, creation: Creation) -> None:
        """Add a container to the VM that is there, or is about to be."""
        if self._host.machine is None:
            raise FailedPrecondition(
                f"container {container.id} belongs to sandbox {creation.bundle.sandbox_id}, "
                "which has no VM"
            )
        await self._wait_up()
        async with AsyncExitStack() as undo:
            undo.push_async_callback(self._poststop_shielded, container)
            undo.push_async_callback(self._close_stdio, container)
            await container.open_stdio(container.init)
            await self._host.run_creation_hooks(container.bundle)
            undo.push_async_callback(self._host.remove_files, container.id)
            prepared = await self._host.files.prepare(container.bundle, creation.rootfs)
            paths = await self._host.hand_over(prepared)
            undo.callback(self._leave, container)
            await self.resources.join(container.bundle)
            undo.push_async_callback(self._remove_in_guest, container)
            await self._create_in_guest(container, paths)
            undo.pop_all()

    async def _wait_up(self) -> None:
        """Wait for the boot that another request is at."""
        async with trio.open_nursery() as nursery:

            async def give_up() -> None:
                await self.ended.wait()
                nursery.cancel_scope.cancel()

            nursery.start_soon(give_up)
            await self._is_up.wait()
            nursery.cancel_scope.cancel()
        if self.ended.is_set() or not self._is_up.is_set():
            raise Unavailable(self._reason or "the sandbox could not be created")

    async def _prepare_machine(self, bundle: Bundle, config: RuntimeConfig) -> Machine:
        """Check what the machine is made of; only then take the first things for it."""
        self.timeline.enter("checking what the virtual machine is made of")
        limits = self.resources.begin(bundle)
        machinery = self._parts.machinery(config)
        try:
            plan = plan_machine(config, limits)
            plan = check_machine(self._invocation.sandbox_id, plan, machinery, self._state_dir)
        except Exception as exc:
            raise await self._explained(exc) from exc
        return self._host.take(
            bundle,
            config,
            plan,
            machinery,
            jobs=self._jobs.nursery,
            timeline=self.timeline,
            on_death=self.fail,
        )

    async def _create_in_guest(self, container: Container, paths: GuestPaths) -> None:
        assert self._config is not None
        request = container_request(
            container.bundle,
            paths,
            terminal=container.init.plan.terminal,
            seccomp=not self._config.runtime.disable_guest_seccomp,
            neighbours=self.neighbours(),
        )
        self.resources.adapt(request.OCI.Linux.Resources, container.id)
        await container.create_in_guest(request)

    async def _explained(self, error: Exception) -> Exception:
        """The error as a user can act on it: a mistake of theirs as it is, else a whole report."""
        mistake = users_mistake(error, is_guest_well=not self.ended.is_set())
        if mistake is not None:
            return mistake
        if isinstance(representative(error), AgentUnreachable):
            await self.explain()
        assert self._config is not None
        return failed(
            self._look(),
            error,
            reason=self._reason,
            limit_s=self._config.agent.create_container_timeout_s,
            reports_root=self._parts.reports_root,
        )

    def _look(self) -> Scene:
        return scene_of(self._invocation.sandbox_id, self.timeline, self._host.machine)

    def _cut_short(
        self, container: Container | None, creation: Creation, limit_s: float
    ) -> ShimError:
        if container is not None and container.kill_requested is not None:
            return Unavailable(
                f"container {container.id} was killed by signal {container.kill_requested} "
                f"while {self.timeline.phase}"
            )
        scene = self._scene or self._look()
        is_clients = limit_s == creation.limit_s
        name = "the client's limit" if is_clients else "`create_container_timeout`"
        return late(scene, limit_s=limit_s, limit_name=name, reports_root=self._parts.reports_root)

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
            await self._unmount_disks()
            await self._take_down(f"container {container.id} was deleted")
        else:
            await self._remove_in_guest(container)
            self._leave(container)
            await self._host.remove_files(container.id)
        await self._host.run_poststop(container.id)
        self.events.deleted(container, ended)
        self.containers.pop(container.id, None)
        process.vanish()
        return ended

    async def _end_with(self, container: Container) -> None:
        # What was written before the end is still in the guest: its readers get it first.
        if container.init.relay is not None:
            await container.init.relay.outputs_ended.wait()
        with trio.move_on_after(DRAIN_DEADLINE_S):
            for process in list(container.execs.values()):
                if process.relay is not None:
                    await process.relay.outputs_ended.wait()
        await self._unmount_disks()
        await self._take_down(f"container {container.id} ended")

    async def _end(self, reason: str) -> None:
        await self._unmount_disks()
        await self._take_down(reason)

    async def _unmount_disks(self) -> None:
        """Have the guest write out what outlives the VM, which is killed next."""
        async with self._unmounting:
            for container_id in self._host.writers():
                container = self.containers.get(container_id)
                if container is not None and not self.ended.is_set():
                    await self._remove_in_guest(container)
                    self._host.files.unmounted(container_id)

    async def _remove_in_guest(self, container: Container) -> None:
        if self._host.machine is None or self.ended.is_set():
            return
        with trio.move_on_after(REMOVE_DEADLINE_S, shield=True):
            try:
                files, agent = self._host.files, self.agent
                await files.bring_back(container.id, container.bundle.spec, agent)
            except (AgentError, ShimError, OSError) as exc:
                self.log.warning("termination log", container_id=container.id, error=str(exc))
            try:
                await self.agent.remove_container(container.id)
            except (AgentError, ShimError) as exc:
                self.log.warning("remove container", container_id=container.id, error=str(exc))

    async def _poststop_shielded(self, container: Container) -> None:
        with trio.CancelScope(shield=True):  # each hook has a bound
            await self._host.run_poststop(container.id)

    async def _close_stdio(self, container: Container) -> None:
        with trio.CancelScope(shield=True):  # bounded by a logger's graces
            await container.init.drain()

    async def _take_down_shielded(self) -> None:
        with trio.CancelScope(shield=True):  # every step of it has a bound of its own
            await self._take_down("the sandbox could not be created")
            await self._host.run_poststop()
        # Nothing is left of the attempt; another may follow.
        self._host.forget()
        self._config = None
        self.ended = trio.Event()
        self._reason = ""

    async def _take_down(self, reason: str) -> None:
        """Kill the VM and give everything back. Idempotent; concurrent callers wait for it."""
        if not self.ended.is_set():
            self._reason = reason
            self.ended.set()
            for container in self.containers.values():
                container.end_all(reason)
        async with self._closing:
            await self._host.stop_machine()  # no more is written: loggers flush and leave
            await loggers_left(self.containers.values())
            await self._host.give_back()

    # --- Small jobs ---

    def _leave(self, container: Container) -> None:
        if self.resources.leave(container.id):
            self.start_job(self.resources.shrink)

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
