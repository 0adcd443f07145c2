"""What goes on beside the requests: jobs that outlive the call that started them.

One nursery for a shim's life. A defect in a job is reported, it does not end the shim: the nursery
also holds the pods' other jobs.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import trio

T = TypeVar("T")


class Jobs:
    """Runs jobs while `run` runs; `on_defect` hears of every exception that left one."""

    def __init__(self, on_defect: Callable[[str, Exception], None]) -> None:
        self._on_defect = on_defect
        self._nursery: trio.Nursery | None = None

    async def run(
        self,
        at_end: Callable[[], Awaitable[None]],
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Hold the jobs until cancelled, then run `at_end`, shielded, while jobs still end."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:
                # Bounded by `at_end` itself, part by part.
                with trio.CancelScope(shield=True):
                    await at_end()

    @property
    def nursery(self) -> trio.Nursery:
        """For what reports readiness through `task_status`, and handles its own errors."""
        assert self._nursery is not None, "run() is not going"
        return self._nursery

    def start(self, job: Callable[..., Awaitable[object]], *args: object) -> None:
        """Run a job for as long as it takes."""
        self.nursery.start_soon(self._guarded, job, args)

    async def finish(self, job: Callable[..., Awaitable[T]], *args: Any) -> T:  # noqa: ANN401
        """Run `job` to its end even if the caller is cancelled; return or raise its outcome."""
        done = trio.Event()
        outcome: list[T | Exception] = []

        async def run() -> None:
            try:
                outcome.append(await job(*args))
            except Exception as exc:  # handed to the caller
                outcome.append(exc)
            finally:
                done.set()

        self.nursery.start_soon(run)
        await done.wait()
        result = outcome[0]
        if isinstance(result, Exception):
            raise result
        return result

    async def _guarded(
        self, job: Callable[..., Awaitable[object]], args: tuple[object, ...]
    ) -> None:
        try:
            await job(*args)
        except Exception as exc:  # the border between a job and the shim
            self._on_defect(getattr(job, "__qualname__", repr(job)), exc)
