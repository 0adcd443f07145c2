"""What can go wrong between the host and the guest agent, by what the caller can do about it.

    AgentError
    ├── AgentUnreachable    no connection, or it ended: dial again, or give the VM up
    │   └── HandshakeRefused    the vsock device answered, but not with a connection to the agent
    ├── AgentTimeout        connected, no answer in time: the agent or its VM hangs
    ├── AgentStatus         the agent answered: it will not or cannot; `code` says why
    ├── AgentMisbehaved     the answer is none the protocol allows: take the guest for hostile
    └── RequestTooLarge     not sent: no message of that size can be

Text that comes from the guest is escaped and cut short before it gets into any of them.
"""

from __future__ import annotations

from typing import Final

# A failure report for containerd may have 2 KiB; the guest's words get half of them.
MAX_GUEST_TEXT: Final = 1024


def guest_text(raw: str | bytes, limit: int = MAX_GUEST_TEXT) -> str:
    """Return text from the guest so that it can stand in a log line or an error message.

    Control and other unprintable characters come out as escapes, and at most `limit` characters
    are left.
    """
    cut = raw[: limit + 1]
    text = cut.decode("utf-8", "backslashreplace") if isinstance(cut, bytes) else cut
    shown = text if text.isprintable() else "".join(_visible(c) for c in text)
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def _visible(character: str) -> str:
    if character.isprintable():
        return character
    return character.encode("unicode_escape").decode("ascii")


class AgentError(Exception):
    """Root of the package's errors."""


class AgentUnreachable(AgentError):
    """There is no connection to the agent: it was not made, or it ended.

    `what` names the endpoint or the call that had to be given up.
    """

    def __init__(self, what: str, reason: str) -> None:
        super().__init__(what, reason)
        self.what = what
        self.reason = reason

    def __str__(self) -> str:
        return f"agent unreachable: {self.what}: {self.reason}"


class HandshakeRefused(AgentUnreachable):
    """The hybrid vsock device did not confirm the connection to the guest's port.

    Usual before the agent listens. `answer` is what came instead of `OK`, escaped.
    """

    def __init__(self, port: int, reason: str, answer: bytes = b"") -> None:
        super().__init__(f"hybrid vsock port {port}", reason)
        self.args = (port, reason, answer)
        self.port = port
        self.answer = guest_text(answer, 64)

    def __str__(self) -> str:
        shown = f" ({self.answer})" if self.answer else ""
        return f"vsock device refused port {self.port}: {self.reason}{shown}"


class AgentTimeout(AgentError):
    """The agent did not answer `method` within `deadline_s` seconds."""

    def __init__(self, method: str, deadline_s: float) -> None:
        super().__init__(method, deadline_s)
        self.method = method
        self.deadline_s = deadline_s

    def __str__(self) -> str:
        return f"agent did not answer {self.method} within {self.deadline_s:g} s"


class AgentStatus(AgentError):
    """The agent answered `method` with an error.

    `code` is a google.rpc code (compare with `ttrpc.errors.Code`), `message` the agent's own text,
    escaped. Decide by code, never by text.
    Source: kata-containers 4.1 agent: NOT_FOUND process gone, INVALID_ARGUMENT no such container,
    UNAVAILABLE no terminal, INTERNAL the rest.
    """

    def __init__(self, code: int, message: str, method: str) -> None:
        text = guest_text(message)
        super().__init__(code, text, method)
        self.code = code
        self.message = text
        self.method = method

    def __str__(self) -> str:
        name = getattr(self.code, "name", self.code)
        return f"agent answered {self.method} with {name}: {self.message}"


class AgentMisbehaved(AgentError):
    """What came from the guest in answer to `method` breaks the protocol."""

    def __init__(self, method: str, reason: str) -> None:
        super().__init__(method, reason)
        self.method = method
        self.reason = reason

    def __str__(self) -> str:
        return f"agent broke the protocol in {self.method}: {self.reason}"


class RequestTooLarge(AgentError):
    """The request for `method` has `size` bytes; nothing was sent, the connection is as before."""

    def __init__(self, method: str, size: int, limit: int) -> None:
        super().__init__(method, size, limit)
        self.method = method
        self.size = size
        self.limit = limit

    def __str__(self) -> str:
        return f"request {self.method} has {self.size} bytes, the agent takes {self.limit}"
