"""containerd's own gRPC API, for what `ctr` can't do: create without start, wait before start, …

Containers (with their snapshot and spec) are made by `ctr container create`; `Tasks` drives what
a shim sees. Blocking calls with deadlines; `wait_later` and `EventLog` run in threads of grpc's.
"""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import grpc  # type: ignore[import-untyped]  # ships no stubs

from tests.harness.containerd_daemon import ADDRESS
from tests.harness.messages import MESSAGES
from tests.harness.patience import patient

if TYPE_CHECKING:
    from tests.harness.node import Node

_TASKS = "/containerd.services.tasks.v1.Tasks/"
_SUBSCRIBED = "/test/subscribed"
_SPEC_TYPE = "types.containerd.io/opencontainers/runtime-spec/1/"
STATES = {0: "UNKNOWN", 1: "CREATED", 2: "RUNNING", 3: "STOPPED", 4: "PAUSED", 5: "PAUSING"}


class CallFailed(Exception):
    """containerd refused a call: `code` is gRPC's name of it, `message` what a user reads."""

    def __init__(self, method: str, error: grpc.RpcError) -> None:
        assert isinstance(error, grpc.Call)
        self.code = error.code().name
        self.message = error.details() or ""
        super().__init__(f"{method}: {self.code}: {self.message}")


class PendingWait:
    """A Wait that was sent and isn't answered yet."""

    def __init__(self, future: Any) -> None:
        self._future = future

    def exit_status(self, timeout_s: float = 30) -> int:
        """Return the exit status; raises CallFailed when the call was refused."""
        try:
            return int(self._future.result(timeout_s).exit_status)
        except grpc.RpcError as error:
            raise CallFailed("Wait", error) from None

    def is_pending(self) -> bool:
        return not self._future.done()


class Tasks:
    """A connection to a node's containerd. Use as a context manager."""

    def __init__(self, node: Node) -> None:
        self._node = node
        socket = node.path(ADDRESS)
        self._channel = grpc.insecure_channel(f"unix:{socket}")
        self._metadata = (("containerd-namespace", node.name),)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._channel.close()

    def call(self, path: str, request: Any, response: str, *, timeout_s: float = 60) -> Any:
        """Make one unary call; raises CallFailed."""
        stub = self._stub(path, response)
        try:
            return stub(request, metadata=self._metadata, timeout=patient(timeout_s))
        except grpc.RpcError as error:
            raise CallFailed(path.rpartition("/")[2], error) from None

    def create(
        self,
        container: str,
        *,
        snapshotter: str = "overlayfs",
        rootfs: bool | Sequence[Mapping[str, object]] = True,
        stdin: str = "",
        stdout: str = "",
        stderr: str = "",
        terminal: bool = False,
        timeout_s: float = 60,
    ) -> int:
        """Create the task of a container made by `ctr container create`; return its pid.

        `rootfs`: the snapshot's mounts, none, or these instead (type, source, options).
        """
        request = MESSAGES["CreateTaskRequest"](
            container_id=container, stdin=stdin, stdout=stdout, stderr=stderr, terminal=terminal
        )
        if not isinstance(rootfs, bool):
            request.rootfs.extend(MESSAGES["Mount"](**mount) for mount in rootfs)
        elif rootfs:
            mounts = self.call(
                "/containerd.services.snapshots.v1.Snapshots/Mounts",
                MESSAGES["MountsRequest"](snapshotter=snapshotter, key=container),
                "MountsResponse",
            ).mounts
            request.rootfs.extend(mounts)
        return int(
            self.call(f"{_TASKS}Create", request, "CreateTaskResponse", timeout_s=timeout_s).pid
        )

    def start(self, container: str, exec_id: str = "") -> int:
        return int(self._process("Start", container, exec_id, "StartResponse").pid)

    def wait(self, container: str, exec_id: str = "", timeout_s: float = 60) -> int:
        return int(
            self._process(
                "Wait", container, exec_id, "WaitResponse", timeout_s=timeout_s
            ).exit_status
        )

    def wait_later(self, container: str, exec_id: str = "") -> PendingWait:
        """Send Wait and return at once."""
        request = MESSAGES["ProcessRequest"](container_id=container, exec_id=exec_id)
        stub = self._stub(f"{_TASKS}Wait", "WaitResponse")
        return PendingWait(stub.future(request, metadata=self._metadata, timeout=patient(120)))

    def delete(self, container: str) -> int:
        """Delete the task; return its exit status."""
        return int(self._process("Delete", container, "", "DeleteResponse").exit_status)

    def delete_exec(self, container: str, exec_id: str) -> int:
        return int(self._process("DeleteProcess", container, exec_id, "DeleteResponse").exit_status)

    def kill(
        self,
        container: str,
        signal: int,
        *,
        exec_id: str = "",
        everything: bool = False,
        timeout_s: float = 60,
    ) -> None:
        self.call(
            f"{_TASKS}Kill",
            MESSAGES["KillRequest"](
                container_id=container, exec_id=exec_id, signal=signal, all=everything
            ),
            "Empty",
            timeout_s=timeout_s,
        )

    def exec(
        self,
        container: str,
        exec_id: str,
        args: Sequence[str],
        *,
        stdin: str = "",
        stdout: str = "",
        stderr: str = "",
        terminal: bool = False,
        **process: object,
    ) -> None:
        """Register an exec; `process` adds to the OCI process."""
        spec: dict[str, object] = {
            "args": list(args),
            "cwd": "/",
            "user": {"uid": 0, "gid": 0},
            "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"],
            "terminal": terminal,
            **process,
        }
        request = MESSAGES["ExecProcessRequest"](
            container_id=container,
            exec_id=exec_id,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            terminal=terminal,
        )
        request.spec.type_url, request.spec.value = f"{_SPEC_TYPE}Process", _json(spec)
        self.call(f"{_TASKS}Exec", request, "Empty")

    def update(self, container: str, resources: Mapping[str, object]) -> None:
        request = MESSAGES["UpdateTaskRequest"](container_id=container)
        request.resources.type_url = f"{_SPEC_TYPE}LinuxResources"
        request.resources.value = _json(resources)
        self.call(f"{_TASKS}Update", request, "Empty")

    def pause(self, container: str) -> None:
        self._process("Pause", container, "", "Empty")

    def resume(self, container: str) -> None:
        self._process("Resume", container, "", "Empty")

    def close_stdin(self, container: str, exec_id: str = "") -> None:
        self.call(
            f"{_TASKS}CloseIO",
            MESSAGES["CloseIORequest"](container_id=container, exec_id=exec_id, stdin=True),
            "Empty",
        )

    def resize(self, container: str, rows: int, columns: int, exec_id: str = "") -> None:
        self.call(
            f"{_TASKS}ResizePty",
            MESSAGES["ResizePtyRequest"](
                container_id=container, exec_id=exec_id, width=columns, height=rows
            ),
            "Empty",
        )

    def pids(self, container: str) -> list[int]:
        answer = self._process("ListPids", container, "", "ListPidsResponse")
        return [process.pid for process in answer.processes]

    def get(self, container: str, exec_id: str = "") -> Any:
        """Return the task's or exec's Process message (status, pid, exit_status, exited_at)."""
        return self._process("Get", container, exec_id, "GetResponse").process

    def status(self, container: str, exec_id: str = "") -> str:
        return STATES[self.get(container, exec_id).status]

    def _process(
        self, method: str, container: str, exec_id: str, response: str, *, timeout_s: float = 60
    ) -> Any:
        request = MESSAGES["ProcessRequest"](container_id=container, exec_id=exec_id)
        return self.call(_TASKS + method, request, response, timeout_s=timeout_s)

    def _stub(self, path: str, response: str) -> Any:
        return self._channel.unary_unary(
            path,
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=MESSAGES[response].FromString,
        )


class EventLog:
    """The events of a node's namespace, in the order containerd forwards them."""

    def __init__(self, node: Node) -> None:
        self._channel = grpc.insecure_channel(f"unix:{node.path(ADDRESS)}")
        subscribe = self._channel.unary_stream(
            "/containerd.services.events.v1.Events/Subscribe",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=MESSAGES["Envelope"].FromString,
        )
        self._stream: Any = subscribe(
            MESSAGES["SubscribeRequest"](filters=[f"namespace=={node.name}"])
        )
        self._namespace = node.name
        self._queue: queue.Queue[Any] = queue.Queue()
        self.seen: list[Any] = []
        self._thread = threading.Thread(target=self._collect, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        # containerd doesn't say when a subscription stands: publish until one's own event is seen.
        publish = self._channel.unary_unary(
            "/containerd.services.events.v1.Events/Publish",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=MESSAGES["Empty"].FromString,
        )
        request = MESSAGES["PublishRequest"](topic=_SUBSCRIBED)
        request.event.type_url = "kata.test.Subscribed"
        metadata = (("containerd-namespace", self._namespace),)
        for _ in range(600):
            publish(request, metadata=metadata, timeout=patient(30))
            try:
                self._queue.get(timeout=0.05)
            except queue.Empty:
                continue
            return self
        raise AssertionError("containerd doesn't forward events")

    def __exit__(self, *details: object) -> None:
        self._stream.cancel()
        self._thread.join(10)
        self._channel.close()

    def _collect(self) -> None:
        try:
            for envelope in self._stream:
                self._queue.put(envelope)
        except grpc.RpcError:
            return

    def expect(self, topic: str, container: str, timeout_s: float = 30) -> Any:
        """Return the next event of a topic about a container; keeps what came before in `seen`."""
        deadline = time.monotonic() + patient(timeout_s)
        while True:
            try:
                envelope = self._queue.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise AssertionError(
                    f"no {topic} of {container} within {patient(timeout_s):g} s; seen: "
                    f"{[seen.topic for seen in self.seen]}"
                ) from None
            self.seen.append(envelope)
            if envelope.topic == topic and container.encode() in envelope.event.value:
                return envelope

    def topics(self, container: str) -> list[str]:
        """List the task topics about a container among what was taken so far."""
        return [
            envelope.topic
            for envelope in self.seen
            if envelope.topic.startswith("/tasks/") and container.encode() in envelope.event.value
        ]


def field_values(message: bytes) -> dict[int, int | bytes]:
    """Decode a protobuf message's top-level fields, the last of each number.

    Enough to read an event's strings and numbers without its class.
    """
    fields: dict[int, int | bytes] = {}
    position = 0
    while position < len(message):
        tag, position = _varint(message, position)
        value: int | bytes
        if tag & 7 == 0:
            value, position = _varint(message, position)
        else:
            assert tag & 7 == 2, f"wire type {tag & 7}"
            length, position = _varint(message, position)
            value, position = message[position : position + length], position + length
        fields[tag >> 3] = value
    return fields


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position


def _json(value: object) -> bytes:
    return json.dumps(value).encode()
