"""The figures as a table for people, and as JSON for programs."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.bench.figure import quantile

if TYPE_CHECKING:
    from tests.bench.figure import Figure

_REACHED = {True: "yes", False: "NO", None: ""}
_HEAD = ("figure", "median", "min", "p99", "unit", "beside it", "ratio", "aim", "reached")


def number(value: float | None) -> str:
    """Three significant digits, without an exponent."""
    if value is None:
        return ""
    if abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def table(figures: Iterable[Figure]) -> list[str]:
    """Lines of the table, aligned."""
    rows = [_HEAD, *map(_row, figures)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD))]
    left = {0, 4, 5, 7, 8}
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return [lines[0], "─" * max(map(len, lines)), *lines[1:]]


def _row(figure: Figure) -> tuple[str, ...]:
    peer = f"{number(figure.peer_median)} {figure.peer}".strip() if figure.peer else ""
    return (
        figure.name,
        number(figure.median),
        number(min(figure.samples)),
        number(quantile(figure.samples, 0.99)),
        figure.unit,
        peer,
        number(figure.ratio),
        str(figure.aim or ""),
        _REACHED[figure.is_reached],
    )


def as_json(
    figures: Sequence[Figure], failures: Sequence[str], loads: Sequence[dict[str, Any]]
) -> str:
    """Everything that was measured, with the samples, and on what machine."""
    record = {
        "machine": {
            "processors": os.cpu_count(),
            "kernel": platform.release(),
            "python": platform.python_version(),
            "qemu": _first_line("qemu-system-x86_64", "--version"),
            "commit": _first_line("git", "rev-parse", "HEAD"),
        },
        "groups": list(loads),
        "failures": list(failures),
        "figures": [_record(figure) for figure in figures],
    }
    return json.dumps(record, indent=1, ensure_ascii=False) + "\n"


def _record(figure: Figure) -> dict[str, Any]:
    return {
        "name": figure.name,
        "unit": figure.unit,
        "median": figure.median,
        "min": min(figure.samples),
        "p99": quantile(figure.samples, 0.99),
        "samples": _thinned(figure.samples),
        "peer": figure.peer,
        "peer_median": figure.peer_median,
        "peer_samples": _thinned(figure.peer_samples),
        "ratio": figure.ratio,
        "aim": str(figure.aim or ""),
        "reached": figure.is_reached,
        "note": figure.note,
    }


def _thinned(samples: Sequence[float], most: int = 200) -> list[float]:
    step = max(1, len(samples) // most)
    return [round(value, 4) for value in samples[::step]]


def _first_line(*command: str) -> str:
    here = Path(__file__).parent
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=here)
    return (done.stdout.splitlines() or [""])[0]
