"""What users and operators read: failure texts, kept reports, log lines, statuses."""

from __future__ import annotations

import json
import os
import stat
import time

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from shimv2 import errors, failure, logs
from shimv2.errors import InvalidArgument, NotFound, ShimError, clip, status_from
from shimv2.failure import FailureReport, SandboxFailed
from ttrpc import Code, ConnectionLost, StatusError


def report(**more: object) -> FailureReport:
    base: dict[str, object] = {
        "sandbox_id": "s1", "phase": "waiting for the agent", "error": "no answer",
        "elapsed_s": 45.04, "deadline_s": 45.0,
    }  # fmt: skip
    return FailureReport(**{**base, **more})  # type: ignore[arg-type]


def test_the_text_tells_phase_times_exit_console_and_advice():
    text = report(
        vm_exit="QEMU exited with 1",
        console_tail=["a", "Kernel panic - not syncing: VFS: Unable to mount root fs"],
    ).text()
    assert text.startswith("waiting for the agent failed after 45.0 s of 45 s: no answer")
    assert "QEMU exited with 1" in text
    assert "Kernel panic" in text
    assert "likely cause: the initrd" in text


def test_the_line_that_tells_is_shown_however_much_follows_it():
    console = ["boot", "Kernel panic - not syncing: No working init found", *["trace"] * 50, "end"]
    made = report(error="the guest rebooted", vm_exit="guest rebooted", console_tail=console)
    assert "No working init found" in made.text()
    assert "end" in made.text()
    assert made.text().count("guest rebooted") == 1


def test_a_silent_guest_and_a_silent_agent_get_different_advice():
    late = {"passed_limit": "`dial_timeout`"}
    assert "printed nothing" in report(**late).text()
    text = report(console_tail=["Linux version 6.1"], **late).text()
    assert "its agent did not answer" in text
    assert "more time (`dial_timeout`)" in text


def test_silence_is_a_cause_only_while_the_agent_is_waited_for():
    made = report(phase="creating the container", passed_limit="the client's limit")
    assert "likely cause" not in made.text()


def test_no_cause_is_made_up():
    assert "likely cause" not in report(elapsed_s=1.0, error="EINVAL", vm_exit="ended").text()


@given(st.text(), st.lists(st.text(max_size=3000), max_size=30), st.text(max_size=5000), st.text())
def test_no_text_is_longer_than_a_status_may_be(error, console, vm_exit, phase):
    made = report(error=error, console_tail=console, vm_exit=vm_exit, phase=phase[:200])
    assert len(made.text().encode("utf-8", "replace")) <= errors.MAX_MESSAGE_BYTES


@given(st.text(), st.integers(16, 200))
def test_clipping_keeps_both_ends_and_the_bound(text, limit):
    clipped = clip(text, limit)
    assert len(clipped.encode()) <= limit
    if len(text.encode("utf-8", "replace")) <= limit:
        assert clipped == text.encode("utf-8", "replace").decode()


def test_reports_are_kept_bounded_and_private(tmp_path):
    root = tmp_path / "reports"
    for number in range(failure.MAX_REPORTS + 5):
        path = report(sandbox_id=f"s{number}", console_tail=["x" * 4000] * 300).save(str(root))
        assert path is not None
        os.utime(path, (number, number))
    kept = sorted(os.listdir(root))
    assert len(kept) == failure.MAX_REPORTS
    assert not any(name.startswith("s0-") for name in kept)
    assert stat.S_IMODE(root.stat().st_mode) == 0o700
    newest = next(root / name for name in kept if name.startswith(f"s{failure.MAX_REPORTS + 4}-"))
    assert stat.S_IMODE(newest.stat().st_mode) == 0o600
    assert newest.stat().st_size <= 64 << 10
    assert json.loads(newest.read_text())["phase"] == "waiting for the agent"


def test_a_report_that_cannot_be_kept_hides_nothing():
    assert report().save("/proc/nowhere") is None


def test_a_log_line_is_one_write_whatever_is_in_it():
    reader, writer = os.pipe()
    log = logs.Log(logs.LogSink(writer), {"sandbox_id": "s"}).bind(container_id="c")
    log.info("vm booted", ms=12, note="line\nbreak \x1b[31m", odd=object())
    log.error("long", text="x" * 100_000, other=["y"] * 5000)
    log.debug("not written")
    log.exception("broke", ValueError("why"))
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        lines = stream.read().splitlines(keepends=True)
    assert len(lines) == 3
    assert all(len(line) <= logs.MAX_LINE_BYTES for line in lines)
    first = json.loads(lines[0])
    assert (first["event"], first["container_id"], first["ms"]) == ("vm booted", "c", 12)
    assert "ValueError" in json.loads(lines[2])["traceback"]


def test_a_full_or_missing_fifo_costs_nothing(tmp_path):
    assert logs.open_bundle_log(str(tmp_path)) == -1
    os.mkfifo(tmp_path / "log")
    sink = logs.LogSink(logs.open_bundle_log(str(tmp_path)))
    log = logs.Log(sink)
    before = time.monotonic()
    for _ in range(2000):
        log.info("flood", text="x" * 200)
    assert time.monotonic() - before < 60
    assert sink.dropped > 0
    os.close(sink.descriptor)
    log.info("after the end")


def test_a_log_that_is_no_fifo_is_not_written_to(tmp_path):
    (tmp_path / "log").symlink_to("/etc/hostname")
    assert logs.open_bundle_log(str(tmp_path)) == -1


class Derived(NotFound):
    pass


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (NotFound("x"), Code.NOT_FOUND),
        (Derived("x"), Code.NOT_FOUND),
        (ShimError("x"), Code.UNKNOWN),
        (ValueError("x"), Code.UNKNOWN),
        (FileNotFoundError(2, "gone"), Code.NOT_FOUND),
        (ConnectionLost("x"), Code.UNAVAILABLE),
        (StatusError(Code.ABORTED, "x"), Code.ABORTED),
        (trio.TooSlowError(), Code.DEADLINE_EXCEEDED),
        (SandboxFailed(report(), int(Code.UNAVAILABLE)), Code.UNAVAILABLE),
        (ExceptionGroup("g", [ValueError("a"), ExceptionGroup("h", [InvalidArgument("b")])]),
         Code.INVALID_ARGUMENT),
    ],
)  # fmt: skip
def test_every_error_has_its_status(error, code):
    found, text = status_from(error)
    assert found is code
    assert text


def test_a_status_keeps_its_text_on_a_second_way_through():
    assert status_from(StatusError(*status_from(NotFound("no c1")))) == (Code.NOT_FOUND, "no c1")


def test_notes_of_a_cleanup_are_told_too():
    error = NotFound("container x not found")
    error.add_note("undoing failed as well")
    assert status_from(error)[1] == "container x not found; undoing failed as well"
