"""What the tests' own process holds: descriptors, and children that nobody has waited for.

All tests of a run share that process. What earlier ones left to the garbage collector is closed
at some time, and a child of theirs ends at some time; so a test compares by what is new.
"""

from __future__ import annotations

import contextlib
import gc
import os
from pathlib import Path


def open_descriptors() -> set[tuple[str, str]]:
    """Return the open descriptors with what each leads to; `after <= before`: none is new."""
    gc.collect()
    found = set()
    for number in os.listdir("/proc/self/fd"):
        # The listing's own is closed by now.
        with contextlib.suppress(FileNotFoundError):
            found.add((number, os.readlink(f"/proc/self/fd/{number}")))
    return found


def zombies() -> set[int]:
    """Return the children of this process that have ended and were not waited for."""
    found = set()
    for directory in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            state, parent = (directory / "stat").read_text().rpartition(")")[2].split()[:2]
            if state == "Z" and int(parent) == os.getpid():
                found.add(int(directory.name))
    return found
