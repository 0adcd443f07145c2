"""Listens for the guest's OOM kills and tells of those that may be believed.

The guest can name anything: only an exact id of a container of this sandbox counts, once in its
life. containerd looks ids up node-wide, so a forged one would mark another pod's container.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Protocol

import trio

from agent_proto.errors import AgentError, AgentStatus, AgentUnreachable
from ttrpc import Code

if TYPE_CHECKING:
    from shimv2.container import Container

FIRST_PAUSE_S: Final = 0.1
LONGEST_PAUSE_S: Final = 5.0


class SaysOom(Protocol):
    """The agent's long poll."""

    async def get_oom_event(self) -> str: ...


async def watch_oom(
    agent: SaysOom, find: Callable[[str], Container | None], tell: Callable[[Container], None]
) -> None:
    """Call `tell` for each container that is hit. Returns when the agent is gone or never tells."""
    pause_s = FIRST_PAUSE_S
    while True:
        try:
            container = find(await agent.get_oom_event())
        except AgentUnreachable:
            return
        except AgentStatus as exc:
            if exc.code == Code.UNIMPLEMENTED:
                return
            container = None
        except AgentError:
            container = None
        if container is not None and not container.has_oom:
            container.has_oom = True
            tell(container)
            pause_s = FIRST_PAUSE_S
            continue
        # An error, or an answer that says nothing new: a hostile guest could go on for ever.
        await trio.sleep(pause_s)
        pause_s = min(pause_s * 2, LONGEST_PAUSE_S)
