"""What happens to tasks, as the messages that containerd's event exchange carries.

One queue, in order: create < start < exit < delete, exec-added < exec-started < exit, and the exit
of a container's init after those of its execs. Source: containerd api/events/task.proto.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from shimv2.pb import containerd_events_pb2 as pb

if TYPE_CHECKING:
    from google.protobuf.message import Message
    from google.protobuf.timestamp_pb2 import Timestamp

    from shimv2.container import Container
    from shimv2.pb.containerd_mount_pb2 import Mount
    from shimv2.process import ContainerProcess, ProcessExit


class Publisher(Protocol):
    """Takes an event into its queue at once."""

    def publish(self, topic: str, message: Message) -> None: ...


def set_timestamp(target: Timestamp, at_ns: int) -> None:
    """Nanoseconds since the epoch into a Timestamp."""
    target.seconds, target.nanos = divmod(at_ns, 1_000_000_000)


class TaskEvents:
    """Publishes the events of one shim's tasks."""

    def __init__(self, publisher: Publisher) -> None:
        self._publisher = publisher

    def created(self, container: Container, rootfs: Sequence[Mount], io: pb.TaskIO) -> None:
        self._publisher.publish(
            "/tasks/create",
            pb.TaskCreate(
                container_id=container.id,
                bundle=str(container.bundle.path),
                rootfs=rootfs,
                io=io,
                pid=container.pid,
            ),
        )

    def started(self, container: Container, process: ContainerProcess) -> None:
        if process.exec_id:
            self._publisher.publish(
                "/tasks/exec-started",
                pb.TaskExecStarted(
                    container_id=container.id, exec_id=process.exec_id, pid=container.pid
                ),
            )
            return
        self._publisher.publish(
            "/tasks/start", pb.TaskStart(container_id=container.id, pid=container.pid)
        )

    def exec_added(self, container: Container, process: ContainerProcess) -> None:
        self._publisher.publish(
            "/tasks/exec-added",
            pb.TaskExecAdded(container_id=container.id, exec_id=process.exec_id),
        )

    def exited(self, container: Container, process: ContainerProcess) -> None:
        assert process.exit is not None
        message = pb.TaskExit(
            container_id=container.id,
            id=process.exec_id or container.id,
            pid=container.pid,
            exit_status=process.exit.status,
        )
        set_timestamp(message.exited_at, process.exit.at_ns)
        self._publisher.publish("/tasks/exit", message)

    def deleted(self, container: Container, ended: ProcessExit) -> None:
        message = pb.TaskDelete(
            container_id=container.id,
            pid=container.pid,
            exit_status=ended.status,
            id=container.id,
        )
        set_timestamp(message.exited_at, ended.at_ns)
        self._publisher.publish("/tasks/delete", message)

    def oom(self, container: Container) -> None:
        self._publisher.publish("/tasks/oom", pb.TaskOOM(container_id=container.id))

    def paused(self, container: Container) -> None:
        self._publisher.publish("/tasks/paused", pb.TaskPaused(container_id=container.id))

    def resumed(self, container: Container) -> None:
        self._publisher.publish("/tasks/resumed", pb.TaskResumed(container_id=container.id))
