"""Kubernetes' termination log of a container whose VM has no shared directory.

The container writes into a copy; kubelet reads the host's file once containerd has deleted the
task. Source: Kata virtcontainers/kata_agent.go (GetDiagnosticData where sharing is off).
"""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING, Final

from shimv2.errors import InvalidArgument
from shimv2.guest_spec import shared_mounts

if TYPE_CHECKING:
    from pathlib import Path

    from shimv2.bundle import JsonObject

# Source: Kubernetes TerminationMessagePathDefault, and the most that kubelet reads of it.
_DESTINATION: Final = "/dev/termination-log"
_MAX_BYTES: Final = 4096


def host_file(spec: JsonObject) -> Path | None:
    """The host's file behind a container's termination log, if it has one that it may write."""
    for mount in shared_mounts(spec):
        if str(mount.destination) == _DESTINATION and not mount.read_only:
            return mount.source
    return None


def write(path: Path, text: str) -> None:
    """Replace the content of kubelet's file with what the guest says was written.

    Raises:
        InvalidArgument: it is no regular file.
        OSError: it can't be written.
    """
    flags = os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(path, flags)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise InvalidArgument(f"{path} is not a regular file")
        os.ftruncate(descriptor, 0)
        os.write(descriptor, text.encode("utf-8", "replace")[:_MAX_BYTES])
    finally:
        os.close(descriptor)
