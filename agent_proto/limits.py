"""How long the agent may take for an answer, and how long the answer may be: one table for each.

Pure data, with the reason beside each number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

# One stdio chunk, both ways. Eight times the Go shim's 32 KiB, since each chunk costs a round trip
# through ttrpc, vsock and two schedulers; small enough that a thousand streams cost 256 MiB at most
# when every guest floods its output.
MAX_CHUNK_BYTES: Final = 256 << 10

# Tag and length of the only field, generously.
CHUNK_REPLY_OVERHEAD: Final = 16

# Host memory that an answer can cost is a multiple of its wire size (packed fields become Python
# objects), so the common answer, which is empty or a few numbers, gets little.
_REPLY_BYTES: Final = 64 << 10

_REPLY_BYTES_OF: Final = {
    "StatsContainer": 1 << 20,  # per device, per CPU and per page size: hundreds of lines
    "GetMetrics": 1 << 20,  # text; the scrape's own limit is the same
    "GetIPTables": 1 << 20,  # text of iptables-save
    "SetIPTables": 1 << 20,
    "ListInterfaces": 1 << 20,
    "ListRoutes": 1 << 20,
    "UpdateRoutes": 1 << 20,  # echoes the whole table
}


def reply_limit(method: str) -> int:
    """Return the longest answer to `method` that is looked at, in bytes."""
    return _REPLY_BYTES_OF.get(method, _REPLY_BYTES)


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentTimeouts:
    """Seconds from a call to its answer, by what the agent has to do meanwhile."""

    # Reads a constant. It is asked to find out whether the guest hangs, so it must be answered even
    # by an emulated guest whose CPUs are all taken. Upstream gives 30 s.
    check_s: float = 10.0
    # Bounded work in the guest's memory: a netlink call, a sysfs file, a signal, one file chunk.
    # Upstream's general limit in both of its shims lies at 30 to 60 s.
    request_s: float = 60.0
    # Mounts, waits for hot-plugged devices, sets cgroups up, runs the OCI runtime.
    # Upstream: create_container_timeout, 60 s in the Go shim.
    create_container_s: float = 60.0
    # Kills what is left and unmounts. A lazy file system flushes here.
    remove_container_s: float = 60.0
    # Loads kernel modules and mounts the share.
    create_sandbox_s: float = 60.0
    # The VM is going away either way; unmounting deserves a moment, a hung guest does not.
    destroy_sandbox_s: float = 10.0
    # Grows a file system, or checks one before it does.
    resize_volume_s: float = 300.0

    def of(self, method: str) -> float | None:
        """Return the limit for `method`; None for calls that last as long as what they wait for."""
        if method in UNLIMITED:
            return None
        seconds: float = getattr(self, _TIMEOUT_OF.get(method, "request_s"))
        return seconds


# Each of these is answered when a process exits, writes or reads, or when memory runs out. Their
# callers cancel them; the loss of the connection ends them.
UNLIMITED: Final = frozenset(
    {"WaitProcess", "ReadStdout", "ReadStderr", "WriteStdin", "GetOOMEvent"}
)

_TIMEOUT_OF: Final = {
    "Check": "check_s",
    "CreateContainer": "create_container_s",
    "StartContainer": "create_container_s",
    "ExecProcess": "create_container_s",
    "RemoveContainer": "remove_container_s",
    "CreateSandbox": "create_sandbox_s",
    "DestroySandbox": "destroy_sandbox_s",
    "ResizeVolume": "resize_volume_s",
}
