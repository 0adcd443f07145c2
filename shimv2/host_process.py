"""Processes on the host, known by pid *and* start time: a recycled pid is never mistaken."""

from __future__ import annotations

import os
import select
import signal

BOOT_ID = "/proc/sys/kernel/random/boot_id"


def boot_id() -> str:
    """Return the id of this boot of the machine; pids and start times mean nothing across it."""
    try:
        with open(BOOT_ID, encoding="ascii") as stream:
            return stream.read().strip()
    except OSError:
        return ""


def start_time_ticks(pid: int) -> int | None:
    """Return when `pid` started, in clock ticks after boot; None if there is no such process.

    Source: proc(5) /proc/pid/stat field 22. The second field may hold spaces and brackets.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as stream:
            data = stream.read()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return int(data[data.rindex(b")") + 2 :].split()[19])


def is_alive(pid: int, start_time: int) -> bool:
    """Say whether this very process still runs; a zombie is dead."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as stream:
            data = stream.read()
    except (FileNotFoundError, ProcessLookupError):
        return False
    fields = data[data.rindex(b")") + 2 :].split()
    return fields[0] not in (b"Z", b"X") and int(fields[19]) == start_time


def kill_and_wait(pid: int, start_time: int, name: str, deadline_s: float) -> str | None:
    """SIGKILL this very process and wait for its death; None when it is gone, else a sentence.

    The descriptor is taken before the start time is compared: from then on the pid can't change its
    meaning under the signal.
    """
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    try:
        if start_time_ticks(pid) != start_time:
            return None
        try:
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        except ProcessLookupError:
            return None
        poller = select.poll()
        poller.register(descriptor, select.POLLIN)
        if poller.poll(deadline_s * 1000):
            return None
        return f"{name} (pid {pid}) survived SIGKILL for {deadline_s:g} s"
    finally:
        os.close(descriptor)
