"""What a figure is: samples, those of its peer, and what it is to reach."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

# What an aim is about: a statistic of the samples, or the ratio of both medians.
Of = Literal["median", "p99", "max", "ratio"]


def quantile(samples: Sequence[float], q: float) -> float:
    """The value below which the part `q` of the samples lies; of few samples, nearly the last."""
    ordered = sorted(samples)
    return ordered[min(len(ordered) - 1, int(len(ordered) * q))]


@dataclass(frozen=True, slots=True, kw_only=True)
class Aim:
    """A limit that `of` must keep below, or reach if `at_least`."""

    of: Of
    limit: float
    at_least: bool = False

    def __str__(self) -> str:
        name = "" if self.of == "median" else f"{self.of} "
        return f"{name}{'≥' if self.at_least else '≤'} {self.limit:g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One line of the table. The peer was measured in the same run, in turn where that matters."""

    name: str
    unit: str
    samples: Sequence[float]
    peer: str = ""
    peer_samples: Sequence[float] = ()
    aim: Aim | None = None
    note: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def peer_median(self) -> float | None:
        return statistics.median(self.peer_samples) if self.peer_samples else None

    @property
    def ratio(self) -> float | None:
        """Ours to the peer's."""
        peer = self.peer_median
        return self.median / peer if peer else None

    @property
    def judged(self) -> float | None:
        """The number that the aim is about."""
        if self.aim is None:
            return None
        match self.aim.of:
            case "median":
                return self.median
            case "p99":
                return quantile(self.samples, 0.99)
            case "max":
                return max(self.samples)
            case "ratio":
                return self.ratio

    @property
    def is_reached(self) -> bool | None:
        """None when there is nothing to reach."""
        value = self.judged
        if self.aim is None or value is None:
            return None
        return value >= self.aim.limit if self.aim.at_least else value <= self.aim.limit


def rounds(most: int, budget_s: float, least: int = 3) -> Iterator[int]:
    """Count up to `most` rounds, fewer when the time is over: a slow machine gets fewer samples."""
    deadline = time.monotonic() + budget_s
    for index in range(most):
        if index >= least and time.monotonic() > deadline:
            return
        yield index
