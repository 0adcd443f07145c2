"""Each refusal of docs/limitations.md is shown by a test, which provokes it."""

from __future__ import annotations

import ast
from functools import cache

import pytest

from tests.harness.limitations import documented, refusals
from tests.style import source


def test_every_refusal_of_the_page_is_shown_by_a_test() -> None:
    assert sorted(refusals() - _shown()) == []


def test_no_test_shows_what_the_page_does_not_say() -> None:
    assert sorted(_shown() - refusals()) == []


def test_names_may_differ_and_nothing_else() -> None:
    pattern = documented("mount …: a bind needs a source")
    assert pattern.search("cannot: mount /v: a bind needs a source: unknown")
    assert not pattern.search("mount /v: a bind needs a sauce")
    with pytest.raises(AssertionError, match="does not say 'a bind needs'"):
        documented("a bind needs")


@cache
def _shown() -> frozenset[str]:
    """What the tests call `documented` with."""
    found = set()
    for path in source.all_files():
        if not source.relative(path).startswith("tests/") or path.name == "test_limitations.py":
            continue
        for node in ast.walk(source.parse(path)):
            match node:
                case ast.Call(func=ast.Name(id="documented"), args=[ast.Constant(value=str(text))]):
                    found.add(text)
    return frozenset(found)
