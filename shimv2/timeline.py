"""When each phase of a sandbox's life ended, for one log line and for failure texts.

Pure bookkeeping over a monotonic clock; it never waits. Phases may overlap: each is the time from
the sandbox's first mark, so the largest is the total.
"""

from __future__ import annotations

import time
from collections.abc import Callable


class Timeline:
    """Marks in the order they were made; a phase is marked once, later marks are ignored."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._start = clock()
        self._marks: dict[str, float] = {}
        self.phase = "create"
        self.is_reported = False

    def enter(self, phase: str) -> None:
        """Name what is being done; a failure text says in which phase it happened."""
        self.phase = phase

    def mark(self, name: str, *, ago_s: float = 0.0) -> None:
        """Record that `name` happened, `ago_s` seconds before, if it is the first time."""
        self._marks.setdefault(name, max(0.0, self._clock() - self._start - ago_s))

    def elapsed_s(self) -> float:
        """Seconds since the timeline began."""
        return self._clock() - self._start

    def as_ms(self) -> dict[str, float]:
        """Every mark in milliseconds since the beginning, rounded to a tenth."""
        return {name: round(at * 1000, 1) for name, at in self._marks.items()}
