"""Which operation a process allows in which state: one pure table, asked before every change.

The state machine of an init process (an exec process has no CREATING, PAUSED):

    CREATING ──> CREATED ──start──> STARTING ──> RUNNING <──pause/resume──> PAUSED
        │           │                  │            │                         │
        └─rollback  └──────────────────┴────────────┴──────── exit ───────────┘──> STOPPED
    CREATED, STOPPED ──delete──> DELETING ──> gone

Semantics and wording follow runc's shim. Where runc answers Unknown for a plain refusal, this
table says FailedPrecondition, so that a client can tell a refusal from a defect.
Source: containerd cmd/containerd-shim-runc-v2/process/{init_state,exec_state}.go.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final

from shimv2.errors import FailedPrecondition, InvalidArgument, NotFound, ShimError


class State(Enum):
    """Where a process is in its life."""

    CREATING = "creating"
    CREATED = "created"
    STARTING = "starting"
    RUNNING = "running"
    PAUSED = "paused"
    STOPPED = "stopped"
    DELETING = "deleting"


class Operation(Enum):
    """What a client may ask of a process; the value is the verb used in refusals."""

    START = "start"
    DELETE = "delete"
    KILL = "kill"
    PAUSE = "pause"
    RESUME = "resume"
    EXEC = "exec in"
    START_EXEC = "start an exec in"
    UPDATE = "update"
    STATS = "read metrics of"
    RESIZE = "resize"
    CLOSE_IO = "close the input of"


class Role(Enum):
    """What the process is to its container."""

    INIT = "container"
    EXEC = "process"


@dataclass(frozen=True, slots=True)
class Allowed:
    """Go on."""


@dataclass(frozen=True, slots=True)
class NoOp:
    """Answer success and do nothing."""


@dataclass(frozen=True, slots=True)
class Later:
    """A change is under way: wait for the next state and ask again."""


@dataclass(frozen=True, slots=True)
class Refused:
    """Answer this error."""

    error: type[ShimError]
    text: str


Verdict = Allowed | NoOp | Later | Refused

_ALLOWED: Final = Allowed()
_NO_OP: Final = NoOp()
_LATER: Final = Later()
_FINISHED: Final = Refused(NotFound, "process already finished")
_NOT_CREATED: Final = Refused(FailedPrecondition, "process not created")
_GONE: Final = Refused(NotFound, "process is being deleted")

# The states in which an operation is allowed; all else is refused by the default wording.
_ALLOWED_IN: Final[dict[tuple[Role, Operation], frozenset[State]]] = {
    (Role.INIT, Operation.START): frozenset({State.CREATED}),
    (Role.INIT, Operation.DELETE): frozenset({State.CREATED, State.STOPPED}),
    (Role.INIT, Operation.KILL): frozenset(
        {State.CREATING, State.CREATED, State.STARTING, State.RUNNING, State.PAUSED}
    ),
    (Role.INIT, Operation.PAUSE): frozenset({State.RUNNING}),
    (Role.INIT, Operation.RESUME): frozenset({State.PAUSED}),
    (Role.INIT, Operation.EXEC): frozenset({State.CREATED, State.STARTING, State.RUNNING}),
    (Role.INIT, Operation.START_EXEC): frozenset({State.RUNNING}),
    (Role.INIT, Operation.UPDATE): frozenset({State.CREATED, State.RUNNING, State.PAUSED}),
    (Role.INIT, Operation.STATS): frozenset({State.CREATED, State.RUNNING, State.PAUSED}),
    (Role.INIT, Operation.RESIZE): frozenset(
        {State.CREATING, State.CREATED, State.STARTING, State.RUNNING, State.PAUSED}
    ),
    (Role.INIT, Operation.CLOSE_IO): frozenset(
        {State.CREATING, State.CREATED, State.STARTING, State.RUNNING, State.PAUSED}
    ),
    (Role.EXEC, Operation.START): frozenset({State.CREATED}),
    (Role.EXEC, Operation.DELETE): frozenset({State.CREATED, State.STOPPED}),
    (Role.EXEC, Operation.KILL): frozenset({State.RUNNING}),
    (Role.EXEC, Operation.RESIZE): frozenset({State.CREATED, State.STARTING, State.RUNNING}),
    (Role.EXEC, Operation.CLOSE_IO): frozenset({State.CREATED, State.STARTING, State.RUNNING}),
}

_SPECIAL: Final[dict[tuple[Role, Operation, State], Verdict]] = {
    (Role.INIT, Operation.DELETE, State.CREATING): _LATER,
    (Role.INIT, Operation.DELETE, State.STARTING): _LATER,
    (Role.INIT, Operation.DELETE, State.DELETING): _LATER,
    (Role.INIT, Operation.KILL, State.STOPPED): _FINISHED,
    (Role.INIT, Operation.STATS, State.CREATING): Refused(
        NotFound, "no metrics before the container is created"
    ),
    (Role.INIT, Operation.STATS, State.STARTING): _ALLOWED,
    (Role.INIT, Operation.UPDATE, State.STARTING): _LATER,
    (Role.INIT, Operation.PAUSE, State.STARTING): _LATER,
    (Role.INIT, Operation.START_EXEC, State.STARTING): _LATER,
    (Role.INIT, Operation.STATS, State.STOPPED): Refused(
        NotFound, "a stopped container has no metrics"
    ),
    (Role.INIT, Operation.CLOSE_IO, State.STOPPED): _NO_OP,
    (Role.EXEC, Operation.DELETE, State.STARTING): _LATER,
    (Role.EXEC, Operation.DELETE, State.DELETING): _LATER,
    (Role.EXEC, Operation.KILL, State.CREATED): _NOT_CREATED,
    (Role.EXEC, Operation.KILL, State.STARTING): _LATER,
    (Role.EXEC, Operation.KILL, State.STOPPED): _FINISHED,
    (Role.EXEC, Operation.CLOSE_IO, State.STOPPED): _NO_OP,
}


def verdict(role: Role, operation: Operation, state: State) -> Verdict:
    """What the table says; every combination has an answer."""
    special = _SPECIAL.get((role, operation, state))
    if special is not None:
        return special
    allowed_in = _ALLOWED_IN.get((role, operation))
    if allowed_in is None:
        return Refused(InvalidArgument, f"cannot {operation.value} an exec process")
    if state in allowed_in:
        return _ALLOWED
    if state is State.DELETING:
        return _GONE
    return Refused(FailedPrecondition, _refusal(role, operation, state))


def _refusal(role: Role, operation: Operation, state: State) -> str:
    # runc says "cannot delete a running process" for both roles; clients show that text.
    noun = "process" if operation is Operation.DELETE else role.value
    return f"cannot {operation.value} a {state.value} {noun}"
