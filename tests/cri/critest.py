"""Run critest in a node and read what came of each spec.

Source: cri-tools docs/validation.md; ginkgo's types.Report for the JSON report.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tests.harness.containerd_daemon import find_cri_tool

if TYPE_CHECKING:
    from pathlib import Path

    from tests.harness.node import Node

_REPORT = "/run/.node/critest.json"
_OUTCOMES = {"passed": "passes", "skipped": "skipped", "pending": "skipped"}


@dataclass(frozen=True)
class Outcome:
    """What came of one spec: `passes`, `fails` or `skipped`; why, and how long it took."""

    spec: str
    outcome: str
    reason: str
    seconds: float


def run(node: Node, handler: str, options: Sequence[str], *, timeout_s: float) -> list[Outcome]:
    """Run the specs that critest's `options` choose; its output goes to the log directory.

    The node must serve critest's images (tests/cri/images.py). Raises RuntimeError with the
    output's last lines when critest leaves no report, and when it failed outside of the specs.
    """
    log = node.log_directory / f"{node.name}-critest-{handler}.log"
    report = node.path(_REPORT)
    report.unlink(missing_ok=True)
    # The working directory that nsenter leaves is on no mount of the node; Go asks for its name.
    argv = ["env", "-C", "/", str(find_cri_tool("critest")), f"-runtime-handler={handler}"]
    argv += [f"--ginkgo.json-report={_REPORT}", "--ginkgo.no-color", *options]
    with log.open("wb") as output:
        process = node.popen(argv, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        process.wait(timeout_s)
    if not report.exists():
        raise RuntimeError(f"critest left no report, see {log}:\n{_tail(log)}")
    return _read(json.loads(report.read_text()))


def unmatched(expressions: Iterable[str], outcomes: Sequence[Outcome]) -> list[str]:
    """Return those of the expressions for specs' names for which none has been run."""
    return [
        expression
        for expression in expressions
        if not any(re.search(expression, each.spec) for each in outcomes)
    ]


def _read(reports: list[dict[str, Any]]) -> list[Outcome]:
    specs = [spec for report in reports for spec in report["SpecReports"] or []]
    for spec in specs:
        if spec["LeafNodeType"] != "It" and spec["State"] not in _OUTCOMES:
            message = (spec.get("Failure") or {}).get("Message", "")
            raise RuntimeError(f"critest's {spec['LeafNodeType']} {spec['State']}: {message}")
    return [
        _outcome(spec) for spec in specs if spec["LeafNodeType"] == "It" and not _not_chosen(spec)
    ]


def _not_chosen(spec: dict[str, Any]) -> bool:
    """Focus and skip filters leave specs skipped without a word; a spec that skips says why."""
    return spec["State"] == "skipped" and not (spec.get("Failure") or {}).get("Message")


def _outcome(spec: dict[str, Any]) -> Outcome:
    texts = [*(spec["ContainerHierarchyTexts"] or []), spec["LeafNodeText"]]
    message = (spec.get("Failure") or {}).get("Message", "")
    return Outcome(
        re.sub(r"^\[k8s.io\] ", "", " ".join(texts)),
        _OUTCOMES.get(spec["State"], "fails"),
        message.strip(),
        spec["RunTime"] / 1e9,
    )


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-2000:]
