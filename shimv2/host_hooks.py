"""Runs a sandbox's hooks on the host, and sees to it that poststop hooks run whatever happens.

Before a container's first hook its poststop hooks are written to a file beside the journal, which
has an entry for it: Delete runs them, or whoever replays the journal of a killed shim. An entry
that is not released means that they are still to be run; running them twice is possible when a shim
dies in the middle, running them never is not.
"""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Final

import trio

from hypervisors.errors import HypervisorError
from hypervisors.short_lived import Program, run_to_end
from shimv2.errors import ResourceExhausted
from shimv2.hooks import (
    CREATE_CONTAINER,
    CREATE_RUNTIME,
    POSTSTART,
    POSTSTOP,
    PRESTART,
    HookFailed,
    Hooks,
    failure_text,
    from_record,
    parse_hooks,
    state_json,
    to_record,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from hypervisors.child import ChildRecord, Recorder
    from netns.holder import Holder
    from shimv2.bundle import Bundle
    from shimv2.container import Log
    from shimv2.hooks import Hook, Record
    from shimv2.journal import Entry, Journal

AFTERWARDS_LIMIT_S: Final = 30.0
"""For a poststart or poststop hook without a timeout: nothing else bounds Start and Delete.
Hooks of the creation are bounded by its own deadline."""

_LAST_CHANCE_S: Final = 0.1
"""For each poststop hook that is replayed when the time of all is over."""


class _Armed:
    """A container's hooks, and its poststop hooks on disk."""

    def __init__(self, bundle: Bundle, hooks: Hooks) -> None:
        self.bundle = bundle
        self.hooks = hooks
        self.path = ""
        self.entry: Entry | None = None
        self.started = trio.Event()  # poststart hooks have been run


class HostHooks:
    """The hooks of all containers of one sandbox. Each method may be called for any container."""

    def __init__(
        self, journal: Journal, directory: Path, log: Log, enter: Callable[[str], None]
    ) -> None:
        self._journal = journal
        self._directory = directory
        self._log = log
        self._enter = enter  # tells the phase, for failures
        self._containers: dict[str, _Armed] = {}
        self._holder: Holder | None = None
        self._holder_entry: Entry | None = None

    async def before_network(self, bundle: Bundle, namespace: Path | None) -> Path | None:
        """Run the first hooks of the container that the VM is made for; give its namespace's path.

        They get the pid of a process that holds the namespace, a new one if the spec names none.
        It holds it until `release_holder`.

        Raises:
            HookFailed: a hook did not succeed.
            NetnsError: there is no namespace for it.
        """
        armed = self._arm(bundle)
        if not armed.hooks[PRESTART] and not armed.hooks[CREATE_RUNTIME]:
            return namespace
        self._enter("making a network namespace for the hooks")
        holder = await self._hold(namespace)
        await self._create(armed, (PRESTART, CREATE_RUNTIME), holder.pid, ())
        return namespace or holder.path

    async def in_network(self, bundle: Bundle, pid: int, namespace: int | None) -> None:
        """Run what is left of a container's creation; `namespace` is the pod's, open.

        Raises:
            HookFailed: a hook did not succeed.
        """
        armed = self._containers.get(bundle.container_id)
        if armed is None:  # it joins a VM that is up
            armed = self._arm(bundle)
            await self._create(armed, (PRESTART, CREATE_RUNTIME), pid, ())
        join = () if namespace is None else (namespace,)
        await self._create(armed, (CREATE_CONTAINER,), pid, join)

    async def started(self, container_id: str, pid: int) -> None:
        """Run poststart hooks; one that fails is logged."""
        armed = self._containers.get(container_id)
        if armed is None:
            return
        state = state_json(armed.bundle, "running", pid)
        try:
            for hook in armed.hooks[POSTSTART]:
                await self._afterwards(hook, armed.bundle, state)
        finally:
            armed.started.set()

    async def started_over(self, container_id: str) -> None:
        """Wait for the poststart hooks of a container that has ended, which may be quick to.

        They are told the VMM's pid, to reach the network by it. Bounded, for a Start that failed.
        """
        armed = self._containers.get(container_id)
        if armed is not None and armed.hooks[POSTSTART]:
            with trio.move_on_after(AFTERWARDS_LIMIT_S):
                await armed.started.wait()

    async def stopped(self, container_id: str) -> None:
        """Run poststop hooks, if they haven't been; one that fails is logged.

        Cancelled, they stay in the journal.
        """
        armed = self._containers.pop(container_id, None)
        if armed is None or armed.entry is None:
            return
        state = state_json(armed.bundle, "stopped", 0)
        if _is_there(armed.path):
            for hook in armed.hooks[POSTSTOP]:
                await self._afterwards(hook, armed.bundle, state)
            os.unlink(armed.path)
        self._journal.release(armed.entry)

    async def all_stopped(self) -> None:
        """Do as `stopped` for every container."""
        for container_id in list(self._containers):
            await self.stopped(container_id)

    async def release_holder(self) -> None:
        """End the process that holds the namespace: something else does by now. Idempotent."""
        if self._holder is not None:
            await self._holder.aclose()
            self._holder = None
        if self._holder_entry is not None:
            self._journal.release(self._holder_entry)
            self._holder_entry = None

    def _arm(self, bundle: Bundle) -> _Armed:
        """From here on the poststop hooks will run."""
        armed = self._containers[bundle.container_id] = _Armed(bundle, parse_hooks(bundle.spec))
        if armed.hooks[POSTSTOP]:
            path = f"{self._directory}/poststop-{bundle.container_id}.json"
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            armed.entry = self._journal.take(POSTSTOP, path=path, container=bundle.container_id)
            armed.path = path
            try:
                with os.fdopen(os.open(path, flags, 0o600), "w", encoding="utf-8") as file:
                    file.write(to_record(armed.hooks[POSTSTOP], bundle))
            except OSError as error:
                raise ResourceExhausted(f"{path}: {error.strerror}") from error
        return armed

    async def _hold(self, namespace: Path | None) -> Holder:
        from netns.holder import Holder
        from shimv2.host_process import start_time_ticks

        def record(pid: int) -> None:
            self._holder_entry = self._journal.take(
                "process", name="network holder", pid=pid, start_time=start_time_ticks(pid) or 0
            )

        self._holder = await Holder.start(record, namespace)
        return self._holder

    async def _create(
        self, armed: _Armed, stages: tuple[str, ...], pid: int, join: tuple[int, ...]
    ) -> None:
        state = state_json(armed.bundle, "creating", pid)
        for stage in stages:
            for hook in armed.hooks[stage]:
                self._enter(f"running {hook}")
                problem = await self._run(hook, armed.bundle, state, math.inf, join)
                if problem:
                    raise HookFailed(problem)

    async def _afterwards(self, hook: Hook, bundle: Bundle, state: bytes) -> None:
        problem = await self._run(hook, bundle, state, AFTERWARDS_LIMIT_S)
        if problem:
            self._log.warning("hook failed", container_id=bundle.container_id, error=problem)

    async def _run(
        self,
        hook: Hook,
        bundle: Bundle,
        state: bytes,
        limit_s: float,
        join: tuple[int, ...] = (),
    ) -> str:
        entries: list[Entry] = []

        def record(child: ChildRecord) -> None:
            entries.append(
                self._journal.take(
                    "hook", name=child.name, pid=child.pid, start_time=child.start_time
                )
            )

        try:
            container, directory = bundle.container_id, os.fspath(bundle.path)
            limit_s = hook.timeout_s or limit_s
            return await _run_hook(hook, container, directory, state, limit_s, record, join)
        finally:
            for entry in entries:
                self._journal.release(entry)


async def _run_hook(
    hook: Hook,
    container_id: str,
    directory: str,
    state: bytes,
    limit_s: float,
    record: Recorder,
    join: tuple[int, ...] = (),
) -> str:
    """Run one hook; return how it failed, or nothing."""
    program = Program(hook.path, hook.argv, hook.environment, directory, join)
    stdin = _readable(state)
    try:
        ended = await run_to_end("hook", program, stdin, timeout_s=limit_s, record=record)
    except HypervisorError as error:
        return failure_text(hook, container_id, "cannot be started", [str(error)])
    finally:
        os.close(stdin)
    if ended.exit is None:
        how = f"did not end within {limit_s:g} s and was killed"
    elif ended.exit.code != 0:
        how = str(ended.exit)
    else:
        return ""
    return failure_text(hook, container_id, how, ended.said)


def _readable(state: bytes) -> int:
    """A file with these bytes: a hook that doesn't read them holds nobody up."""
    fd = os.memfd_create("state")
    os.write(fd, state)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def _is_there(path: str) -> bool:
    return os.path.exists(path)


def run_recorded(path: str, limit_s: float) -> str | None:
    """Run the poststop hooks recorded at `path`, if that is still to be done; tell of failures.

    `limit_s` is for all of them. They are not tried again: what they could not do in this time they
    would hold up the next time. Within an event loop they stay recorded, for the next cleanup.
    """
    if trio.lowlevel.in_trio_run():
        return f"{path}: poststop hooks are still to be run" if _is_there(path) else None
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except FileNotFoundError:
        return None
    try:
        record = from_record(text)
    except (ValueError, KeyError, TypeError):
        # Its writer died at it, before the first hook.
        problems = [f"{path} cannot be read: {text[:100]!r}"] if text else []
    else:
        problems = trio.run(_replay, record, limit_s)
    os.unlink(path)
    return "; ".join(problems) or None


async def _replay(record: Record, limit_s: float) -> list[str]:
    give_up_at = trio.current_time() + limit_s
    problems = []
    for hook in record.hooks:
        left_s = max(_LAST_CHANCE_S, give_up_at - trio.current_time())
        problem = await _run_hook(
            hook,
            record.container,
            record.bundle,
            record.state,
            min(hook.timeout_s or left_s, left_s),
            lambda child: None,
        )
        if problem:
            problems.append(problem)
    return problems
