"""A container: its processes, and the operations that concern the container as a whole.

Each operation asks `lifecycle` first, changes state before it waits for the guest, and holds no
lock meanwhile: a second operation sees the state of the first. What must outlive the request that
asked for it (a start, a delete) is run by the sandbox as a job of its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

import trio

from agent_proto.errors import AgentError, AgentStatus, AgentTimeout, AgentUnreachable
from agent_proto.pb import agent_pb2, oci_pb2
from shimv2.errors import AlreadyExists, NotFound, Unavailable
from shimv2.guest_spec import guest_process_message, guest_resources
from shimv2.lifecycle import Operation, Role, State
from shimv2.oci_messages import message_from_json
from shimv2.process import (
    KILLED_STATUS,
    UNKNOWN_STATUS,
    ContainerProcess,
    ProcessExit,
    exit_now,
    guest_exit,
)
from shimv2.stdio import StdioPlan, open_stdio

if TYPE_CHECKING:
    from agent_proto.client import AgentClient
    from shimv2.bundle import Bundle, JsonObject
    from shimv2.relay import Relay
    from shimv2.sandbox_resources import SandboxResources
    from shimv2.stdio import Logger, LoggerCommand
    from shimv2.task_events import TaskEvents
    from shimv2.timeline import Timeline

T = TypeVar("T")

# The kernel ends a pid namespace at once when its init ends; the agent's word on the execs follows
# within this, or they are taken for killed.
EXEC_EXIT_GRACE_S: Final = 1.0
# How long an exit waits for the process's output. The agent ends that half a second after the
# process, whoever still holds it.
EXIT_OUTPUT_GRACE_S: Final = 0.8
# A hung agent must not hold Kill for longer: then the VM is killed instead.
KILL_DEADLINE_S: Final = 5.0
LOGGERS_DEADLINE_S: Final = 12.0  # a logger's graces, and what lies in its pipes
_SIGKILL: Final = 9
# Agents send SIGKILL instead of a SIGTERM that an init has no handler for.
_SIGNALS_THAT_END: Final = frozenset({_SIGKILL, 15})


class Log(Protocol):
    """Structured events: a short constant name, values in fields."""

    def info(self, event: str, **fields: object) -> None: ...
    def warning(self, event: str, **fields: object) -> None: ...
    def error(self, event: str, **fields: object) -> None: ...
    def exception(self, event: str, error: BaseException, **fields: object) -> None: ...


class Host(Protocol):
    """What a container needs of its sandbox."""

    events: TaskEvents
    log: Log

    @property
    def timeline(self) -> Timeline: ...
    @property
    def ended(self) -> trio.Event: ...
    @property
    def agent(self) -> AgentClient: ...
    @property
    def resources(self) -> SandboxResources: ...
    @property
    def keeps_output(self) -> bool: ...
    @property
    def reported_pid(self) -> int: ...
    async def explain(self) -> str: ...
    def fail(self, reason: str) -> None: ...
    def start_job(self, job: Callable[..., Awaitable[Any]], *args: object) -> None: ...
    def init_exited(self, container: Container) -> None: ...
    async def start_logger(self, command: LoggerCommand, container_id: str) -> Logger: ...


class Container:
    """One container of a sandbox, with its init process and its exec processes."""

    def __init__(self, bundle: Bundle, plan: StdioPlan, host: Host) -> None:
        self.id = bundle.container_id
        self.bundle = bundle
        self.init = ContainerProcess(self.id, "", plan)
        self.execs: dict[str, ContainerProcess] = {}
        self.pid = 0  # the VMM's, kept after its end so that every answer shows the same
        self.creation: trio.CancelScope | None = None
        self.kill_requested: int | None = None  # a signal that came while the VM booted
        self.has_oom = False
        self._is_init_watched = False
        self._host = host
        self._exec_processes: dict[str, JsonObject] = {}

    def process(self, exec_id: str) -> ContainerProcess:
        """The process a request names.

        Raises:
            NotFound: no such exec.
        """
        if not exec_id:
            return self.init
        try:
            return self.execs[exec_id]
        except KeyError:
            raise NotFound(f"exec {exec_id} of container {self.id} not found") from None

    async def open_stdio(self, process: ContainerProcess) -> None:
        """Open a process's stdio; a logger is told the container's id, or the exec's."""

        async def start_logger(command: LoggerCommand) -> Logger:
            return await self._host.start_logger(command, process.wire_id)

        process.attach(await open_stdio(process.plan, start_logger))

    async def create_in_guest(self, request: agent_pb2.CreateContainerRequest) -> None:
        """Make the container in the guest; its init waits for Start."""
        agent = self._host.agent
        await agent.create_container(request)
        self.pid = self._host.reported_pid
        self.init.become(State.CREATED)
        if self._host.keeps_output:
            # From here on, so that a created init that is killed is seen to end.
            self._watch_init(agent)

    # --- Start ---

    async def start(self, exec_id: str) -> None:
        """Run the init process, or a registered exec."""
        process = self.process(exec_id)
        if process.role is Role.EXEC:
            await self._admit_exec()
        await process.admit(Operation.START)
        process.become(State.STARTING)
        try:
            if process.role is Role.INIT:
                await self._start_init(process)
            else:
                await self._start_exec(process)
        except BaseException as exc:
            self._start_failed(process, exc)
            raise

    async def _start_init(self, process: ContainerProcess) -> None:
        host, agent = self._host, self._host.agent
        if process.plan.terminal and process.size is not None:
            with contextlib.suppress(AgentStatus):
                await process.guest(agent).resize(*process.size)
        relay = process.make_relay(agent)
        await self._ask(agent.start_container(self.id))
        self._still_starting(process)
        host.timeline.mark("started")
        host.events.started(self, process)
        self._now_running(process)
        host.start_job(self._relay, process, relay)
        self._watch_init(agent)

    def _watch_init(self, agent: AgentClient) -> None:
        if not self._is_init_watched:
            self._is_init_watched = True
            self._host.start_job(self._watch, self.init, agent)

    async def _start_exec(self, process: ContainerProcess) -> None:
        host, agent = self._host, self._host.agent
        await self.open_stdio(process)
        message = guest_process_message(
            self._exec_processes[process.exec_id], terminal=process.plan.terminal
        )
        if process.size is not None:
            rows, columns = process.size
            message.ConsoleSize.Height, message.ConsoleSize.Width = rows, columns
        request = agent_pb2.ExecProcessRequest(
            container_id=self.id, exec_id=process.wire_id, process=message
        )
        await self._ask(agent.exec_process(request))
        self._still_starting(process)
        host.events.started(self, process)
        self._now_running(process)
        host.start_job(self._relay, process, process.make_relay(agent))
        host.start_job(self._watch, process, agent)
        if process.plan.terminal and process.size is not None:
            with contextlib.suppress(AgentError):
                await process.guest(agent).resize(*process.size)

    def _still_starting(self, process: ContainerProcess) -> None:
        # The VM may have died between the agent's answer and this line: its exit has been told.
        if process.exit is not None:
            raise Unavailable(process.exit.reason)

    def _now_running(self, process: ContainerProcess) -> None:
        # The exit of a short process may have come before the answer to its start.
        if process.state is State.STARTING:
            process.become(State.RUNNING)

    def _start_failed(self, process: ContainerProcess, error: BaseException) -> None:
        """Release whoever waits: the process will not run, and can only be deleted."""
        reason = str(error) or type(error).__name__
        process.settle(exit_now(UNKNOWN_STATUS, f"{process.describe()} did not start: {reason}"))
        if process.relay is not None:
            process.relay = None
        process.close_stdio()

    async def _relay(self, process: ContainerProcess, relay: Relay) -> None:
        await relay.run()
        if relay.problem and not self._host.ended.is_set():
            # Most often the VM is dying, which is told in a moment and says it all.
            await self._host.explain()
        if relay.problem and not self._host.ended.is_set():
            self._host.log.warning(
                "output cut short",
                container_id=self.id,
                exec_id=process.exec_id,
                error=relay.problem,
            )

    # --- Exit ---

    async def _watch(self, process: ContainerProcess, agent: AgentClient) -> None:
        """Follow one process to its end, and make its one exit."""
        host = self._host
        if not host.keeps_output and process.relay is not None:
            await process.relay.outputs_ended.wait()
        ended = await guest_exit(process, process.guest(agent), host.explain)
        if process.relay is not None:
            # Clients drop what they haven't read when they hear of the exit. A child that holds the
            # output, or a reader that stalls, delays it by no more than this.
            with trio.move_on_after(EXIT_OUTPUT_GRACE_S):
                await process.relay.outputs_ended.wait()
        while process.state is State.STARTING:
            # Start's handler publishes the start first.
            await process.wait_changed()
        if process.role is Role.INIT:
            await self._end_execs(ended)
        self.publish_exit(process, ended)

    async def _end_execs(self, init_exit: ProcessExit) -> None:
        """The exit of init comes last: give the execs' own exits a moment, then make them."""
        with trio.move_on_after(EXEC_EXIT_GRACE_S):
            for process in list(self.execs.values()):
                if process.state in (State.RUNNING, State.STARTING):
                    await process.exited.wait()
        for process in list(self.execs.values()):
            if process.state in (State.RUNNING, State.STARTING):
                reason = init_exit.reason or "the container's init process ended"
                self.publish_exit(process, exit_now(KILLED_STATUS, reason))

    def publish_exit(self, process: ContainerProcess, ended: ProcessExit) -> None:
        """Set a process's exit and tell containerd; does nothing if it has one."""
        if not process.settle(ended):
            return
        self._host.events.exited(self, process)
        if process.role is Role.INIT:
            self._host.timeline.mark("exited")
            self._host.init_exited(self)

    def end_all(self, reason: str) -> None:
        """The VM is gone: every process that lived has ended, init last."""
        for process in [*self.execs.values(), self.init]:
            if process.exit is None and process.state in (
                State.STARTING,
                State.RUNNING,
                State.PAUSED,
            ):
                self.publish_exit(process, exit_now(KILLED_STATUS, reason))
        if self.init.state is State.CREATED:
            self.publish_exit(self.init, exit_now(KILLED_STATUS, reason))

    # --- Kill ---

    async def kill(self, exec_id: str, signal: int, *, everyone: bool) -> None:
        """Send a signal; to every process of the container if `everyone`."""
        process = self.process(exec_id)
        await process.admit(Operation.KILL)
        if process.state is State.CREATING:
            self.kill_requested = signal
            if self.creation is not None:
                self.creation.cancel()
            return
        if process.role is Role.EXEC:
            await self._signal(process, process.wire_id, signal)
            return
        if everyone and signal != _SIGKILL:
            for other in list(self.execs.values()):
                if other.state is State.RUNNING:
                    with contextlib.suppress(NotFound):
                        await self._signal(other, other.wire_id, signal)
        # An empty id reaches, with SIGKILL, every process of the container.
        await self._signal(process, "", signal)
        if process.state is State.CREATED and signal in _SIGNALS_THAT_END:
            # It ends without having been started, which is when it would have been watched.
            self._watch_init(self._host.agent)

    async def _signal(self, process: ContainerProcess, wire_id: str, signal: int) -> None:
        agent = self._host.agent
        try:
            with trio.fail_after(KILL_DEADLINE_S):
                await self._ask(agent.signal_process(self.id, wire_id, signal))
        except (trio.TooSlowError, AgentTimeout):
            if signal != _SIGKILL:
                raise
            # Whoever asks for SIGKILL means it: with a hung guest, the VM is what can be killed.
            self._host.fail("the agent in the guest did not answer a SIGKILL")
        except AgentStatus as exc:
            if exc.code == NotFound.code:
                raise NotFound(f"{process.describe()}: process already finished") from exc
            raise

    # --- Exec ---

    def add_exec(self, exec_id: str, spec: JsonObject, plan: StdioPlan) -> ContainerProcess:
        """Register an exec; it runs at its Start."""
        self.init.refuse(Operation.EXEC)
        if exec_id in self.execs or exec_id == self.id:
            raise AlreadyExists(f"exec {exec_id} of container {self.id} already exists")
        # Refused here rather than at Start, where a client no longer expects its own mistakes.
        guest_process_message(spec, terminal=plan.terminal)
        process = ContainerProcess(self.id, exec_id, plan)
        size = spec.get("consoleSize")
        if plan.terminal and isinstance(size, dict) and size.get("height") and size.get("width"):
            process.size = (int(size["height"]), int(size["width"]))
        self.execs[exec_id] = process
        self._exec_processes[exec_id] = spec
        self._host.events.exec_added(self, process)
        return process

    async def _admit_exec(self) -> None:
        await self.init.admit(Operation.START_EXEC)

    async def delete_exec(self, process: ContainerProcess) -> ProcessExit:
        """Forget an exec that has ended or never ran."""
        await process.admit(Operation.DELETE)
        never_ran = process.state is State.CREATED
        process.become(State.DELETING)
        if never_ran:
            process.settle(exit_now(0))
        try:
            await process.drain()
        except BaseException:
            # The client may try again; that would wait for ever for this Delete's end.
            process.become(State.STOPPED)
            raise
        self.execs.pop(process.exec_id, None)
        self._exec_processes.pop(process.exec_id, None)
        process.vanish()
        assert process.exit is not None
        return process.exit

    # --- The container as a whole ---

    async def pause(self) -> None:
        """Freeze the container."""
        await self.init.admit(Operation.PAUSE)
        await self._ask(self._host.agent.pause_container(self.id))
        if self.init.state is State.RUNNING:
            self.init.become(State.PAUSED)
            self._host.events.paused(self)

    async def resume(self) -> None:
        """Thaw the container."""
        await self.init.admit(Operation.RESUME)
        await self._ask(self._host.agent.resume_container(self.id))
        if self.init.state is State.PAUSED:
            self.init.become(State.RUNNING)
            self._host.events.resumed(self)

    async def update(self, resources: JsonObject) -> None:
        """Change the container's limits in the guest, which grows for them if it can."""
        await self.init.admit(Operation.UPDATE)
        message = message_from_json(oci_pb2.LinuxResources, guest_resources(resources), "resources")
        async with self._host.resources.update(self.id, resources):
            self._host.resources.adapt(message, self.id)
            await self._ask(self._host.agent.update_container(self.id, message))

    async def stats(self) -> agent_pb2.StatsContainerResponse:
        """The container's counters."""
        await self.init.admit(Operation.STATS)
        return await self._ask(self._host.agent.stats_container(self.id))

    async def resize(self, exec_id: str, rows: int, columns: int) -> None:
        """Set a terminal's size, now or at its start. Without a terminal, nothing happens."""
        process = self.process(exec_id)
        if not process.plan.terminal:
            return
        await process.admit(Operation.RESIZE)
        process.size = (rows, columns)
        if process.state in (State.RUNNING, State.PAUSED):
            await self._ask(process.guest(self._host.agent).resize(rows, columns))

    async def close_io(self, exec_id: str) -> None:
        """The client will write no more to stdin; returns at once."""
        process = self.process(exec_id)
        if await process.admit(Operation.CLOSE_IO):
            process.finish_input()
        await trio.lowlevel.checkpoint()

    async def close(self) -> None:
        """End all stdio, within the drain's bound; the container is going away."""
        async with trio.open_nursery() as nursery:
            for process in [*self.execs.values(), self.init]:
                nursery.start_soon(process.drain)

    async def _ask(self, call: Awaitable[T]) -> T:
        """Await one of the agent's calls; when the agent is gone, say why it is."""
        try:
            return await call
        except AgentUnreachable as exc:
            raise Unavailable(await self._host.explain()) from exc


async def loggers_left(containers: Iterable[Container]) -> None:
    """Wait, within a bound, until the loggers that were written to have left."""
    with trio.move_on_after(LOGGERS_DEADLINE_S):
        for container in list(containers):
            for process in [*container.execs.values(), container.init]:
                await process.logger_left()
