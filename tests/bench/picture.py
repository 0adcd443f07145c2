"""The figures as a picture: a bar per figure, its target a line at the same place in every row."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from tests.bench.figures import Figure, number

_ROW, _LEFT, _TARGET, _WIDTH = 34, 330, 300, 1000
_COLOURS = {True: "#2e7d32", False: "#c62828", None: "#546e7a"}


def as_svg(figures: Sequence[Figure], title: str) -> str:
    """Draw the figures that have a target; a bar that ends before the line has reached it.

    Bars are value ÷ target, or target ÷ value where more is better, so that shorter is better
    everywhere. A thin grey bar is the peer, where the peer has the same unit.
    """
    drawn = [figure for figure in figures if figure.reach]
    height = 70 + _ROW * len(drawn)
    line_x = _LEFT + _TARGET
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" '
        f'font-family="sans-serif" font-size="13">',
        f'<rect width="{_WIDTH}" height="{height}" fill="white"/>',
        f'<text x="16" y="26" font-size="16">{escape(title)}</text>',
        f'<line x1="{line_x}" y1="40" x2="{line_x}" y2="{height - 16}" stroke="#263238" '
        'stroke-dasharray="4 3"/>',
        f'<text x="{line_x + 4}" y="50" font-size="11">target</text>',
    ]
    for row, figure in enumerate(drawn):
        parts += _bar(figure, 62 + row * _ROW)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _bar(figure: Figure, top: int) -> list[str]:
    assert figure.reach is not None
    sign = "≥" if figure.at_least else "≤"
    text = f"{number(figure.value)} {figure.unit} ({sign} {number(figure.reach)})"
    width = _length(figure, figure.value)
    parts = [
        f'<text x="16" y="{top + 14}">{escape(figure.name)}</text>',
        f'<rect x="{_LEFT}" y="{top}" width="{width:.0f}" height="14" '
        f'fill="{_COLOURS[figure.is_reached]}"/>',
        f'<text x="{_LEFT + width + 6:.0f}" y="{top + 12}" font-size="12">{escape(text)}</text>',
    ]
    if figure.peer is not None:
        parts.append(f'<rect x="{_LEFT}" y="{top + 16}" width="{_length(figure, figure.peer):.0f}" '
                     f'height="5" fill="#b0bec5"><title>{escape(figure.peer_name)}: '
                     f"{number(figure.peer)}</title></rect>")
    return parts


def _length(figure: Figure, value: float) -> float:
    assert figure.reach is not None
    share = figure.reach / value if figure.at_least else value / figure.reach
    return min(share, 1.6) * _TARGET
