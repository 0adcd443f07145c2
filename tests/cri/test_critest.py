"""What is read from critest's report."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.cri import critest
from tests.cri.critest import Outcome, unmatched


def spec(kind: str, state: str, message: str = "") -> dict[str, Any]:
    return {
        "LeafNodeType": kind,
        "State": state,
        "ContainerHierarchyTexts": ["[k8s.io] Runtime"],
        "LeafNodeText": "works",
        "RunTime": 1e9,
        "Failure": {"Message": message},
    }


def read(directory: Path, monkeypatch: pytest.MonkeyPatch, *specs: dict[str, Any]) -> list[Outcome]:
    """Run a critest that leaves a report of these specs."""
    report = directory / "report.json"

    def popen(*_: object, **__: object) -> subprocess.Popen[bytes]:
        report.write_text(json.dumps([{"SpecReports": specs}]))
        return subprocess.Popen(["true"])

    monkeypatch.setattr(critest, "find_cri_tool", Path)
    node: Any = SimpleNamespace(
        name="node", log_directory=directory, path=lambda _: report, popen=popen
    )
    return critest.run(node, "kata", [], timeout_s=60)


def test_specs_that_were_chosen_are_outcomes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    specs = [spec("It", "skipped"), spec("It", "passed"), spec("BeforeSuite", "passed")]
    assert read(tmp_path, monkeypatch, *specs) == [Outcome("Runtime works", "passes", "", 1.0)]


@pytest.mark.parametrize("kind", ["BeforeSuite", "SynchronizedBeforeSuite", "AfterSuite"])
def test_suite_that_failed_outside_of_its_specs_is_no_outcome(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    specs = [spec(kind, "failed", "no such socket"), spec("It", "skipped")]
    with pytest.raises(RuntimeError, match=f"critest's {kind} failed: no such socket"):
        read(tmp_path, monkeypatch, *specs)


def test_expressions_without_a_spec_are_told() -> None:
    outcomes = [Outcome("Runtime works", "passes", "", 1.0)]
    assert unmatched(["time work", "works$", "no such"], outcomes) == ["no such"]
    assert unmatched([""], []) == [""]
