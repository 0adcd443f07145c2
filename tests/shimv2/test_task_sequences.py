"""Any requests in any order, also at once: no call hangs, every answer is one the table knows, the
events keep their order, and in the end nothing is left."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import trio
import trio.testing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shimv2.pb import containerd_task_pb2 as pb
from tests.fakes.fake_process import CAT, SLEEP, Program
from tests.shimv2.shim_bench import ShimBench, pod_annotations, spec
from ttrpc import Code, RemoteStatus

POD, MEMBERS, EXECS = "p1", ("a", "b"), ("", "e1", "e2")
CALL_DEADLINE_S = 30.0
EXPECTED = {
    Code.NOT_FOUND,
    Code.FAILED_PRECONDITION,
    Code.ALREADY_EXISTS,
    Code.UNAVAILABLE,  # after the VM died
}
containers = st.sampled_from((POD, *MEMBERS))
calls = st.one_of(
    st.tuples(st.just("create"), containers),
    st.tuples(st.sampled_from(["start", "delete", "wait", "state"]), containers,
              st.sampled_from(EXECS)),
    st.tuples(st.just("kill"), containers, st.sampled_from(EXECS), st.sampled_from([9, 15])),
    st.tuples(st.just("exec"), containers, st.sampled_from(EXECS[1:])),
    st.tuples(st.sampled_from(["pause", "resume", "shutdown"]), containers),
    st.tuples(st.just("die")),
    st.tuples(st.just("breathe")),
)  # fmt: skip
programs = st.sampled_from([SLEEP, CAT, Program(exit_status=3), Program(stdout=b"x" * 9)])


async def perform(shim: ShimBench, call: tuple[Any, ...]) -> None:
    name, *rest = call
    container = rest[0] if rest else ""
    match name:
        case "create":
            kind = "sandbox" if container == POD else "container"
            await shim.create(container, spec(annotations=pod_annotations(kind, POD)))
        case "start" | "delete" | "wait" | "state":
            await getattr(shim, name)(container, rest[1])
        case "kill":
            await shim.kill(container, rest[2], rest[1])
        case "exec":
            await shim.exec(rest[1], container)
        case "pause":
            await shim.call("Pause", pb.PauseRequest(id=container))
        case "resume":
            await shim.call("Resume", pb.ResumeRequest(id=container))
        case "shutdown":
            await shim.call("Shutdown", pb.ShutdownRequest(id=container))
        case "die":
            if shim.hypervisor.machines:
                shim.machine.die()
        case _:
            await trio.sleep(1)


async def checked(shim: ShimBench, call: tuple[Any, ...]) -> None:
    with trio.move_on_after(CALL_DEADLINE_S) as scope:
        try:
            await perform(shim, call)
        except RemoteStatus as status:
            if status.code not in EXPECTED:
                raise
    # A Wait may last as long as its process.
    assert call[0] == "wait" or not scope.cancelled_caught, call


async def clean_up(shim: ShimBench) -> None:
    for container in (*MEMBERS, POD):
        for call in (("kill", container, "", 9), ("wait", container, ""),
                     ("delete", container, "")):  # fmt: skip
            await checked(shim, call)
    await checked(shim, ("shutdown", POD))


def check_events(shim: ShimBench) -> None:
    seen: dict[str, list[str]] = {}
    for topic, message in shim.publisher.events:
        exec_id = getattr(message, "exec_id", "") or getattr(message, "id", "")
        key = exec_id if exec_id and exec_id != message.container_id else ""
        seen.setdefault(message.container_id, []).append(f"{topic[7:]}:{key}")
    for events in seen.values():
        for life in lives(events):
            counts = Counter(life)
            assert all(counts[f"{name}:"] <= 1 for name in ("create", "start", "exit", "delete"))
            order = [life.index(f"{name}:") for name in ("create", "start", "exit", "delete")
                     if f"{name}:" in life]  # fmt: skip
            assert order == sorted(order), life
            if "exit:" in life:
                after = life[life.index("exit:") + 1 :]
                assert not [event for event in after if event.startswith("exit:")], life


def lives(events: list[str]) -> list[list[str]]:
    """Cut a container's events where its id was used again."""
    found: list[list[str]] = []
    for event in events:
        if event == "create:" or not found:
            found.append([])
        found[-1].append(event)
    return found


async def play(batches: list[list[tuple[Any, ...]]], program: Program) -> None:
    with tempfile.TemporaryDirectory() as directory:
        async with ShimBench(Path(directory)).running() as shim:
            shim.agent.program(program)
            for batch in batches:
                async with trio.open_nursery() as nursery:
                    for call in batch:
                        nursery.start_soon(checked, shim, call)
            await clean_up(shim)
            assert shim.service.exit_requested.is_set()
            check_events(shim)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(batches=st.lists(st.lists(calls, min_size=1, max_size=4), max_size=8), program=programs)
def test_any_requests_in_any_order_end_in_known_answers_and_leave_nothing(
    batches: list[list[tuple[Any, ...]]], program: Program
) -> None:
    # Most sequences mean something only in a pod that is there.
    batches = [[("create", POD)], [("start", POD, "")], *batches]
    clock = trio.testing.MockClock(autojump_threshold=0.001)
    trio.run(play, batches, program, clock=clock)
