"""Tells containerd what happens to its tasks: in order, bounded, and across its restarts.

`publish` only queues. One task sends the head of the queue until containerd took it, so the order
of events is the order of the calls to `publish`, also when a connection breaks in between. Source:
containerd pkg/shim/publisher.go.
"""

from __future__ import annotations

import socket
import time
from collections import deque
from typing import TYPE_CHECKING, Final, NamedTuple

import trio

from shimv2.pb.containerd_forward_pb2 import Envelope, ForwardRequest
from ttrpc import Client, Code, RemoteStatus, TtrpcError
from ttrpc.pb.well_known_pb2 import Any, Timestamp

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from shimv2.logs import Log

SERVICE: Final = "containerd.services.events.ttrpc.v1.Events"
MAX_QUEUED: Final = 2048  # Source: containerd pkg/shim/publisher.go queueSize
CALL_DEADLINE_S: Final = 5.0  # Source: the same, per Forward
_FIRST_PAUSE_S: Final = 0.1
_LONGEST_PAUSE_S: Final = 5.0

TASK_EXIT: Final = "/tasks/exit"

# containerd has read the event and will never take it; anything else may go away.
_FINAL_CODES: Final = frozenset({
    Code.INVALID_ARGUMENT, Code.UNIMPLEMENTED, Code.NOT_FOUND, Code.PERMISSION_DENIED,
    Code.UNAUTHENTICATED, Code.RESOURCE_EXHAUSTED,
})  # fmt: skip


class _Queued(NamedTuple):
    topic: str
    request: bytes


class EventPublisher:
    """The queue and its sender. `run` belongs into a nursery that outlives every container."""

    def __init__(self, address: str, namespace: str, log: Log) -> None:
        """`address` is containerd's TTRPC_ADDRESS; empty (CRI-O): events are logged only."""
        self._address = address.removeprefix("unix://")
        self._namespace = namespace
        self._log = log
        self._queue: deque[_Queued] = deque()
        self._changed = trio.Event()
        self._pause_s = 0.0
        self.dropped = 0

    def publish(self, topic: str, message: Message) -> None:
        """Queue an event; never waits, never fails.

        When the queue is full, the oldest event that is no exit gives way: exits end waits in
        Docker and nerdctl, the others only inform.
        """
        name = message.DESCRIPTOR.full_name
        if not self._address:
            self._log.info("event", topic=topic, type=name)
            return
        now = time.time_ns()
        envelope = Envelope(
            timestamp=Timestamp(seconds=now // 10**9, nanos=now % 10**9),
            namespace=self._namespace,
            topic=topic,
            event=Any(type_url=name, value=message.SerializeToString()),
        )
        request = ForwardRequest(envelope=envelope).SerializeToString()
        self._queue.append(_Queued(topic, request))
        if len(self._queue) > MAX_QUEUED:
            self._drop_one()
        self._wake()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Send what is queued until cancelled. What is queued then is lost: call `flush` first."""
        task_status.started()
        while True:
            await self._wait_until(bool)
            await trio.sleep(self._pause_s)
            try:
                await self._send_over(_dial(self._address))
            except (OSError, TtrpcError) as error:
                self._slow_down(error)

    async def flush(self, deadline_s: float) -> bool:
        """Wait until everything is sent, at most `deadline_s`; say whether it was."""
        with trio.move_on_after(deadline_s):
            await self._wait_until(lambda queue: not queue)
        return not self._queue

    async def _send_over(self, connection: socket.socket) -> None:
        client = Client(connection)
        lost: TtrpcError | None = None
        async with trio.open_nursery() as nursery:
            await nursery.start(client.run)
            try:
                while True:
                    await self._send_head(client)
                    await self._wait_until(bool)
            except TtrpcError as error:
                lost = error  # raised outside of the nursery, which would wrap it
            finally:
                client.close()
                nursery.cancel_scope.cancel()
        if lost is not None:
            raise lost

    async def _send_head(self, client: Client) -> None:
        """Send the first event and take it off the queue, unless it should be tried again."""
        head = self._queue[0]
        try:
            with trio.fail_after(CALL_DEADLINE_S + 0.5):
                await client.call(SERVICE, "Forward", head.request, timeout_s=CALL_DEADLINE_S)
        except RemoteStatus as error:
            if error.code not in _FINAL_CODES:
                raise
            self._log.warning("event refused", topic=head.topic, error=str(error))
        except trio.TooSlowError as error:
            raise TtrpcError(f"no answer in {CALL_DEADLINE_S:g} s") from error
        self._pause_s = 0.0
        self._queue.popleft()
        self._wake()

    def _slow_down(self, error: Exception) -> None:
        """Dial again at growing intervals, from 0.1 s after a success; say so once."""
        if self._pause_s == _FIRST_PAUSE_S:
            self._log.warning("events wait for containerd", error=str(error))
        doubled = self._pause_s * 2 or _FIRST_PAUSE_S
        self._pause_s = min(doubled, _LONGEST_PAUSE_S)

    def _drop_one(self) -> None:
        # The head may be on its way already.
        for position in range(1, len(self._queue)):
            if self._queue[position].topic != TASK_EXIT:
                break
        else:
            position = 1
        del self._queue[position]
        if self.dropped == 0:
            self._log.warning("event queue is full: events are dropped")
        self.dropped += 1

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def _wait_until(self, is_true: _Test) -> None:
        while not is_true(self._queue):
            await self._changed.wait()


if TYPE_CHECKING:
    from collections.abc import Callable

    _Test = Callable[[deque[_Queued]], bool]


def _dial(path: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.setblocking(False)
        connection.connect(path)
    except OSError:
        connection.close()
        raise
    return connection
