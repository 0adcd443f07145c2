"""What can go wrong, and the status that containerd gets for it: the only mapping table.

A `ShimError` subclass says what the caller can do about it, and carries its code. Errors of the
other packages get their code here. The module imports nothing heavy: `delete` uses it as well.
"""

from __future__ import annotations

TYPE_CHECKING = False  # importing `typing` for it costs `start` 5 ms
if TYPE_CHECKING:
    from ttrpc import Code

MAX_MESSAGE_BYTES = 2048
"""A status message is shown by `kubectl describe` and stored in events."""

# Source: google/rpc/code.proto. Plain numbers, so that `delete` doesn't load ttrpc's enumeration.
_UNKNOWN = 2
_INVALID_ARGUMENT = 3
_DEADLINE_EXCEEDED = 4
_NOT_FOUND = 5
_ALREADY_EXISTS = 6
_RESOURCE_EXHAUSTED = 8
_FAILED_PRECONDITION = 9
_UNIMPLEMENTED = 12
_INTERNAL = 13
_UNAVAILABLE = 14


class ShimError(Exception):
    """Root of this package's errors. On its own: something failed, and no code says it better."""

    code: int = _UNKNOWN


class InvalidArgument(ShimError):
    """The request, the bundle or the configuration is wrong; repeating it does not help."""

    code = _INVALID_ARGUMENT


class NotFound(ShimError):
    """The container or process does not exist, or exists no longer."""

    code = _NOT_FOUND


class AlreadyExists(ShimError):
    """The id is taken."""

    code = _ALREADY_EXISTS


class FailedPrecondition(ShimError):
    """The process is in a state in which this can't be done."""

    code = _FAILED_PRECONDITION


class DeadlineExceeded(ShimError):
    """It took longer than its deadline, and was undone."""

    code = _DEADLINE_EXCEEDED


class ResourceExhausted(ShimError):
    """No space, no memory, no descriptors, or a bound of ours was reached."""

    code = _RESOURCE_EXHAUSTED


class Unimplemented(ShimError):
    """Not offered by this build, this backend or this guest; the text says which."""

    code = _UNIMPLEMENTED


class Unavailable(ShimError):
    """The virtual machine or its agent is gone."""

    code = _UNAVAILABLE


# Errors of other packages by (module, class): looked up along the class's bases, so that neither
# package is imported here and a subclass nobody listed gets what its base got.
_FOREIGN: dict[tuple[str, str], int] = {
    ("agent_proto.errors", "AgentUnreachable"): _UNAVAILABLE,
    ("agent_proto.errors", "AgentTimeout"): _DEADLINE_EXCEEDED,
    ("hypervisors.errors", "Unsupported"): _UNIMPLEMENTED,
    ("hypervisors.errors", "PreconditionFailed"): _FAILED_PRECONDITION,
    ("hypervisors.errors", "CommandTimeout"): _DEADLINE_EXCEEDED,
    ("hypervisors.errors", "ControlLost"): _UNAVAILABLE,
    ("agent_proto.errors", "RequestTooLarge"): _RESOURCE_EXHAUSTED,
    ("netns.errors", "HostNamespace"): _FAILED_PRECONDITION,
    ("netns.errors", "NamespaceGone"): _FAILED_PRECONDITION,
    ("netns.errors", "UnsupportedLink"): _UNIMPLEMENTED,
    ("netns.errors", "HelperLost"): _UNAVAILABLE,
    ("ttrpc.errors", "ConnectionLost"): _UNAVAILABLE,
    ("ttrpc.errors", "CallTimeout"): _DEADLINE_EXCEEDED,
    ("trio", "TooSlowError"): _DEADLINE_EXCEEDED,
    ("builtins", "TimeoutError"): _DEADLINE_EXCEEDED,
    ("builtins", "FileNotFoundError"): _NOT_FOUND,
    ("builtins", "FileExistsError"): _ALREADY_EXISTS,
    ("builtins", "NotImplementedError"): _UNIMPLEMENTED,
    ("builtins", "MemoryError"): _RESOURCE_EXHAUSTED,
}

# Codes that an agent's answer keeps on its way to containerd. The rest says nothing to a caller who
# did not talk to the agent, and becomes UNKNOWN with the agent's words.
_PASSED_ON = frozenset({
    _INVALID_ARGUMENT, _DEADLINE_EXCEEDED, _NOT_FOUND, _ALREADY_EXISTS, _RESOURCE_EXHAUSTED,
    _FAILED_PRECONDITION, _UNIMPLEMENTED, _UNAVAILABLE,
})  # fmt: skip


def status_from(error: BaseException) -> tuple[Code, str]:
    """Return the code and the text (at most 2 KiB of UTF-8) by which containerd learns of `error`.

    Groups are unpacked to their most telling member; notes that cleanup added follow the text.
    """
    from ttrpc import Code

    error = representative(error)
    text = str(error) or type(error).__name__
    if type(error).__name__ == "StatusError":  # its str() begins with the code
        text = str(getattr(error, "message", text))
    notes = getattr(error, "__notes__", ())
    if notes:
        text = "; ".join([text, *notes])
    return Code(_code_of(error)), clip(text)


def representative(error: BaseException) -> BaseException:
    """Return the one error of a (nested) group that explains it best, or `error` itself."""
    while isinstance(error, BaseExceptionGroup):
        members = error.exceptions
        known = [one for one in members if isinstance(one, (ShimError, BaseExceptionGroup))]
        ordinary = [one for one in members if isinstance(one, Exception)]
        error = (known or ordinary or list(members))[0]
    return error


def clip(text: str, limit: int = MAX_MESSAGE_BYTES) -> str:
    """Cut `text` to `limit` bytes of UTF-8, in the middle: causes stand first, hints stand last."""
    data = text.encode("utf-8", "replace")
    if len(data) <= limit:
        return data.decode("utf-8")
    mark = " … ".encode()
    head = (limit - len(mark)) * 2 // 3
    tail = limit - len(mark) - head
    return (data[:head] + mark + data[-tail:]).decode("utf-8", "ignore")


def _code_of(error: BaseException) -> int:
    code = getattr(error, "code", None)
    if isinstance(error, ShimError) or type(error).__name__ == "StatusError":
        return int(code) if isinstance(code, int) else _UNKNOWN
    if isinstance(code, int) and type(error).__name__ in {"AgentStatus", "RemoteStatus"}:
        return int(code) if code in _PASSED_ON else _UNKNOWN
    for base in type(error).__mro__:
        known = _FOREIGN.get((base.__module__, base.__name__))
        if known is not None:
            return known
    return _UNKNOWN
