"""Draws the figures that have an aim as bars against it: one SVG, no library."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from tests.bench.report import number

if TYPE_CHECKING:
    from tests.bench.figure import Figure

_WIDTH, _ROW, _TOP = 860, 34, 56
_BAR_LEFT, _BAR_WIDTH = 330, 360  # the aim stands in the middle of it
_COLOURS = {True: "#2b8a3e", False: "#c92a2a", None: "#868e96"}


def draw(figures: Sequence[Figure]) -> str:
    """Return the SVG. A bar that ends left of the line has reached its aim."""
    judged = [figure for figure in figures if figure.aim is not None and figure.judged is not None]
    height = _TOP + _ROW * len(judged) + 16
    middle = _BAR_LEFT + _BAR_WIDTH / 2
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" '
        f'viewBox="0 0 {_WIDTH} {height}" font-family="sans-serif" font-size="13">',
        f'<rect width="{_WIDTH}" height="{height}" fill="#fff"/>',
        '<text x="12" y="26" font-size="16">What was measured, against its aim</text>',
        f'<text x="{middle}" y="44" text-anchor="middle" fill="#495057">aim</text>',
    ]
    for index, figure in enumerate(judged):
        parts += _row(figure, _TOP + index * _ROW)
    parts.append(
        f'<line x1="{middle}" y1="{_TOP - 6}" x2="{middle}" y2="{height - 10}" '
        'stroke="#212529" stroke-dasharray="4 3"/>'
    )
    return "\n".join([*parts, "</svg>", ""])


def _row(figure: Figure, y: int) -> list[str]:
    assert figure.aim is not None
    assert figure.judged is not None
    part = figure.aim.limit / figure.judged if figure.aim.at_least else 0.0
    if not figure.aim.at_least:
        part = figure.judged / figure.aim.limit if figure.aim.limit else float(figure.judged > 0)
    length = max(2.0, min(part, 2.0) * _BAR_WIDTH / 2)
    unit = "times" if figure.aim.of == "ratio" else figure.unit
    value = f"{number(figure.judged)} {unit}, aim {figure.aim}"
    text = y + _ROW / 2 + 1
    return [
        f'<text x="12" y="{text}">{escape(figure.name)}</text>',
        f'<rect x="{_BAR_LEFT}" y="{y + 7}" width="{length:.1f}" height="{_ROW - 16}" '
        f'fill="{_COLOURS[figure.is_reached]}"/>',
        f'<text x="{_BAR_LEFT + _BAR_WIDTH + 10}" y="{text}">{escape(value)}</text>',
    ]
