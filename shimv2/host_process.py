"""Processes on the host, known by pid *and* start time: a recycled pid is never mistaken."""

from __future__ import annotations

import os
import select
import signal
import time

_DEAD = (b"Z", b"X")
_PF_EXITING = 0x4

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
    fields = _stat_fields(pid)
    return int(fields[19]) if fields else None


def is_alive(pid: int, start_time: int) -> bool:
    """Say whether this very process still runs; a zombie is dead."""
    fields = _stat_fields(pid)
    return bool(fields) and fields[0] not in _DEAD and int(fields[19]) == start_time


def is_ending(pid: int) -> bool:
    """Say whether the process is on its way out, its memory and descriptors not all given back.

    Source: Linux include/linux/sched.h PF_EXITING; proc(5) /proc/pid/stat field 9.
    """
    fields = _stat_fields(pid)
    return bool(fields) and (fields[0] in _DEAD or bool(int(fields[6]) & _PF_EXITING))


def _stat_fields(pid: int) -> list[bytes]:
    """Return /proc/<pid>/stat from field 3 on; nothing if there is no such process."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as stream:
            data = stream.read()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return data[data.rindex(b")") + 2 :].split()


def kill_and_wait(pid: int, start_time: int, name: str, deadline_s: float) -> str | None:
    """SIGKILL this very process and wait for its death; None when it is gone, else a sentence."""
    descriptor = kill(pid, start_time)
    if descriptor is None:
        return None
    try:
        poller = select.poll()
        poller.register(descriptor, select.POLLIN)
        return None if poller.poll(deadline_s * 1000) else survived(pid, name, deadline_s)
    finally:
        os.close(descriptor)


def kill(pid: int, start_time: int) -> int | None:
    """SIGKILL this very process; return a pidfd, readable when it is dead, or None if it is gone.

    The descriptor is taken before the start time is compared: from then on the pid can't change its
    meaning under the signal. The caller closes it.
    """
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    try:
        if start_time_ticks(pid) == start_time:
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            return descriptor
    except ProcessLookupError:
        pass
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def survived(pid: int, name: str, deadline_s: float) -> str:
    """Say that a process is still there."""
    return (
        f"{name} (pid {pid}) survived SIGKILL for {deadline_s:g} s: it hangs in the kernel, "
        f"where /proc/{pid}/stack says"
    )


def kill_session(leader: int, start_time: int, name: str, deadline_s: float) -> str | None:
    """SIGKILL every process of the session that this leader made, dead or not, until none is left.

    The kernel gives no number to a new process while a session has it: who has it now with another
    start time shows that nothing of the session is left.
    """
    give_up_at = time.monotonic() + deadline_s
    now_leads = start_time_ticks(leader)
    if now_leads is not None and now_leads != start_time:
        return None
    while members := _session_members(leader, start_time):
        for pid, started in members:  # what they start meanwhile is found by the next look
            left_s = give_up_at - time.monotonic()
            if left_s <= 0:
                return f"{name} (session {leader}): process {pid} is left after {deadline_s:g} s"
            problem = kill_and_wait(pid, started, name, left_s)
            if problem is not None:
                return problem
    return None


def _session_members(session: int, not_before: int) -> list[tuple[int, int]]:
    """Return pid and start time of the session's living processes."""
    members = []
    for name in os.listdir("/proc"):
        fields = _stat_fields(int(name)) if name.isdigit() else []
        if not fields or fields[0] in _DEAD or int(fields[3]) != session:
            continue
        if int(fields[19]) >= not_before:
            members.append((int(name), int(fields[19])))
    return members
