"""The demonstration's reading of the log, and its drawing."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from types import ModuleType

import pytest

from tests.harness.node import REPOSITORY


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    """Load the program, which is not part of a package."""
    path = REPOSITORY / "packaging" / "demo" / "run.py"
    spec = importlib.util.spec_from_file_location("demo_run", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["demo_run"] = module
    spec.loader.exec_module(module)
    return module


def event(**fields: object) -> str:
    return json.dumps({"level": "info", "event": "sandbox timeline", **fields})


def test_last_timeline_in_the_log_counts_and_only_its_marks(demo: ModuleType) -> None:
    log = "\n".join(
        (
            'time="…" level=info msg="starting containerd"',
            event(launch=1.5),
            event(pid=77, launch=2.5, agent_ready=900.0),
            '{"event":"something else","launch":3.5}',
            "{ not json",
        )
    )
    assert demo.phases(demo.timeline_record(log)) == {
        "about to launch the VMM": 2.5,
        "agent ready": 900.0,
    }


def test_log_without_a_timeline_gives_none(demo: ModuleType) -> None:
    assert demo.timeline_record("containerd started\n{}\n[1]\n") == {}


def test_bars_are_in_order_and_within_the_width(demo: ModuleType) -> None:
    lines = list(demo.timeline_lines({"c": 30.0, "a": 10.0, "b": 10.0, "z": 0.0}))
    assert [line.split()[0] for line in lines] == ["z", "a", "b", "c"]
    assert {len(re.findall("[█ ]{40}", line)) >= 1 for line in lines} == {True}
    assert "(+20)" in lines[-1]


def test_no_phases_draw_nothing(demo: ModuleType) -> None:
    assert list(demo.timeline_lines({})) == []
