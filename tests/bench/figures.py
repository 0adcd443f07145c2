"""A measured figure, the table that `make bench` prints, and its JSON form."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One line of the table. `reach` is the target in the figure's own unit.

    `peer` is the same measurement of something else in the same run (runc's shim, the bare
    recipe), None where there is none. More is better where `at_least` is set.
    """

    name: str
    value: float
    unit: str
    reach: float | None = None
    at_least: bool = False
    peer: float | None = None
    peer_name: str = ""
    note: str = ""

    @property
    def is_reached(self) -> bool | None:
        if self.reach is None:
            return None
        return self.value >= self.reach if self.at_least else self.value <= self.reach

    @property
    def ratio(self) -> float | None:
        """Value ÷ peer."""
        return self.value / self.peer if self.peer else None


def median(samples: Sequence[float]) -> float:
    return statistics.median(samples)


def percentile(samples: Sequence[float], share: float) -> float:
    """Return the value that `share` (0..1) of the samples don't exceed."""
    ordered = sorted(samples)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def spread(samples: Sequence[float], unit: str, scale: float = 1.0) -> str:
    """Describe how the samples lie: their number, least and most."""
    return (f"n={len(samples)}, {min(samples) * scale:.3g}..{max(samples) * scale:.3g} {unit}")


def as_table(figures: Sequence[Figure]) -> str:
    """Format the figures as text, a line each."""
    rows = [("figure", "measured", "reach", "", "peer in this run", "÷ peer", "note")]
    for figure in figures:
        sign = {True: "≥", False: "≤"}[figure.at_least]
        rows.append((
            figure.name, f"{number(figure.value)} {figure.unit}",
            f"{sign} {number(figure.reach)}" if figure.reach is not None else "-",
            {True: "ok", False: "MISSED", None: ""}[figure.is_reached],
            f"{number(figure.peer)} {figure.peer_name}" if figure.peer is not None else "-",
            f"{figure.ratio:.2f}" if figure.ratio is not None else "-", figure.note))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
             for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def as_json(figures: Sequence[Figure], machine: dict[str, object]) -> str:
    """Return the figures with what they were measured on."""
    entries = [{**asdict(figure), "ratio": figure.ratio, "is_reached": figure.is_reached}
               for figure in figures]
    return json.dumps({"machine": machine, "figures": entries}, indent=2, ensure_ascii=False) + "\n"


def number(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


Step = Callable[[], Sequence[Figure]]
