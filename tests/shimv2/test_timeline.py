"""Phases in milliseconds, first mark only."""

from __future__ import annotations

from shimv2.timeline import Timeline


def test_a_phase_is_marked_once_and_told_in_milliseconds() -> None:
    now = [10.0]
    timeline = Timeline(lambda: now[0])
    now[0] = 10.25
    timeline.mark("launch")
    now[0] = 11.0
    timeline.mark("launch")
    timeline.mark("ready")
    assert timeline.as_ms() == {"launch": 250.0, "ready": 1000.0}
    assert timeline.elapsed_s() == 1.0


def test_the_phase_under_way_is_known() -> None:
    timeline = Timeline()
    timeline.enter("launching the virtual machine")
    assert timeline.phase == "launching the virtual machine"
