"""What a VMM or a helper is kept away from: other users' files and processes, the host's network.

A guest that breaks out of its VMM finds itself as a user that owns nothing, in a network namespace
without interfaces or in its pod's. Everything it needs was opened before and passed down.
"""

from __future__ import annotations

import ctypes
import os
import stat
import zlib
from pathlib import Path
from typing import Final, TypedDict

from .accel import KVM_DEVICE
from .child_exec import Account
from .errors import PreconditionFailed

# Source: linux/sched.h
CLONE_NEWUTS: Final = 0x04000000
CLONE_NEWIPC: Final = 0x08000000
CLONE_NEWNET: Final = 0x40000000
# Source: linux/landlock.h; the call has this number on every architecture.
SYS_LANDLOCK_CREATE_RULESET: Final = 444
LANDLOCK_CREATE_RULESET_VERSION: Final = 1
# With truncation. Source: Cloud Hypervisor v53 vmm/src/landlock.rs, which takes no less.
LANDLOCK_ABI: Final = 3
# No name service hands these out: above 2^30, below what the kernel's 32 bits would call negative.
FIRST_UID: Final = 0x6B000000
UID_COUNT: Final = 1 << 20
UID_MAP: Final = Path("/proc/self/uid_map")


def own_namespaces() -> int:
    """Flags for `child.spawn(unshare=)`; none where the launcher may not make namespaces."""
    return CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS if os.geteuid() == 0 else 0


class Namespaces(TypedDict):
    """Keywords of `child.spawn`: what a VMM joins, and what it gets of its own."""

    join: tuple[int, ...]
    unshare: int


def machine_namespaces(network_namespace: int | None) -> Namespaces:
    """The namespaces of a VMM whose specification names this network namespace.

    It is the pod's: whoever knows the VMM's pid finds the pod's network below /proc. A VMM has no
    capability in it, and what arrives there goes to the guest (decision 0010).
    """
    if network_namespace is None or os.geteuid() != 0:
        return {"join": (), "unshare": own_namespaces()}
    return {"join": (network_namespace,), "unshare": own_namespaces() & ~CLONE_NEWNET}


def hides_files() -> bool:
    """Whether a VMM can be given an empty root (`empty_root`)."""
    return os.geteuid() == 0


def has_landlock() -> bool:
    """Whether the kernel (6.2 and newer, where it is on) confines a VMM to the files it names."""
    call = ctypes.CDLL(None, use_errno=True).syscall
    flags = LANDLOCK_CREATE_RULESET_VERSION
    version: int = call(SYS_LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), flags)
    return version >= LANDLOCK_ABI


def machine_account(machine_id: str, accelerator: str, kvm: Path = KVM_DEVICE) -> Account | None:
    """The user for one machine's VMM: the same for the same id, no entry in passwd needed.

    None where it must stay what the launcher is: that is not root itself, or only root may open the
    KVM device.

    Raises:
        PreconditionFailed: the launcher's user namespace does not know such users.
    """
    if os.geteuid() != 0:
        return None
    number = FIRST_UID + zlib.crc32(machine_id.encode()) % UID_COUNT
    _check_mapped(number)
    if accelerator != "kvm":
        return Account(uid=number, gid=number)
    status = os.stat(kvm)
    if status.st_mode & stat.S_IWOTH:
        return Account(uid=number, gid=number)
    if status.st_mode & stat.S_IWGRP and status.st_gid != 0:
        return Account(uid=number, gid=number, groups=(status.st_gid,))
    return None


def _check_mapped(uid: int, uid_map: Path = UID_MAP) -> None:
    for line in uid_map.read_text().splitlines():
        first, _, count = map(int, line.split())
        if first <= uid < first + count:
            return
    raise PreconditionFailed(
        "user of the VMM",
        path=uid_map,
        why=f"uid {uid} is not mapped in this user namespace",
        fix="map it, or run the VMM as the launcher (rootless = false)",
    )
