"""The exception tree of this package. Callers act on the class; the data is in attributes.

HypervisorError
├── PreconditionFailed   the host or the specification lacks something; nothing was taken
├── Unsupported          the backend cannot do this, ever, with this specification
├── SpawnFailed          a program could not be executed
├── LaunchFailed         a program was executed and ended, or stayed mute, before it was ready
├── ControlError         a request to a living VMM failed
│   ├── CommandRejected  the VMM answered with an error
│   │   └── HttpRejected over an HTTP API: the status and the body's text
│   ├── CommandTimeout   the VMM did not answer in time
│   └── ControlLost      the control connection ended; the VMM is dead or about to be
└── DetachRefused        the guest did not give the device back
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


class HypervisorError(Exception):
    """Root of everything this package raises on purpose."""


class PreconditionFailed(HypervisorError):
    """Something needed is missing or unusable; raised before any resource is taken.

    `what` names the thing ("guest kernel"), `path` where it was looked for, `errno` why the kernel
    refused it (None: it opened, but its content is wrong), `fix` what an operator can do.
    """

    def __init__(
        self, what: str, *, path: Path | None, why: str, fix: str, errno: int | None = None
    ) -> None:
        super().__init__(what)
        self.what = what
        self.path = path
        self.errno = errno
        self.why = why
        self.fix = fix

    def __str__(self) -> str:
        place = f" {self.path}" if self.path is not None else ""
        code = f" (errno {self.errno}, {os.strerror(self.errno)})" if self.errno else ""
        return f"{self.what}{place}: {self.why}{code}; {self.fix}"


class Unsupported(HypervisorError):
    """The backend cannot do `operation`; `hint` says what to configure instead."""

    def __init__(self, backend: str, operation: str, why: str, hint: str) -> None:
        super().__init__(operation)
        self.backend = backend
        self.operation = operation
        self.why = why
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.backend} cannot {self.operation}: {self.why}; {self.hint}"


class SpawnFailed(HypervisorError):
    """`program` was not executed: `stage` of the preparation failed with `errno`."""

    def __init__(self, program: str, stage: str, errno: int) -> None:
        super().__init__(program)
        self.program = program
        self.stage = stage
        self.errno = errno

    def __str__(self) -> str:
        return f"cannot run {self.program}: {self.stage}: {os.strerror(self.errno)}"


class LaunchFailed(HypervisorError):
    """`program` ended or stayed mute before it was ready; `ending` tells which."""

    def __init__(self, program: str, ending: str, stderr_tail: Sequence[str]) -> None:
        super().__init__(program)
        self.program = program
        self.ending = ending
        self.stderr_tail = tuple(stderr_tail)

    def __str__(self) -> str:
        said = f": {' | '.join(self.stderr_tail[-4:])}" if self.stderr_tail else ""
        return f"{self.program} {self.ending} before it was ready{said}"


class ControlError(HypervisorError):
    """A request to the VMM failed; `command` names it."""

    def __init__(self, command: str, why: str) -> None:
        super().__init__(command)
        self.command = command
        self.why = why

    def __str__(self) -> str:
        return f"VMM command {self.command}: {self.why}"


class CommandRejected(ControlError):
    """The VMM answered `command` with an error of class `error_class`."""

    def __init__(self, command: str, error_class: str, description: str) -> None:
        super().__init__(command, f"{error_class}: {description}")
        self.error_class = error_class
        self.description = description


class HttpRejected(CommandRejected):
    """The VMM's HTTP API answered with `status`, which is not a success; `text` is its reason."""

    def __init__(self, method: str, target: str, status: int, text: str) -> None:
        super().__init__(f"{method} {target}", f"status {status}", text)
        self.method = method
        self.target = target
        self.status = status
        self.text = text


class CommandTimeout(ControlError):
    """The VMM did not answer `command` within `timeout_s`."""

    def __init__(self, command: str, timeout_s: float) -> None:
        super().__init__(command, f"no answer within {timeout_s:g} s")
        self.timeout_s = timeout_s


class ControlLost(ControlError):
    """The control connection ended while `command` was waiting, or before it was sent.

    `why` where it could not even be made.
    """

    def __init__(self, command: str, why: str = "the control connection ended") -> None:
        super().__init__(command, why)


class DetachRefused(HypervisorError):
    """The guest kept device `device_id`: it said no, or nothing until the deadline."""

    def __init__(self, device_id: str, why: str) -> None:
        super().__init__(device_id)
        self.device_id = device_id
        self.why = why

    def __str__(self) -> str:
        return f"device {self.device_id} was not released by the guest: {self.why}"
