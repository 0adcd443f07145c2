"""The comparison with the list of specs that don't pass."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.cri.critest import Outcome
from tests.cri.expected import FEATURES, Expected, differences, of_machine, of_run, read_list

_SPECS = 108  # of critest 1.34, without its benchmarks
LISTED = [Expected("a b", "fails", ("kata",), "no such thing in a VM")]


def told(outcome: str, *, spec: str = "a b", handler: str = "kata") -> list[str]:
    ran = [Outcome(spec, outcome, "said so", 1.0)]
    return differences(ran, of_run(LISTED, handler, 2), is_whole=False)


def test_what_does_as_listed_or_passes_unlisted_is_no_difference():
    assert told("fails") == []
    assert told("passes", spec="other") == []
    assert told("passes", handler="runc") == []


def test_entry_for_one_containerd_says_nothing_of_the_other():
    old = [Expected("a b", "fails", ("kata",), "too old", (1,))]
    assert list(of_run(old, "kata", 1)) == ["a b"]
    assert of_run(old, "kata", 2) == {}


def test_entry_for_machines_without_a_feature_says_nothing_of_those_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    bare = [Expected("a b", "skipped", ("kata",), "no AppArmor", unless="apparmor")]
    enabled = tmp_path / "enabled"
    monkeypatch.setitem(FEATURES, "apparmor", enabled)
    for content, listed in ((None, ["a b"]), ("N\n", ["a b"]), ("Y\n", [])):
        if content:
            enabled.write_text(content)
        assert list(of_run(bare, "kata", 2, of_machine())) == listed


def test_failure_that_is_not_listed_is_told_with_its_message():
    (text,) = told("fails", handler="runc")
    assert "fails (not listed)" in text
    assert "said so" in text


def test_spec_that_passes_though_it_is_listed_is_told_with_the_reason():
    assert "no such thing in a VM" in told("passes")[0]
    assert told("skipped") != []


def test_listed_spec_that_no_longer_exists_is_told_of_a_whole_run():
    assert "no such spec" in differences([], of_run(LISTED, "kata", 2), is_whole=True)[0]
    assert differences([], of_run(LISTED, "kata", 2), is_whole=False) == []


def test_list_in_the_project_is_complete():
    assert {each.outcome for each in read_list()} == {"fails", "skipped"}


def test_page_for_operators_counts_what_the_list_says():
    page = (Path(__file__).parents[2] / "docs" / "kubernetes.md").read_text()
    for handler in ("kata", "runc"):
        for major, version in ((1, "1.6"), (2, "2.2.2")):
            listed = Counter(each.outcome for each in of_run(read_list(), handler, major).values())
            fails, skipped = listed["fails"], listed["skipped"]
            passes = _SPECS - fails - skipped
            assert f"| {handler} | {version} | {passes} | {fails} | {skipped} |\n" in page


def test_group_without_a_reason_is_refused(tmp_path: Path):
    path = tmp_path / "list.toml"
    path.write_text('[[group]]\non = ["kata"]\noutcome = "fails"\nreason = ""\nspecs = ["a"]\n')
    with pytest.raises(ValueError, match="not complete"):
        read_list(path)
