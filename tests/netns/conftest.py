"""Namespaces of a test's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.own_process import zombies
from tests.netns.pod import OUTSIDE, POD, Holder


@pytest.fixture(autouse=True)
def children_are_waited_for() -> Iterator[None]:
    before = zombies()
    yield
    assert zombies() <= before


@pytest.fixture
def holder() -> Iterator[Holder]:
    """An empty network namespace."""
    made = Holder()
    yield made
    made.close()


@pytest.fixture
def namespace(holder: Holder) -> Path:
    """The path of an empty network namespace."""
    return holder.path


@pytest.fixture
def outside() -> Iterator[Holder]:
    """What a pod's veth leads to."""
    made = Holder()
    yield made
    made.close()


@pytest.fixture
def pod(holder: Holder, outside: Holder) -> Holder:
    """A pod with one veth, the usual way."""
    holder.run(POD.format(outside=outside.pid))
    outside.run(OUTSIDE)
    return holder
