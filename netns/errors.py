"""What can go wrong on the host's network, by what the caller can do about it.

NetnsError
├── NamespaceGone    the path is no network namespace: the pod's network is gone already
├── HostNamespace    the path is the host's own network, which is never touched
├── UnsupportedLink  a link of the pod can't be wired to a virtual machine: `link`, `reason`
├── KernelRefused    an operation failed: `operation`, `errno`
└── HelperLost       the child that works inside of the namespace died, hung, or there is none
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


class HostNamespace(NetnsError):
    """`path` is the network namespace of the host (or of the shim itself)."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.path = path

    def __str__(self) -> str:
        return (
            f"{self.path} is the host's network namespace: a virtual machine cannot share the "
            "host's network; run the pod without hostNetwork"
        )


class UnsupportedLink(NetnsError):
    """The pod's link `link` can't be wired to a virtual machine, because of `reason`."""

    def __init__(self, link: str, reason: str) -> None:
        super().__init__(link, reason)
        self.link = link
        self.reason = reason

    def __str__(self) -> str:
        return f"network interface {self.link} cannot be given to a virtual machine: {self.reason}"


class KernelRefused(NetnsError):
    """The kernel answered `operation` with `errno`; `detail` is what else is known."""

    def __init__(self, operation: str, errno: int, detail: str = "") -> None:
        super().__init__(operation, errno, detail)
        self.operation = operation
        self.errno = errno
        self.detail = detail

    def __str__(self) -> str:
        name = errno_names.errorcode.get(self.errno, str(self.errno))
        text = f"{self.operation}: {os.strerror(self.errno)} ({name})"
        return f"{text}; {self.detail}" if self.detail else text


class HelperLost(NetnsError):
    """The child process for `operation` gave no answer: there was none, it ended or it hung."""

    def __init__(self, operation: str, reason: str) -> None:
        super().__init__(operation, reason)
        self.operation = operation
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.operation}: helper process {self.reason}"
