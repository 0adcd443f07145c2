"""A namespace held by a process for hooks that want a pid."""

from __future__ import annotations

import os

import pytest
import trio

from netns.holder import Holder
from netns.network import PodNetwork
from tests.harness.own_process import open_descriptors
from tests.netns.pod import NEEDS_TAPS, OUTSIDE, POD
from tests.netns.pod import Holder as Outside
from tests.netns.test_tap import links

pytestmark = NEEDS_TAPS


async def test_held_namespace_is_new_and_has_a_loopback_that_is_up():
    holder = await Holder.start(lambda pid: None)
    assert os.stat(holder.path).st_ino != os.stat("/proc/self/ns/net").st_ino
    assert list(links(holder.path)) == ["lo"]
    assert "UP" in links(holder.path)["lo"]
    await holder.aclose()
    await holder.aclose()


async def test_pid_is_recorded_before_there_is_a_namespace():
    seen: list[tuple[int, bool]] = []
    own = os.stat("/proc/self/ns/net").st_ino

    def record(pid: int) -> None:
        seen.append((pid, os.stat(f"/proc/{pid}/ns/net").st_ino == own))

    holder = await Holder.start(record)
    assert seen == [(holder.pid, True)]
    await holder.aclose()


async def test_failing_record_and_cancellation_leave_no_process():
    fds = open_descriptors()

    def full(_: int) -> None:
        raise OSError(28, "no space")

    with pytest.raises(OSError, match="no space"):
        await Holder.start(full)
    with trio.CancelScope() as scope:
        scope.cancel()
        await Holder.start(lambda pid: None)
    assert open_descriptors() <= fds


async def test_network_made_by_a_hook_is_found_and_outlives_the_holder(outside: Outside):
    holder = await Holder.start(lambda pid: None)
    # What a hook does: it knows nothing but the pid.
    outside.run(
        f"nsenter --net=/proc/{holder.pid}/ns/net sh -ec '{POD.format(outside=outside.pid)}'"
    )
    outside.run(OUTSIDE)
    network = await PodNetwork.open(holder.path, lambda record: None)
    await holder.aclose()
    await network.wire()
    assert [each.name for each in network.layout.endpoints] == ["eth0"]
    assert await network.aclose() == []
