"""The refusals that docs/limitations.md quotes, for the tests that provoke them.

A test matches what it got with `documented("…")`, the page's own words: so neither the page nor the
code can change a refusal alone. tests/style/test_limitations.py looks for those that no test shows.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Final

PAGE: Final = Path(__file__).resolve().parent.parent.parent / "docs" / "limitations.md"
_CODE: Final = re.compile(r"`([^`]+)`")
_QUOTE: Final = re.compile(r"(?:^> .*\n)+", re.MULTILINE)
_MIN_WORDS: Final = 3
# What else of three words or more the page sets in code: commands, values of keys.
_NO_REFUSAL: Final = re.compile(r"(?:ctr|kubectl|nerdctl|umount) .*|\w+ = \S+")
# Answers of other programs, which no line of ours makes.
OTHERS: Final = frozenset(
    {
        "Operation not supported",
        'failed to get runtime v2 options: can\'t unmarshal type "runtimeoptions.v1.Options" …',
        "target is busy",
        "destination parent does not exist",
        "source does not exist",
    }
)


@cache
def refusals() -> frozenset[str]:
    """Every text that the page promises, on one line, with `…` for what differs."""
    page = PAGE.read_text()
    quotes = [found.group().replace("\n> ", " ")[2:].strip() for found in _QUOTE.finditer(page)]
    spans = [" ".join(span.split()) for span in _CODE.findall(page)]
    texts = [
        span
        for span in spans
        if len(span.split()) >= _MIN_WORDS and not _NO_REFUSAL.fullmatch(span)
    ]
    return frozenset({*quotes, *texts} - OTHERS)


def documented(text: str) -> re.Pattern[str]:
    """What a refusal must look like that the page quotes as `text`.

    Raises:
        AssertionError: the page has no such text.
    """
    assert text in refusals(), f"docs/limitations.md does not say {text!r}"
    parts = (re.escape(part) for part in text.split("…"))
    return re.compile(".+?".join(parts) if not text.endswith("…") else ".+".join(parts), re.DOTALL)
