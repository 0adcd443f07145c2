"""A guest agent inside of the test process: the real protocol over a real socket, no guest.

    async with trio.open_nursery() as nursery:
        agent = FakeAgent(tmp_path / "vsock.sock")
        agent.program(CAT, container="c1")
        await nursery.start(agent.serve)
        sock = await dial(HybridVsock(agent.uds_path), timeout_s=1)

It keeps sandbox, containers and processes as the Kata agent does, records every request, and
misbehaves on demand: `hang`, `fail`, `answer`, `delay` for one method, `wire.spoil` for the bytes.
"""

from __future__ import annotations

import json
import re
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from agent_proto.pb import agent_pb2, csi_pb2, health_pb2
from tests.fakes.fake_process import FakeProcess, Program
from tests.fakes.fake_wire import FakeWire
from ttrpc.descriptors import message_class
from ttrpc.errors import Code, StatusError
from ttrpc.server import Server

Message = Any
Script = Callable[[], Any]


@dataclass
class FakeContainer:
    """One container and its processes by exec id; the init process has the container's id."""

    id: str
    request: Message
    processes: dict[str, FakeProcess]
    paused: bool = False
    resources: list[Message] = field(default_factory=list)


class FakeAgent:
    """Serves grpc.AgentService and grpc.Health behind a hybrid vsock socket at `uds_path`."""

    def __init__(self, uds_path: Path, *, port: int = 1024) -> None:
        self.uds_path = uds_path
        self.wire = FakeWire(uds_path, port)
        self.requests: list[tuple[str, Message]] = []
        self.sandbox: Message | None = None
        self.containers: dict[str, FakeContainer] = {}
        self.interfaces: list[Message] = []
        self.routes: list[Message] = []
        self.files: dict[str, bytes] = {}
        self.serving = True
        self.keeps_output = True  # as our agent does; upstream's forgets it at the exit
        self._programs: dict[tuple[str | None, str | None], Program] = {}
        self._scripts: dict[str, Script] = {}
        self._oom_send, self._oom = trio.open_memory_channel[str](1000)

    # --- For the test ---

    def program(
        self, program: Program, *, container: str | None = None, exec_id: str | None = None
    ) -> None:
        """Say what the next processes run: of one container, of one exec, or all of them."""
        self._programs[container, exec_id] = program

    def hang(self, method: str) -> None:
        """Never answer `method`."""
        self._scripts[method] = trio.sleep_forever

    def fail(self, method: str, code: Code, message: str = "scripted") -> None:
        """Answer `method` with an error."""

        async def script() -> Message:
            raise StatusError(code, message)

        self._scripts[method] = script

    def answer(self, method: str, reply: Message | bytes) -> None:
        """Answer `method` with a message, or with bytes that need not be one."""

        async def script() -> Message | bytes:
            return reply

        self._scripts[method] = script

    def delay(self, method: str, seconds: float, reply: Message | None = None) -> None:
        """Answer `method` late, with nothing in it unless a reply is given."""

        async def script() -> Message | bytes:
            await trio.sleep(seconds)
            return b"" if reply is None else reply

        self._scripts[method] = script

    def behave(self, method: str) -> None:
        """Undo `hang`, `fail`, `answer` and `delay`."""
        self._scripts.pop(method, None)

    def oom(self, container: str) -> None:
        """Report that the guest's OOM killer hit."""
        self._oom_send.send_nowait(container)

    def process(self, container: str, exec_id: str = "") -> FakeProcess:
        """Return a process that has not been waited for yet."""
        return self.containers[container].processes[exec_id or container]

    def called(self, method: str) -> list[Message]:
        """Return the requests of one method, in order."""
        return [request for name, request in self.requests if name == method]

    async def report_ready(self, path: Path, line: bytes | None = None) -> None:
        """Connect to the host's readiness socket and report, as the guest does at boot."""
        report = {"agent": "fake", "version": "1.0", "boot_ms": {"agent": 1.5}}
        stream = await trio.open_unix_socket(path)
        async with stream:
            await stream.send_all(json.dumps(report).encode() + b"\n" if line is None else line)

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled. `started` means that the socket can be connected to."""
        await self.wire.listen(self._serve_connection, task_status=task_status)

    # --- Service ---

    async def _serve_connection(self, sock: socket.socket) -> None:
        services = {
            f"grpc.{name}": {
                method.name: self._handler(method)
                for method in descriptor.services_by_name[name].methods
            }
            for name, descriptor in (
                ("AgentService", agent_pb2.DESCRIPTOR),
                ("Health", health_pb2.DESCRIPTOR),
            )
        }
        await Server(services).serve_connection(sock)

    def _handler(self, method: Any) -> Any:
        name = method.name
        request_type = message_class(method.input_type.full_name)
        reply_type = message_class(method.output_type.full_name)
        act = getattr(self, "_" + re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower(), None)

        async def handle(_context: object, payload: bytes) -> bytes:
            request = request_type.FromString(payload)
            self.requests.append((name, request))
            script = self._scripts.get(name)
            if script is not None:
                reply = await script()
            else:
                reply = await act(request) if act is not None else None
            if isinstance(reply, bytes):
                return reply
            return (reply_type() if reply is None else reply).SerializeToString()

        return handle

    def _container(self, cid: str) -> FakeContainer:
        if cid not in self.containers:
            raise StatusError(Code.INVALID_ARGUMENT, f"no container {cid}")
        return self.containers[cid]

    def _process(self, request: Message) -> FakeProcess:
        container = self._container(request.container_id)
        process = container.processes.get(request.exec_id or container.id)
        if process is None:
            raise StatusError(Code.NOT_FOUND, f"no process {request.exec_id}")
        return process

    def _new_process(self, cid: str, exec_id: str, process: Message) -> FakeProcess:
        keys = ((cid, exec_id), (cid, None), (None, None))
        program = next((self._programs[key] for key in keys if key in self._programs), Program())
        return FakeProcess(program, process.Terminal)

    async def _check(self, request: Message) -> Message:
        status = health_pb2.HealthCheckResponse.ServingStatus
        return health_pb2.HealthCheckResponse(
            status=status.SERVING if self.serving else status.NOT_SERVING
        )

    async def _version(self, request: Message) -> Message:
        return health_pb2.VersionCheckResponse(grpc_version="0.0.1", agent_version="fake-1.0")

    async def _create_sandbox(self, request: Message) -> None:
        self.sandbox = request

    async def _destroy_sandbox(self, request: Message) -> None:
        self.sandbox = None

    async def _create_container(self, request: Message) -> None:
        cid = request.container_id
        if cid in self.containers:
            raise StatusError(Code.ALREADY_EXISTS, f"container {cid} exists")
        init = self._new_process(cid, cid, request.OCI.Process)
        self.containers[cid] = FakeContainer(cid, request, {cid: init})

    async def _start_container(self, request: Message) -> None:
        container = self._container(request.container_id)
        container.processes[container.id].start()

    async def _remove_container(self, request: Message) -> None:
        container = self._container(request.container_id)
        for process in container.processes.values():
            process.exit(128 + signal.SIGKILL)
        del self.containers[container.id]

    async def _update_container(self, request: Message) -> None:
        self._container(request.container_id).resources.append(request.resources)

    async def _pause_container(self, request: Message) -> None:
        self._container(request.container_id).paused = True

    async def _resume_container(self, request: Message) -> None:
        self._container(request.container_id).paused = False

    async def _stats_container(self, request: Message) -> Message:
        self._container(request.container_id)
        reply = agent_pb2.StatsContainerResponse()
        reply.cgroup_stats.cpu_stats.cpu_usage.total_usage = 1_000_000
        reply.cgroup_stats.memory_stats.usage.usage = 4 << 20
        reply.cgroup_stats.pids_stats.current = 1
        return reply

    async def _get_oomevent(self, request: Message) -> Message:
        return agent_pb2.OOMEvent(container_id=await self._oom.receive())

    async def _get_diagnostic_data(self, request: Message) -> Message:
        if request.log_type != "termination_log":
            raise StatusError(Code.UNIMPLEMENTED, f"log type {request.log_type}")
        return agent_pb2.GetDiagnosticDataResponse(data="the end")

    async def _exec_process(self, request: Message) -> None:
        container = self._container(request.container_id)
        if request.exec_id in container.processes:
            raise StatusError(Code.ALREADY_EXISTS, f"process {request.exec_id} exists")
        process = self._new_process(container.id, request.exec_id, request.process)
        container.processes[request.exec_id] = process
        process.start()

    async def _signal_process(self, request: Message) -> None:
        process = self._process(request)
        everyone = not request.exec_id and request.signal == signal.SIGKILL
        if process.status is not None and not everyone:
            raise StatusError(Code.NOT_FOUND, "process has exited")
        if everyone:
            for each in self.containers[request.container_id].processes.values():
                each.signal(request.signal)
        else:
            process.signal(request.signal)

    async def _wait_process(self, request: Message) -> Message:
        process = self._process(request)
        await process.exited.wait()
        container = self.containers.get(request.container_id)
        has_output = process.stdout.data or process.stderr.data
        if container is not None and not (self.keeps_output and has_output):
            container.processes.pop(request.exec_id or container.id, None)
        return agent_pb2.WaitProcessResponse(status=process.status)

    async def _write_stdin(self, request: Message) -> Message:
        taken = await self._process(request).write(request.data)
        return agent_pb2.WriteStreamResponse(len=taken)

    async def _read_stdout(self, request: Message) -> Message:
        data = await self._process(request).stdout.read(request.len)
        return agent_pb2.ReadStreamResponse(data=data)

    async def _read_stderr(self, request: Message) -> Message:
        data = await self._process(request).stderr.read(request.len)
        return agent_pb2.ReadStreamResponse(data=data)

    async def _close_stdin(self, request: Message) -> None:
        self._process(request).end_stdin()

    async def _tty_win_resize(self, request: Message) -> None:
        process = self._process(request)
        if not process.terminal:
            raise StatusError(Code.UNAVAILABLE, "no tty")
        process.size = (request.row, request.column)

    async def _update_interface(self, request: Message) -> Message:
        self.interfaces.append(request.interface)
        return request.interface

    async def _update_routes(self, request: Message) -> Message:
        self.routes = list(request.routes.Routes)
        return request.routes

    async def _list_interfaces(self, request: Message) -> Message:
        return agent_pb2.Interfaces(Interfaces=self.interfaces)

    async def _list_routes(self, request: Message) -> Message:
        return agent_pb2.Routes(Routes=self.routes)

    async def _get_iptables(self, request: Message) -> Message:
        return agent_pb2.GetIPTablesResponse(data=b"*filter v6" if request.is_ipv6 else b"*filter")

    async def _set_iptables(self, request: Message) -> Message:
        return agent_pb2.SetIPTablesResponse(data=request.data)

    async def _copy_file(self, request: Message) -> None:
        content = self.files.get(request.path, b"")
        self.files[request.path] = content[: request.offset] + request.data

    async def _get_volume_stats(self, request: Message) -> Message:
        unit = csi_pb2.VolumeUsage.Unit.BYTES
        usage = csi_pb2.VolumeUsage(available=60, total=100, used=40, unit=unit)
        return csi_pb2.VolumeStatsResponse(usage=[usage])

    async def _get_guest_details(self, request: Message) -> Message:
        reply = agent_pb2.GuestDetailsResponse(mem_block_size_bytes=128 << 20)
        reply.agent_details.version = "fake-1.0"
        reply.agent_details.init_daemon = True
        reply.agent_details.storage_handlers.extend(["virtio-fs", "ephemeral", "local"])
        return reply

    async def _get_metrics(self, request: Message) -> Message:
        return agent_pb2.Metrics(metrics="kata_agent_total_rss 1\n")
