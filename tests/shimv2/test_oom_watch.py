"""OOM kills as a guest may tell them, honestly or not."""

from __future__ import annotations

import trio
import trio.testing

from agent_proto.errors import AgentMisbehaved, AgentStatus, AgentUnreachable
from shimv2.oom_watch import LONGEST_PAUSE_S, watch_oom
from ttrpc import Code


class Container:
    def __init__(self) -> None:
        self.has_oom = False


class Guest:
    """Says what the test lets it say, then is gone."""

    def __init__(self, *words: str | Exception) -> None:
        self.words = list(words)
        self.asked = 0

    async def get_oom_event(self) -> str:
        await trio.lowlevel.checkpoint()
        self.asked += 1
        if not self.words:
            raise AgentUnreachable("GetOOMEvent", "gone")
        word = self.words.pop(0)
        if isinstance(word, Exception):
            raise word
        return word


async def heard(guest: Guest, *names: str) -> list[str]:
    containers = {name: Container() for name in names}
    told: list[str] = []

    def tell(container: Container) -> None:
        told.append(next(name for name, each in containers.items() if each is container))

    await watch_oom(guest, containers.get, tell)  # type: ignore[arg-type]
    return told


async def test_each_container_is_told_of_once(autojump_clock: trio.testing.MockClock) -> None:
    assert await heard(Guest("a", "b", "a", "b"), "a", "b") == ["a", "b"]


async def test_a_prefix_or_another_pods_id_is_not_believed(
    autojump_clock: trio.testing.MockClock,
) -> None:
    assert await heard(Guest("contain", "other", ""), "container") == []


async def test_errors_are_asked_again_at_growing_intervals(
    autojump_clock: trio.testing.MockClock,
) -> None:
    error = AgentMisbehaved("GetOOMEvent", "undecodable")
    started = trio.current_time()
    assert await heard(Guest(*[error] * 10, "a"), "a") == ["a"]
    assert trio.current_time() - started > 2 * LONGEST_PAUSE_S


async def test_an_agent_without_such_events_is_not_asked_again() -> None:
    guest = Guest(AgentStatus(Code.UNIMPLEMENTED, "no", "GetOOMEvent"), "a")
    assert await heard(guest, "a") == []
    assert guest.asked == 1
