"""The vCPU threads of a Cloud Hypervisor process: how many there are, and when one has ended.

The VMM tells what was asked of it, not what the guest has done: a vCPU that the guest gives back
ends as a thread, and no event says so.
"""

from __future__ import annotations

import contextlib
import os
from typing import Final

import trio

PREFIX: Final = "vcpu"
# Source: linux/pidfd.h PIDFD_THREAD, which is O_EXCL; since Linux 6.9.
PIDFD_THREAD: Final = os.O_EXCL


def vcpu_threads(pid: int) -> dict[int, int]:
    """Thread ids by vCPU number. Empty when the process is gone."""
    threads: dict[int, int] = {}
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for entry in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                with open(f"/proc/{pid}/task/{entry}/comm", "rb") as stream:
                    name = stream.read(64).decode("ascii", "replace").strip()
                number = name.removeprefix(PREFIX)
                if name.startswith(PREFIX) and number.isdecimal():
                    threads[int(number)] = int(entry)
    return threads


async def wait_threads_ended(tids: list[int]) -> bool:
    """Return True when all have ended; False at once where the kernel has no such event."""
    for tid in tids:
        try:
            fd = os.pidfd_open(tid, PIDFD_THREAD)
        except ProcessLookupError:
            continue
        except OSError:
            return False
        try:
            await trio.lowlevel.wait_readable(fd)
        finally:
            os.close(fd)
    return True
