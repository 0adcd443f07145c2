"""Which VMMs can be tested here: their programs, and why one is left out."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from hypervisors import accel

from . import scratch_guest

# Where a program is looked for when it isn't in the PATH.
VARIABLES = {"cloud-hypervisor": "KATA_TEST_CLOUD_HYPERVISOR"}


def program_of(name: str) -> Path:
    """The VMM's program; a path that need not exist."""
    if name == "qemu":
        return scratch_guest.QEMU
    found = os.environ.get(VARIABLES[name]) or shutil.which(name)
    return Path(found) if found else Path("/nonexistent") / name


def missing(name: str) -> str:
    """Why machines of this VMM cannot be tested here; empty when they can."""
    program = program_of(name)
    if not program.exists():
        variable = f" and {VARIABLES[name]} names none" if name in VARIABLES else ""
        return f"{name} is not in the PATH{variable}"
    problem = None if name == "qemu" else accel.kvm_problem()
    return f"{name} needs KVM: {problem}" if problem else ""
