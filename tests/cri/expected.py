"""Compare what came of critest's specs with the list of those that don't pass.

`expected.toml` names every spec that fails or is skipped, on which runtimes, and why. Everything
that isn't listed must pass; what is listed must do as it says, so that the list can't grow stale.
A reason is one that no runtime can help here (then runc has it, too), or that Kubernetes documents
of runtimes with virtual machines.
"""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.cri.critest import Outcome

LIST = Path(__file__).with_name("expected.toml")
#: Features of machines, each with the file that says Y where it is on.
FEATURES = {"apparmor": Path("/sys/module/apparmor/parameters/enabled")}


@dataclass(frozen=True)
class Expected:
    """That a spec doesn't pass: `outcome` is `fails` or `skipped`.

    `on` are the runtimes' handlers, `containerd` the major versions. `unless` is a feature of the
    machine with which it does not hold.
    """

    spec: str
    outcome: str
    on: tuple[str, ...]
    reason: str
    containerd: tuple[int, ...] = (1, 2)
    unless: str = ""


def read_list(path: Path = LIST) -> list[Expected]:
    """Read the list; ValueError names an incomplete group or a spec that is there twice."""
    found: list[Expected] = []
    both = [1, 2]
    for group in tomllib.loads(path.read_text())["group"]:
        on, outcome, reason = tuple(group["on"]), group["outcome"], group["reason"]
        if outcome not in {"fails", "skipped"} or not on or not reason or not group["specs"]:
            raise ValueError(f"{path.name}: the group of {group['specs']} is not complete")
        versions, unless = tuple(group.get("containerd", both)), group.get("unless", "")
        if unless not in {"", *FEATURES}:
            raise ValueError(f"{path.name}: no such feature of a machine: {unless}")
        found += [Expected(spec, outcome, on, reason, versions, unless) for spec in group["specs"]]
    runs = Counter(
        (each.spec, handler, major)
        for each in found
        for handler in each.on
        for major in each.containerd
    )
    twice = [run for run, count in runs.items() if count > 1]
    if twice:
        raise ValueError(f"{path.name}: listed twice: {twice}")
    return found


def of_machine() -> set[str]:
    """Return the features that this machine has."""
    return {
        name for name, file in FEATURES.items() if file.exists() and file.read_text().strip() == "Y"
    }


def of_run(
    listed: Iterable[Expected], handler: str, major: int, features: Collection[str] = ()
) -> dict[str, Expected]:
    """Return what is expected of one runtime with one containerd, by the specs' names."""
    return {
        each.spec: each
        for each in listed
        if handler in each.on and major in each.containerd and each.unless not in features
    }


def differences(
    outcomes: Iterable[Outcome], wanted: Mapping[str, Expected], *, is_whole: bool
) -> list[str]:
    """Say how `outcomes` differ from what is wanted of this run (`of_run`), a sentence each.

    With `is_whole` every spec has been run, so that a listed one which is missing is told, too.
    """
    told: list[str] = []
    seen: set[str] = set()
    for each in outcomes:
        seen.add(each.spec)
        entry = wanted.get(each.spec)
        expected = entry.outcome if entry else "passes"
        if each.outcome == expected:
            continue
        hint = f"listed as {expected!r}: {entry.reason}" if entry else "not listed"
        told.append(f"{each.spec}\n    {each.outcome} ({hint})\n    {each.reason[:400]}".rstrip())
    if is_whole:
        told += [
            f"{spec}\n    is listed, and no such spec was run" for spec in wanted.keys() - seen
        ]
    return told
