"""The vCPU threads of a Cloud Hypervisor process: how many there are, and when one has ended.

The VMM tells what was asked of it, not what the guest has done: a vCPU that the guest gives back
ends as a thread, and no event says so.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import struct
from typing import TYPE_CHECKING, Final

import trio

if TYPE_CHECKING:
    from collections.abc import Iterable

PREFIX: Final = "vcpu"
# Source: perf_event_open(2), linux/perf_event.h; the number is x86-64's.
SYS_PERF_EVENT_OPEN: Final = 298
PERF_TYPE_SOFTWARE: Final = 1
PERF_COUNT_SW_DUMMY: Final = 9
PERF_ATTR_BYTES: Final = 128
PERF_FLAG_FD_CLOEXEC: Final = 8
EXCLUDE_KERNEL_AND_HYPERVISOR: Final = 0b11 << 5
# Without a ring, which nothing is written to, the descriptor is readable from the beginning.
RING_BYTES: Final = 2 * mmap.PAGESIZE


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


async def wait_threads_ended(tids: Iterable[int]) -> bool:
    """Return True when all have ended; False at once where we may not watch them.

    A pidfd of a thread would do, from Linux 6.9 on. A performance counter that counts nothing is as
    old as KVM's and reports the end of the thread it belongs to.
    """
    for tid in tids:
        try:
            fd = _open_counter(tid)
        except ProcessLookupError:
            continue
        except OSError:
            return False
        try:
            with mmap.mmap(fd, RING_BYTES):
                await trio.lowlevel.wait_readable(fd)
        finally:
            os.close(fd)
    return True


def _open_counter(tid: int) -> int:
    head = (PERF_TYPE_SOFTWARE, PERF_ATTR_BYTES, PERF_COUNT_SW_DUMMY, 0, 0, 0)
    attributes = struct.pack("<IIQQQQQ", *head, EXCLUDE_KERNEL_AND_HYPERVISOR)
    buffer = ctypes.create_string_buffer(attributes, PERF_ATTR_BYTES)
    libc = ctypes.CDLL(None, use_errno=True)
    fd: int = libc.syscall(SYS_PERF_EVENT_OPEN, buffer, tid, -1, -1, PERF_FLAG_FD_CLOEXEC)
    if fd < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return fd
