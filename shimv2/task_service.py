"""containerd's Task service, versions 2 and 3: one method a request, decode -> ask -> encode.

No policy lives here: the sandbox and its containers decide, `errors` says how a refusal is told.
State, Connect and Pids are answered from memory, inline, so that they answer at once while a VM
boots or a guest hangs. Source: containerd api/runtime/task/v2/shim.proto; semantics:
docs/protocols.md "Task service".
"""

from __future__ import annotations

import math
import os
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

import trio

from agent_proto.errors import AgentError
from hypervisors.errors import HypervisorError
from shimv2 import mounts, stats
from shimv2.bundle import check_id, check_process, parse_json_object, read_bundle
from shimv2.errors import InvalidArgument, ShimError, Unimplemented, representative, status_from
from shimv2.host_resources import Parts
from shimv2.lifecycle import State
from shimv2.pb import containerd_events_pb2 as events_pb
from shimv2.pb import containerd_process_pb2 as process_pb
from shimv2.pb import containerd_task_pb2 as pb
from shimv2.runtime_options import config_path
from shimv2.sandbox import Sandbox
from shimv2.sandbox_cgroup import host_hierarchies
from shimv2.sandbox_creation import Creation
from shimv2.state_dir import REPORTS_ROOT
from shimv2.stdio import parse_stdio
from shimv2.task_events import Publisher, TaskEvents, set_timestamp
from ttrpc import StatusError

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from shimv2.boot import Machinery
    from shimv2.bootstrap import ShimInvocation
    from shimv2.config import RuntimeConfig
    from shimv2.container import Container, Log
    from shimv2.process import ContainerProcess
    from shimv2.sandbox_service import SandboxService
    from shimv2.state_dir import StateDir
    from ttrpc import CallContext, Handler

    Request = TypeVar("Request", bound=Message)

SERVICE: Final = "containerd.task.v2.Task"
SERVICE_3: Final = "containerd.task.v3.Task"  # the same messages under another name
SANDBOX_SERVICE: Final = "containerd.runtime.sandbox.v1.Sandbox"
SANDBOX_METHODS: Final = (
    "CreateSandbox", "StartSandbox", "WaitSandbox", "StopSandbox", "ShutdownSandbox", "Platform",
    "PingSandbox", "SandboxStatus", "SandboxMetrics",
)  # fmt: skip
PROCESS_TYPE: Final = "types.containerd.io/opencontainers/runtime-spec/1/Process"
RESOURCES_TYPE: Final = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources"
_EMPTY: Final = b""
# Answering and undoing take time too: the client must still be there to read why.
_ANSWER_MARGIN_S: Final = 0.5

_STATUS: Final = {
    State.CREATING: process_pb.CREATED,
    State.CREATED: process_pb.CREATED,
    State.STARTING: process_pb.CREATED,
    State.RUNNING: process_pb.RUNNING,
    State.PAUSED: process_pb.PAUSED,
    State.STOPPED: process_pb.STOPPED,
    State.DELETING: process_pb.STOPPED,
}


FORGOTTEN_S: Final = 2.0
"""Longer than a restart of containerd needs to find the shim, shorter than anybody's patience."""


FAREWELL_S: Final = 2.0


class TaskService:
    """Serves one shim's tasks. `run` holds everything that outlives a request."""

    def __init__(
        self,
        invocation: ShimInvocation,
        state_dir: StateDir,
        publisher: Publisher,
        log: Log,
        parts: Parts | None = None,
    ) -> None:
        self.exit_requested = trio.Event()
        self._invocation = invocation
        self._log = log
        self._pods: SandboxService | None = None  # from the first call of the Sandbox API on
        self._events = TaskEvents(publisher)
        self._sandbox = Sandbox(
            invocation,
            state_dir,
            self._events,
            log,
            parts if parts is not None else real_parts(invocation.variant),
        )

    @property
    def farewell_s(self) -> float:
        """How long clients may take to hang up when the shim exits.

        containerd takes a Task's Shutdown for done when the connection ends, a sandbox's not.
        """
        return FAREWELL_S if self._pods is not None else 0

    def services(self) -> Mapping[str, Mapping[str, Handler]]:
        """The methods by name, as the ttrpc server takes them."""
        inline = {"State": self.state, "Connect": self.connect, "Pids": self.pids}
        waiting = {
            "Create": self.create,
            "Start": self.start,
            "Delete": self.delete,
            "Exec": self.exec,
            "Kill": self.kill,
            "Wait": self.wait,
            "Pause": self.pause,
            "Resume": self.resume,
            "ResizePty": self.resize_pty,
            "CloseIO": self.close_io,
            "Update": self.update,
            "Stats": self.stats,
            "Checkpoint": self.checkpoint,
            "Shutdown": self.shutdown,
        }
        methods: dict[str, Handler] = {name: _inline(call) for name, call in inline.items()}
        methods.update({name: self._answering(name, call) for name, call in waiting.items()})
        pods = {
            name: self._answering(name, partial(self._of_pod, name)) for name in SANDBOX_METHODS
        }
        return {SERVICE: methods, SERVICE_3: methods, SANDBOX_SERVICE: pods}

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Hold the sandbox until cancelled, then give back everything it has."""
        await self._sandbox.run(task_status=task_status)

    async def stop(self) -> None:
        """End every container and the VM: the shim was told to stop."""
        await self._sandbox.stop("the shim was told to stop")

    # --- Answered from memory ---

    def state(self, _context: CallContext, payload: bytes) -> bytes:
        request = pb.StateRequest.FromString(payload)
        container = self._sandbox.container(request.id)
        process = container.process(request.exec_id)
        return _state_response(container, process, self._pid(container)).SerializeToString()

    def connect(self, context: CallContext, payload: bytes) -> bytes:
        """Answers for unknown ids as well: containerd asks before it knows what a shim has."""
        request = pb.ConnectRequest.FromString(payload)
        container = self._sandbox.containers.get(request.id)
        pid = self._pid(container) if container is not None else 0
        version = "v3" if context.service == SERVICE_3 else "v2"
        return pb.ConnectResponse(
            shim_pid=os.getpid(), task_pid=pid, version=version
        ).SerializeToString()

    def pids(self, _context: CallContext, payload: bytes) -> bytes:
        """The VMM's pid: the guest's processes have none here. Never empty for a live task."""
        request = pb.PidsRequest.FromString(payload)
        container = self._sandbox.container(request.id)
        response = pb.PidsResponse()
        response.processes.add(pid=self._pid(container))
        return response.SerializeToString()

    # --- Life of a process ---

    async def create(self, context: CallContext, payload: bytes) -> bytes:
        request = pb.CreateTaskRequest.FromString(payload)
        check_id(request.id, "container")
        if request.checkpoint:
            raise Unimplemented("a container cannot be restored from a checkpoint into a VM")
        if "\0" in request.bundle or not request.bundle.startswith("/"):
            raise InvalidArgument(f"bundle {request.bundle!r} is not an absolute path")
        bundle = read_bundle(Path(request.bundle), request.id)
        creation = Creation(
            bundle=self._pods.adapt(bundle) if self._pods is not None else bundle,
            stdio=parse_stdio(
                request.stdin, request.stdout, request.stderr, terminal=request.terminal
            ),
            rootfs=list(request.rootfs),
            config_path=config_path(request.options),
            limit_s=_limit_s(context),
        )
        try:
            container = await self._sandbox.create(creation)
        except BaseException:
            # Cancelled, the connection broke: containerd was killed. Started again, 1.6 knows a
            # task here that it can neither find nor delete, and would never send the Shutdown.
            if trio.current_effective_deadline() == -math.inf:
                self._sandbox.start_job(self._exit_if_forgotten)
            raise
        io = events_pb.TaskIO(
            stdin=request.stdin,
            stdout=request.stdout,
            stderr=request.stderr,
            terminal=request.terminal,
        )
        self._events.created(container, request.rootfs, io)
        return pb.CreateTaskResponse(pid=container.pid).SerializeToString()

    async def start(self, _context: CallContext, payload: bytes) -> bytes:
        request = pb.StartRequest.FromString(payload)
        container = self._sandbox.container(request.id)
        await self._sandbox.start(container, request.exec_id)
        return pb.StartResponse(pid=container.pid).SerializeToString()

    async def exec(self, _context: CallContext, payload: bytes) -> bytes:
        request = pb.ExecProcessRequest.FromString(payload)
        container = self._sandbox.container(request.id)
        check_id(request.exec_id, "exec")
        spec = parse_json_object(request.spec.value, "the process of the exec")
        check_process(spec, "the process of the exec")
        plan = parse_stdio(request.stdin, request.stdout, request.stderr, terminal=request.terminal)
        container.add_exec(request.exec_id, spec, plan)
        await trio.lowlevel.checkpoint()
        return _EMPTY

    async def wait(self, _context: CallContext, payload: bytes) -> bytes:
        request = pb.WaitRequest.FromString(payload)
        process = self._sandbox.container(request.id).process(request.exec_id)
        await process.exited.wait()
        assert process.exit is not None
        response = pb.WaitResponse(exit_status=process.exit.status)
        set_timestamp(response.exited_at, process.exit.at_ns)
        return response.SerializeToString()

    async def kill(self, _context: CallContext, payload: bytes) -> bytes:
        request = pb.KillRequest.FromString(payload)
        container = self._sandbox.container(request.id)
        if request.signal > _LAST_SIGNAL:
            raise InvalidArgument(f"signal {request.signal} does not exist; use 0 to 64")
        await container.kill(request.exec_id, request.signal, everyone=request.all)
        return _EMPTY

    async def delete(self, _context: CallContext, payload: bytes) -> bytes:
        request = pb.DeleteRequest.FromString(payload)
        container = self._sandbox.container(request.id)
        ended = await self._sandbox.delete(container, request.exec_id)
        response = pb.DeleteResponse(pid=container.pid, exit_status=ended.status)
        set_timestamp(response.exited_at, ended.at_ns)
        return response.SerializeToString()

    # --- Its terminal and input ---

    async def resize_pty(self, _context: CallContext, payload: bytes) -> bytes:
        request = pb.ResizePtyRequest.FromString(payload)
        container = self._sandbox.container(request.id)
        await container.resize(request.exec_id, request.height, request.width)
        return _EMPTY

    async def close_io(self, _context: CallContext, payload: bytes) -> bytes:
        request = pb.CloseIORequest.FromString(payload)
        container = self._sandbox.container(request.id)
        if request.stdin:
            await container.close_io(request.exec_id)
        return _EMPTY

    # --- The container as a whole ---

    async def pause(self, _context: CallContext, payload: bytes) -> bytes:
        await self._sandbox.container(pb.PauseRequest.FromString(payload).id).pause()
        return _EMPTY

    async def resume(self, _context: CallContext, payload: bytes) -> bytes:
        await self._sandbox.container(pb.ResumeRequest.FromString(payload).id).resume()
        return _EMPTY

    async def update(self, _context: CallContext, payload: bytes) -> bytes:
        request = pb.UpdateTaskRequest.FromString(payload)
        container = self._sandbox.container(request.id)
        await container.update(parse_json_object(request.resources.value, "the resources"))
        return _EMPTY

    async def stats(self, _context: CallContext, payload: bytes) -> bytes:
        request = pb.StatsRequest.FromString(payload)
        found = await self._sandbox.statistics(self._sandbox.container(request.id))
        type_url, value = stats.metrics(
            found, unified=stats.host_is_unified(), network=self._sandbox.network_statistics()
        )
        response = pb.StatsResponse()
        response.stats.type_url = type_url
        response.stats.value = value
        return response.SerializeToString()

    async def checkpoint(self, _context: CallContext, payload: bytes) -> bytes:
        self._sandbox.container(pb.CheckpointTaskRequest.FromString(payload).id)
        await trio.lowlevel.checkpoint()
        raise Unimplemented(
            "a container in a VM cannot be checkpointed: its state is the guest kernel's"
        )

    async def shutdown(self, _context: CallContext, _payload: bytes) -> bytes:
        """containerd says this after every Delete; it counts once nothing is left."""
        await self._sandbox.settled()
        if self._is_idle():
            self.exit_requested.set()
        return _EMPTY

    async def _exit_if_forgotten(self) -> None:
        """End the shim whose only Create was abandoned, unless somebody comes back to it."""
        await trio.sleep(FORGOTTEN_S)
        if self._is_idle():
            self._log.warning("nobody came back after an abandoned Create")
            self.exit_requested.set()

    # --- A pod without a container of its own ---

    async def _of_pod(self, method: str, context: CallContext, payload: bytes) -> bytes:
        if self._pods is None:
            from shimv2.sandbox_service import SandboxService

            self._pods = SandboxService(self._sandbox, self._invocation, self.exit_requested)
        return await self._pods.call(method, payload, _limit_s(context))

    # --- What all methods share ---

    def _is_idle(self) -> bool:
        """Whether nothing is left that the shim is there for."""
        has_pod = self._pods is not None and self._pods.has_pod
        return not self._sandbox.containers and not has_pod

    def _pid(self, container: Container) -> int:
        return container.pid or self._sandbox.reported_pid

    def _answering(
        self, name: str, call: Callable[[CallContext, bytes], Awaitable[bytes]]
    ) -> Handler:
        async def handler(context: CallContext, payload: bytes) -> bytes:
            try:
                return await call(context, payload)
            except Exception as exc:  # the border between the shim and containerd
                if not isinstance(representative(exc), (ShimError, AgentError, HypervisorError)):
                    self._log.exception("defect in the shim", exc, method=name)
                raise StatusError(*status_from(exc)) from exc

        return handler


_LAST_SIGNAL: Final = 64


def _inline(call: Callable[[CallContext, bytes], bytes]) -> Handler:
    def handler(context: CallContext, payload: bytes) -> bytes:
        try:
            return call(context, payload)
        except Exception as exc:  # the border between the shim and containerd
            raise StatusError(*status_from(exc)) from exc

    return handler


def _state_response(container: Container, process: ContainerProcess, pid: int) -> pb.StateResponse:
    status = _STATUS[process.state]
    if process.exec_id and status == process_pb.RUNNING and container.init.state is State.PAUSED:
        # Frozen with its container.
        status = process_pb.PAUSED
    plan = process.plan
    response = pb.StateResponse(
        id=process.exec_id or container.id,
        bundle=str(container.bundle.path),
        pid=pid,
        status=status,
        stdin=plan.stdin_url,
        stdout=plan.stdout_url,
        stderr=plan.stderr_url,
        terminal=plan.terminal,
    )
    if process.exit is not None:
        response.exit_status = process.exit.status
        set_timestamp(response.exited_at, process.exit.at_ns)
    return response


def _limit_s(context: CallContext) -> float:
    left_s = context.deadline - trio.current_time()
    return left_s - min(_ANSWER_MARGIN_S, left_s / 10) if math.isfinite(left_s) else math.inf


def real_parts(variant: str = "") -> Parts:
    """The host's own mounts and programs, and the configuration of the runtime's variant."""
    from shimv2.config import load_config

    return Parts(
        machinery=_real_machinery,
        load_config=partial(load_config, variant=variant),
        mounts=mounts,
        reports_root=REPORTS_ROOT,
        hierarchies=host_hierarchies,
    )


def _real_machinery(config: RuntimeConfig) -> Machinery:
    from hypervisors.registry import find_hypervisor
    from hypervisors.virtiofsd import check_virtiofsd, start_virtiofsd
    from hypervisors.vsock_device import start_vsock_device
    from shimv2.boot import Machinery
    from shimv2.kernel_vsock import open_kernel_vsock

    return Machinery(
        hypervisor=find_hypervisor(config.hypervisor.name),
        start_virtiofsd=start_virtiofsd,
        start_vsock_device=start_vsock_device,
        open_kernel_vsock=open_kernel_vsock,
        check_virtiofsd=check_virtiofsd,
    )
