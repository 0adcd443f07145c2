"""Why a sandbox could not be created, as its user can act on it.

A mistake of the user's is told as it is. What failed by itself becomes a report with phase, time,
the VM's exit and the guest's last words, kept on disk as well (`failure`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from agent_proto.errors import AgentStatus
from hypervisors.errors import PreconditionFailed, Unsupported
from shimv2.boot import AgentSilent
from shimv2.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Unimplemented,
    representative,
    status_from,
)
from shimv2.failure import FailureReport, SandboxFailed

if TYPE_CHECKING:
    from shimv2.boot import Machine
    from shimv2.timeline import Timeline

_USERS_OWN = (InvalidArgument, NotFound, FailedPrecondition, Unimplemented)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """What is known at the moment of a failure; taken before the machine is taken down."""

    sandbox_id: str
    phase: str
    elapsed_s: float
    vm_exit: str
    console_tail: tuple[str, ...]


def scene_of(sandbox_id: str, timeline: Timeline, machine: Machine | None) -> Scene:
    """Look at what there is."""
    vm_exit = machine.vm_exit if machine is not None else None
    return Scene(
        sandbox_id=sandbox_id,
        phase=timeline.phase,
        elapsed_s=timeline.elapsed_s(),
        vm_exit=vm_exit.reason if vm_exit is not None else "",
        console_tail=tuple(machine.console_tail()) if machine is not None else (),
    )


def users_mistake(error: Exception, *, is_guest_well: bool) -> Exception | None:
    """The error as it should be told if no report would add anything; else None."""
    cause = representative(error)
    if isinstance(cause, PreconditionFailed):
        return FailedPrecondition(str(cause))
    if isinstance(cause, (*_USERS_OWN, Unsupported)):
        return cause
    if isinstance(cause, AgentStatus) and is_guest_well:
        # It is the container that can't be.
        return cause
    return None


def failed(
    scene: Scene, error: Exception, *, reason: str, limit_s: float | None, reports_root: str
) -> SandboxFailed:
    """The whole report on a creation that failed by itself; `reason` is the VM's end, if any."""
    cause = representative(error)
    text = reason or str(cause) or type(cause).__name__
    code = int(status_from(cause)[0])
    if isinstance(cause, AgentSilent):
        return _kept(scene, text, cause.limit_s, code, reports_root, cause.limit_name)
    return _kept(scene, text, limit_s, code, reports_root)


def late(scene: Scene, *, limit_s: float, limit_name: str, reports_root: str) -> SandboxFailed:
    """The whole report on a creation that its deadline cut short."""
    text = f"the deadline passed ({limit_name})"
    return _kept(scene, text, limit_s, DeadlineExceeded.code, reports_root, limit_name)


def _kept(
    scene: Scene,
    text: str,
    limit_s: float | None,
    code: int,
    reports_root: str,
    passed_limit: str = "",
) -> SandboxFailed:
    report = FailureReport(
        sandbox_id=scene.sandbox_id,
        phase=scene.phase,
        error=text,
        elapsed_s=scene.elapsed_s,
        deadline_s=limit_s,
        passed_limit=passed_limit,
        vm_exit=scene.vm_exit,
        console_tail=scene.console_tail,
    )
    report.save(reports_root)
    return SandboxFailed(report, code)
