"""What can go wrong on the host's network, by what the caller can do about it.

NetnsError
├── NamespaceGone    the path is no network namespace: the pod's network is gone already
├── KernelRefused    an operation failed: `operation`, `errno`
└── HelperLost       the child that works inside of the namespace died or hung
"""

from __future__ import annotations

import errno as errno_names
import os


class NetnsError(Exception):
    """Root of the package's errors."""


class NamespaceGone(NetnsError):
    """`path` does not lead to a network namespace."""

    def __init__(self, path: str, errno: int) -> None:
        super().__init__(path, errno)
        self.path = path
        self.errno = errno

    def __str__(self) -> str:
        return f"{self.path} is no network namespace: {os.strerror(self.errno)}"


class KernelRefused(NetnsError):
    """The kernel answered `operation` with `errno`."""

    def __init__(self, operation: str, errno: int) -> None:
        super().__init__(operation, errno)
        self.operation = operation
        self.errno = errno

    def __str__(self) -> str:
        name = errno_names.errorcode.get(self.errno, str(self.errno))
        return f"{self.operation}: {os.strerror(self.errno)} ({name})"


class HelperLost(NetnsError):
    """The child process for `operation` ended or hung without an answer."""

    def __init__(self, operation: str, reason: str) -> None:
        super().__init__(operation, reason)
        self.operation = operation
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.operation}: helper process {self.reason}"
