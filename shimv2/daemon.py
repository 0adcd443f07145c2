"""The serving process, from the fork in `start` to its end.

    run      leave the host's mount namespace, import the rest, freeze the heap, wait for the gate
    serve    root nursery: signals, events, the sandbox (task_service), the ttrpc server
             ends when the last container is gone and Shutdown came, or on SIGTERM

Nothing here knows a Task method. What is left in the end is nothing: events are flushed, the socket
is unlinked, and whatever the journal still holds is undone.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
from typing import TYPE_CHECKING, Final

from shimv2 import cleanup, heap, lean_trio, mounts
from shimv2.cleanup import state_dir_of
from shimv2.logs import Log, LogSink, open_bundle_log

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Protocol

    import trio

    from shimv2.bootstrap import ShimInvocation
    from ttrpc.events import Status
    from ttrpc.handlers import Handler

    class Service(Protocol):
        """What `task_service.TaskService` has to offer."""

        exit_requested: trio.Event

        @property
        def farewell_s(self) -> float: ...
        def services(self) -> Mapping[str, Mapping[str, Handler]]: ...
        async def run(self, *, task_status: trio.TaskStatus[None] = ...) -> None: ...
        async def stop(self) -> None: ...


FLUSH_DEADLINE_S: Final = 2.0
"""containerd gives a Shutdown 3 s; events that can't be sent by then have no reader."""

SERVER_DEADLINE_S: Final = 1.0
STOP_DEADLINE_S: Final = 10.0
"""SIGTERM: how long the sandbox has before its VM is killed with us (systemd's stop is longer)."""

_PR_SCHED_CORE: Final = 62
_PR_SCHED_CORE_CREATE: Final = 1
_PROCESS_GROUP: Final = 2


def run(invocation: ShimInvocation, listener: int, gate: int) -> int:
    """Serve the sandbox of `invocation` on an already listening socket; return the exit status.

    `gate` gives a byte when `start` has printed the address, or ends when it died instead.
    """
    sink = LogSink(open_bundle_log(invocation.bundle_path))
    if sink.descriptor >= 0:
        os.dup2(sink.descriptor, 2)  # the interpreter's own last words
    if invocation.debug:
        sink.threshold = 10
    log = Log(sink, {"sandbox_id": invocation.sandbox_id, "pid": os.getpid()})
    try:
        _settle(invocation, log)
        heap.keep_chunks()
        load()
        if not os.read(gate, 1):
            return 0
        os.close(gate)
        import trio

        # Before the event loop: hooks that are due are run by one of their own.
        for problem in cleanup.remove_state(state_dir_of(invocation)):
            log.warning("left over from an earlier shim", what=problem)
        trio.run(
            serve, socket.socket(fileno=listener), invocation, log, strict_exception_groups=True
        )
    except BaseException as error:
        log.exception("the shim failed", error)
        return 1
    finally:
        _leave_nothing(invocation, log)
    return 0


def load() -> None:
    """Import everything that serving needs and put it out of the garbage collector's sight.

    The heap is frozen so that a collection never touches its pages: they stay shared with other
    shims once these are forked from one process. Collecting first would free next to
    nothing, and cost 7 ms on the way to the first answer.
    """
    gc.disable()
    lean_trio.load()
    import ttrpc
    from shimv2 import events, task_service

    del ttrpc, events, task_service
    gc.freeze()
    gc.enable()


async def serve(listener: socket.socket, invocation: ShimInvocation, log: Log) -> None:
    """Run the sandbox's task tree until it is to end. See the module's text."""
    import trio

    from shimv2.events import EventPublisher
    from shimv2.task_service import TaskService
    from ttrpc import Server
    from ttrpc.peer import is_same_user

    publisher = EventPublisher(invocation.ttrpc_address, invocation.namespace, log)
    state_dir = state_dir_of(invocation)
    service: Service = TaskService(invocation, state_dir, publisher, log)
    server = Server(
        service.services(),
        status_from=_status,
        report=lambda text, error: log.warning(text, error=repr(error) if error else ""),
        authorize=is_same_user,
    )
    async with trio.open_nursery() as nursery:
        await nursery.start(_watch_signals, service, log)
        await nursery.start(publisher.run)
        await nursery.start(service.run)
        await nursery.start(server.serve, listener)
        log.info("shim serves", kind=invocation.kind, namespace=invocation.namespace)
        await service.exit_requested.wait()
        if not await publisher.flush(FLUSH_DEADLINE_S):
            log.warning("some events were not sent")
        cleanup.unlink_own_socket(invocation)
        # The answer to Shutdown itself is still on its way.
        grace_s = SERVER_DEADLINE_S + service.farewell_s
        await server.shutdown(grace_s=grace_s, farewell_s=service.farewell_s)
        log.info("shim exits")
        nursery.cancel_scope.cancel()


def _status(error: BaseException) -> Status:
    from shimv2.errors import status_from
    from ttrpc.events import Status

    return Status(*status_from(error))


async def _watch_signals(service: Service, log: Log, *, task_status: trio.TaskStatus[None]) -> None:
    """SIGTERM and SIGINT stop the sandbox, SIGUSR1 collects garbage and logs every task's stack.

    SIGHUP has no meaning here, and must not have its usual one. It is caught, not ignored, so that
    no child inherits that.
    """
    import trio

    watched = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
    with trio.open_signal_receiver(*watched) as numbers:
        task_status.started()
        async for number in numbers:
            if number == signal.SIGUSR1:
                gc.collect()  # what is left is in use: memory is measured after this
                dump_tasks(log)
            if number in (signal.SIGUSR1, signal.SIGHUP):
                continue
            log.warning("stopped by a signal", signal=signal.Signals(number).name)
            with trio.move_on_after(STOP_DEADLINE_S):
                await service.stop()
            service.exit_requested.set()


def dump_tasks(log: Log) -> None:
    """Write one line a task: where it waits. For a shim that seems to hang."""
    import trio

    root = trio.lowlevel.current_root_task()
    pending = [root] if root is not None else []
    while pending:
        task = pending.pop()
        frames = [f"{frame.f_code.co_name}:{number}" for frame, number in task.iter_await_frames()]
        log.info("task", name=task.name, waits_in=" > ".join(frames[-8:]))
        for nursery in task.child_nurseries:
            pending.extend(nursery.child_tasks)


def _settle(invocation: ShimInvocation, log: Log) -> None:
    """Take the process's place on the host. Failing here is no reason not to serve."""
    try:
        mounts.private_mount_namespace()
    except mounts.MountFailed as error:
        log.warning("no mount namespace of its own", error=str(error))
    if invocation.core_scheduling:
        _share_a_core_scheduling_cookie(log)


def _share_a_core_scheduling_cookie(log: Log) -> None:
    """Let no foreign thread share a core with this process group's (containerd's SCHED_CORE=1)."""
    if mounts.prctl(_PR_SCHED_CORE, _PR_SCHED_CORE_CREATE, 0, _PROCESS_GROUP, 0) != 0:
        log.warning("core scheduling is not available")


def _leave_nothing(invocation: ShimInvocation, log: Log) -> None:
    """Undo what is still journalled, if anything: the way out of a crash is that of `delete`."""
    try:
        cleanup.unlink_own_socket(invocation)
        for problem in cleanup.remove_state(state_dir_of(invocation)):
            log.warning("left behind", what=problem)
    except Exception as error:  # the process ends anyway; what matters is that it says why
        log.exception("cleanup failed", error)
