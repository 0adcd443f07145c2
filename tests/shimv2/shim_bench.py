"""A whole shim in the test process: real ttrpc to the Task service and to the agent, fakes beyond.

async with ShimBench(tmp_path) as shim:
    await shim.create("c1")
    await shim.start("c1")
    assert (await shim.wait("c1")).exit_status == 0
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from shimv2.bootstrap import ShimInvocation
from shimv2.config import AgentConfig, RuntimeConfig
from shimv2.host_resources import Parts
from shimv2.pb import containerd_mount_pb2 as mount_pb
from shimv2.pb import containerd_task_pb2 as pb
from shimv2.state_dir import StateDir
from shimv2.task_service import SERVICE, TaskService
from tests.fakes.fake_agent import FakeAgent
from tests.fakes.fake_hypervisor import FakeHypervisor, FakeMachine
from ttrpc import Client, RemoteStatus, Server

if TYPE_CHECKING:
    from shimv2.cgroup_path import Hierarchy

Message = Any


def spec(
    args: list[str] | None = None, annotations: dict[str, str] | None = None, **more: Any
) -> dict[str, Any]:
    """A small config.json."""
    return {
        "ociVersion": "1.0.2",
        "process": {
            "args": args or ["true"],
            "cwd": "/",
            "user": {"uid": 0, "gid": 0},
            "env": ["PATH=/bin"],
        },
        "root": {"path": "rootfs"},
        "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
        "linux": {"namespaces": [{"type": "pid"}, {"type": "mount"}, {"type": "network"}]},
        "annotations": annotations or {},
        **more,
    }


def pod_annotations(kind: str, sandbox_id: str) -> dict[str, str]:
    return {
        "io.kubernetes.cri.container-type": kind,
        "io.kubernetes.cri.sandbox-id": sandbox_id,
    }


class FakeMounts:
    """Records what would be mounted."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.error: Exception | None = None
        self.bind_error: Exception | None = None
        self.propagation: list[int] = []

    def mount_rootfs(self, mounts: Any, target: str) -> None:
        if self.error is not None:
            raise self.error
        self.calls.append(("rootfs", [m.source for m in mounts], target))

    def bind(
        self,
        source: str | int,
        target: str | int,
        *,
        read_only: bool = False,
        recursive: bool = True,
        writable_below: bool = False,
        propagation: int = 0,
        attributes: int = 0,
    ) -> None:
        if self.bind_error is not None:
            raise self.bind_error
        self.calls.append(("bind", _named(source), _named(target), read_only))
        self.propagation.append(propagation)

    def make_shared(self, path: str) -> None:
        self.calls.append(("shared", path))


def _named(place: str | int) -> str:
    return os.readlink(f"/proc/self/fd/{place}") if isinstance(place, int) else place


class RecordingLog:
    def __init__(self) -> None:
        self.lines: list[tuple[str, dict[str, object]]] = []

    def info(self, event: str, **fields: object) -> None:
        self.lines.append((event, fields))

    def warning(self, event: str, **fields: object) -> None:
        self.lines.append((event, fields))

    def error(self, event: str, **fields: object) -> None:
        self.lines.append((event, fields))

    def exception(self, event: str, error: BaseException, **fields: object) -> None:
        raise AssertionError(f"{event}: {error!r}") from error

    def named(self, event: str) -> list[dict[str, object]]:
        return [fields for name, fields in self.lines if name == event]


class RecordingPublisher:
    def __init__(self) -> None:
        self.events: list[tuple[str, Message]] = []

    def publish(self, topic: str, message: Message) -> None:
        self.events.append((topic, message))

    @property
    def topics(self) -> list[str]:
        return [topic.removeprefix("/tasks/") for topic, _ in self.events]

    def named(self, topic: str) -> list[Message]:
        return [message for name, message in self.events if name == f"/tasks/{topic}"]


class ShimBench:
    """The shim's service, its fakes, and containerd's side of the connection."""

    def __init__(self, root: Path, config: RuntimeConfig | None = None) -> None:
        self.root = root
        self.config = config or RuntimeConfig(agent=AgentConfig(readiness="push"))
        self.state_dir = StateDir("k", str(root / "s"))
        self.publisher = RecordingPublisher()
        self.log = RecordingLog()
        self.mounts = FakeMounts()
        self.hypervisor = FakeHypervisor()
        self.agent = FakeAgent(Path(self.state_dir.path) / "vsock.sock")
        self.agent_reports = True
        self.hierarchies: tuple[Hierarchy, ...] = ()
        self.invocation = ShimInvocation(
            namespace="default", id="c1", containerd_address="/c.sock", bundle_path=str(root)
        )
        self.config_paths: list[str | None] = []
        self.service = TaskService(
            self.invocation,
            self.state_dir,
            self.publisher,
            self.log,
            Parts(
                machinery=lambda config: self.hypervisor.machinery(),
                load_config=self._load_config,
                mounts=self.mounts,
                reports_root=str(root / "reports"),
                hierarchies=lambda: self.hierarchies,
            ),
        )
        self._nursery: trio.Nursery | None = None
        self._client: Client | None = None

    def _load_config(self, path: str | None, annotations: dict[str, str]) -> RuntimeConfig:
        self.config_paths.append(path)
        return self.config

    @property
    def machine(self) -> FakeMachine:
        return self.hypervisor.machines[-1]

    @property
    def nursery(self) -> trio.Nursery:
        assert self._nursery is not None
        return self._nursery

    @asynccontextmanager
    async def running(self) -> AsyncIterator[ShimBench]:
        """Serve; at the end everything is taken down, and nothing may be left."""
        async with trio.open_nursery() as guest, trio.open_nursery() as nursery:
            self._nursery = nursery

            async def power_on(machine: FakeMachine) -> None:
                # The agent of a machine that has been given up is gone with it.
                await guest.start(self.agent.serve)
                if self.agent_reports:
                    path = self.agent.uds_path.with_name(self.agent.uds_path.name + "_1030")
                    guest.start_soon(self.agent.report_ready, path)

            self.hypervisor.on_launch = self.hypervisor.on_launch or power_on
            self.hypervisor.on_exit = self.agent.wire.drop
            await nursery.start(self.service.run)
            self._client = await self.connect()
            yield self
            nursery.cancel_scope.cancel()
            guest.cancel_scope.cancel()
        assert not self.state_dir.exists(), os.listdir(self.state_dir.path)
        assert all(helper.is_closed for helper in self.hypervisor.helpers)
        assert all(machine.exit is not None for machine in self.hypervisor.machines)

    async def connect(self) -> Client:
        """Another connection of containerd's."""
        near, far = socket.socketpair()
        near.setblocking(False)
        far.setblocking(False)
        server = Server(self.service.services())
        self.nursery.start_soon(server.serve_connection, far)
        client = Client(near)
        await self.nursery.start(client.run)
        return client

    async def call(
        self,
        method: str,
        request: Message,
        reply: Any = None,
        *,
        timeout_s: float | None = None,
        service: str = SERVICE,
    ) -> Any:
        assert self._client is not None
        payload = await self._client.call(
            service, method, request.SerializeToString(), timeout_s=timeout_s
        )
        return reply.FromString(payload) if reply is not None else None

    async def until(self, is_true: Callable[[], bool]) -> None:
        """Wait for something that announces itself by nothing; the caller sets the deadline."""
        while not is_true():  # noqa: ASYNC110
            await trio.sleep(0.01)

    def bundle(self, container_id: str, config: dict[str, Any] | None = None) -> Path:
        """Make a bundle directory with a rootfs."""
        path = self.root / "bundles" / container_id
        (path / "rootfs").mkdir(parents=True, exist_ok=True)
        (path / "config.json").write_text(json.dumps(config or spec()))
        return path

    def fifo(self, name: str) -> str:
        path = self.root / name
        os.mkfifo(path)
        return str(path)

    async def create(
        self,
        container_id: str = "c1",
        config: dict[str, Any] | None = None,
        *,
        timeout_s: float | None = None,
        **fields: Any,
    ) -> Message:
        bundle = self.bundle(container_id, config)
        request = pb.CreateTaskRequest(id=container_id, bundle=str(bundle), **fields)
        return await self.call("Create", request, pb.CreateTaskResponse, timeout_s=timeout_s)

    async def start(self, container_id: str = "c1", exec_id: str = "") -> Message:
        request = pb.StartRequest(id=container_id, exec_id=exec_id)
        return await self.call("Start", request, pb.StartResponse)

    async def run(self, container_id: str = "c1", **fields: Any) -> None:
        await self.create(container_id, **fields)
        await self.start(container_id)

    async def wait(self, container_id: str = "c1", exec_id: str = "") -> Message:
        request = pb.WaitRequest(id=container_id, exec_id=exec_id)
        return await self.call("Wait", request, pb.WaitResponse)

    async def state(self, container_id: str = "c1", exec_id: str = "") -> Message:
        request = pb.StateRequest(id=container_id, exec_id=exec_id)
        return await self.call("State", request, pb.StateResponse)

    async def kill(
        self,
        container_id: str = "c1",
        signal: int = 9,
        exec_id: str = "",
        *,
        everyone: bool = False,
    ) -> None:
        request = pb.KillRequest(id=container_id, exec_id=exec_id, signal=signal, all=everyone)
        await self.call("Kill", request)

    async def delete(self, container_id: str = "c1", exec_id: str = "") -> Message:
        request = pb.DeleteRequest(id=container_id, exec_id=exec_id)
        return await self.call("Delete", request, pb.DeleteResponse)

    async def exec(
        self,
        exec_id: str,
        container_id: str = "c1",
        process: dict[str, Any] | None = None,
        **fields: Any,
    ) -> None:
        request = pb.ExecProcessRequest(id=container_id, exec_id=exec_id, **fields)
        request.spec.type_url = "types.containerd.io/opencontainers/runtime-spec/1/Process"
        request.spec.value = json.dumps(process or {"args": ["sh"], "cwd": "/"}).encode()
        await self.call("Exec", request)


def overlay(source: str = "overlay") -> Message:
    return mount_pb.Mount(type="overlay", source=source, options=["lowerdir=/l"])


async def refusal(call: Any) -> RemoteStatus:
    """The status of a call that must be refused."""
    try:
        await call
    except RemoteStatus as exc:
        return exc
    raise AssertionError("the call was not refused")
