"""The virtual machine monitor that the end-to-end tests run with, and what it can do.

    KATA_TEST_HYPERVISOR   name of the backend, as the configuration spells it; "qemu" by default
    KATA_TEST_<NAME>       its program, where it isn't in PATH: KATA_TEST_CLOUD_HYPERVISOR
    KATA_TEST_MACHINE_TYPE machine type of the configuration, for backends that have several
    KATA_TEST_MEMORY       MiB of a VM, where the default is too much for the machine

A test that needs an ability says so by `@pytest.mark.needs("pause")`: the name of a flag of
`hypervisors.machine.Capabilities`. With a VMM that lacks it the test is skipped.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypervisors import accel
from hypervisors.machine import Capabilities, MachineSpec
from hypervisors.registry import (
    BUILT_IN,
    DEFAULT_PROGRAMS,
    canonical_name,
    find_hypervisor,
    installed,
)

NAME = canonical_name(os.environ.get("KATA_TEST_HYPERVISOR", "qemu"))
MACHINE_TYPE = os.environ.get("KATA_TEST_MACHINE_TYPE", "")
#: The backends, those of other distributions too, and the names of their programs.
PROGRAMS = {name: Path(DEFAULT_PROGRAMS.get(name, name)).name for name in installed()}
#: What the end-to-end tests run with: a backend, or `backend:machine type` beside its usual one.
SETUPS = (*PROGRAMS, "qemu:microvm")
SETUP = f"{NAME}:{MACHINE_TYPE}" if MACHINE_TYPE else NAME
#: What a backend needs of a machine instead of KVM, and why it isn't there.
_OTHER_NEEDS: dict[str, tuple[str, Callable[[], str | None]]] = {
    "acrn": ("ACRN", accel.acrn_problem),
    "qemu": ("nothing", lambda: None),
}
_MIB_FOR_CAPABILITIES = 1024


def variable(name: str) -> str:
    """Return the environment variable that names a backend's program."""
    return "KATA_TEST_" + re.sub(r"[^A-Z0-9]", "_", name.upper())


def find_program(name: str) -> Path | None:
    """Return a backend's program, from its variable, else from PATH; None if there is none."""
    found = os.environ.get(variable(name)) or shutil.which(PROGRAMS.get(name, name))
    return Path(found).resolve() if found and Path(found).exists() else None


def missing(setup: str, *, has_kvm: bool = False) -> str:
    """Say why a backend can't be tested here, or where there is KVM; empty when it can."""
    name = setup.partition(":")[0]
    if find_program(name) is None:
        program = PROGRAMS.get(name, name)
        return f"{setup}: no {program} in PATH and {variable(name)} names none"
    if setup == "qemu:microvm" and not has_kvm and accel.kvm_problem() and not accel.tsc_khz():
        return f"{setup} needs KVM, or a host that tells how fast its time stamp counter runs"
    if name in _OTHER_NEEDS:
        needed, problem = _OTHER_NEEDS[name][0], _OTHER_NEEDS[name][1]()
    elif name in BUILT_IN:
        needed, problem = "KVM", None if has_kvm else accel.kvm_problem()
    else:
        return ""  # another distribution's: what it needs, it says itself
    return f"{setup} needs {needed}: {problem}" if problem else ""


def fields_of(setup: str) -> dict[str, Any]:
    """Return what a setup means for a `MachineSpec`: program, and machine type if it has one."""
    name, _, machine_type = setup.partition(":")
    program = {"binary": find_program(name)}
    return program | ({"machine_type": machine_type} if machine_type else {})


def process_name(name: str = NAME) -> str:
    """Return what the kernel shows as a VMM's `comm`: its program's name, cut at 15 characters."""
    program = find_program(name)
    return (program.name if program else PROGRAMS.get(name, name))[:15]


@functools.cache
def capabilities() -> Capabilities:
    """Return what the VMM under test can do on this host."""
    spec = MachineSpec(
        id="capabilities",
        kernel=Path("/nowhere"),
        initrd=None,
        cmdline="",
        vcpus=1,
        max_vcpus=2,
        memory_mib=_MIB_FOR_CAPABILITIES,
        max_memory_mib=2 * _MIB_FOR_CAPABILITIES,
        binary=find_program(NAME) or Path("/nowhere"),
        run_dir=Path("/tmp"),
        machine_type=MACHINE_TYPE or "q35",
        hotplug_ports=2,
    )
    return find_hypervisor(NAME).capabilities(spec)


def lacks(ability: str) -> str:
    """Say that the VMM under test can't do `ability`; empty when it can."""
    if getattr(capabilities(), ability):
        return ""
    return f"{SETUP} lacks {ability.replace('_', ' ')} here"


def has_vsock_daemon() -> bool:
    """Whether each VM has a vsock daemon: only where neither VMM nor kernel has a device."""
    can = capabilities()
    return not can.hybrid_vsock and not can.kernel_vsock
