"""Taps made in a network namespace by a helper process, looked at from inside of it."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
from pathlib import Path

import pytest
import trio

from netns.errors import HelperLost, KernelRefused, NamespaceGone
from netns.holder import Holder
from netns.inside import Outcome, WorkFailed, run_inside, run_inside_blocking
from netns.tap import create_tap, remove_tap
from tests.harness.own_process import open_descriptors
from tests.netns.pod import NEEDS_TAPS

HERE = Path("/proc/self/ns/net")


pytestmark = NEEDS_TAPS


def links(namespace: Path) -> dict[str, str]:
    """Name and flags of the links inside of a namespace."""
    shown = subprocess.run(
        ["nsenter", f"--net={namespace}", "ip", "-o", "link"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    lines = [line.split(": ", 2) for line in shown.splitlines()]
    return {name: rest for _, name, rest in lines}


async def test_tap_appears_in_the_named_namespace_and_is_up(namespace):
    before = os.readlink(HERE)
    (fd,) = await create_tap(namespace, "tap0", mtu=1400)
    try:
        assert "mtu 1400" in links(namespace)["tap0"]
        assert "UP" in links(namespace)["tap0"]
        assert not os.get_inheritable(fd)
        assert os.readlink(HERE) == before
        assert "tap0" not in links(HERE)
    finally:
        os.close(fd)


async def test_descriptor_carries_packets_of_the_link(namespace):
    (fd,) = await create_tap(namespace, "tap0")
    try:
        # Bringing a link up makes the kernel solicit its neighbours, which arrives here.
        with trio.fail_after(30):
            await trio.lowlevel.wait_readable(fd)
        packet = os.read(fd, 65536)
        assert len(packet) > 12 + 14
        assert packet[12:14] == b"\x33\x33"
    finally:
        os.close(fd)


async def test_tap_is_gone_when_its_last_descriptor_is_closed(namespace):
    fds = await create_tap(namespace, "tap0", queues=2)
    os.close(fds[0])
    assert "tap0" in links(namespace)
    os.close(fds[1])
    assert "tap0" not in links(namespace)


async def test_persistent_tap_stays_until_it_is_removed(namespace):
    (fd,) = await create_tap(namespace, "tap0", persistent=True)
    os.close(fd)
    assert "tap0" in links(namespace)
    await remove_tap(namespace, "tap0")
    assert "tap0" not in links(namespace)


async def test_tap_can_be_removed_while_somebody_holds_it(namespace):
    (fd,) = await create_tap(namespace, "tap0")
    try:
        await remove_tap(namespace, "tap0")
        assert "tap0" not in links(namespace)
    finally:
        os.close(fd)


async def test_removing_what_is_not_there_is_fine(namespace):
    await remove_tap(namespace, "tap0")


async def test_taken_name_is_refused_and_the_other_tap_left_alone(namespace):
    (fd,) = await create_tap(namespace, "tap0", persistent=True)
    os.close(fd)
    with pytest.raises(KernelRefused) as caught:
        await create_tap(namespace, "tap0")
    assert "tap0" in str(caught.value)
    assert "tap0" in links(namespace)


async def test_impossible_mtu_leaves_no_tap_and_no_descriptor(namespace):
    before = open_descriptors()
    with pytest.raises(KernelRefused, match="up"):
        await create_tap(namespace, "tap0", queues=3, mtu=1)
    assert "tap0" not in links(namespace)
    assert open_descriptors() <= before


@pytest.mark.parametrize("name", ["", "x" * 16, "tap%d", "a/b", "a b", "täp", "a\0b"])
async def test_name_that_no_link_can_have_is_refused(name):
    with pytest.raises(ValueError, match="cannot name"):
        await create_tap(HERE, name)


async def test_missing_namespace_is_named(tmp_path):
    with pytest.raises(NamespaceGone, match="gone"):
        await create_tap(tmp_path / "gone", "tap0")


async def test_file_that_is_no_namespace_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NamespaceGone, match="file"):
        await create_tap(tmp_path / "file", "tap0")


async def test_cancelled_creation_leaves_nothing(namespace):
    before = open_descriptors()
    with trio.CancelScope() as scope:
        scope.cancel()
        await create_tap(namespace, "tap0")
    assert scope.cancelled_caught
    assert "tap0" not in links(namespace)
    assert open_descriptors() <= before


async def test_helper_that_dies_is_reported_and_reaped():
    def die() -> Outcome:
        os.kill(os.getpid(), signal.SIGKILL)
        return Outcome()

    before = open_descriptors()
    with pytest.raises(HelperLost, match="died"):
        await run_inside(HERE, "die", die)
    assert open_descriptors() <= before


@pytest.mark.parametrize(
    ("module", "call"), [(os, "fork"), (os, "pidfd_open"), (socket, "socketpair")]
)
async def test_helper_that_cannot_be_started_is_reported_and_leaves_nothing(
    monkeypatch, module, call
):
    def refused(*_: object) -> None:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(module, call, refused)
    before = open_descriptors()
    with pytest.raises(HelperLost, match=r"work: .* could not be started: Resource temporarily"):
        await run_inside(HERE, "work", Outcome)
    with pytest.raises(HelperLost, match="could not be started"):
        run_inside_blocking(HERE, "work", Outcome)
    with pytest.raises(HelperLost, match="could not be started"):
        await Holder.start(lambda pid: None)
    assert open_descriptors() <= before


async def test_helper_that_hangs_is_killed_at_its_deadline():
    def hang() -> Outcome:
        signal.pause()
        return Outcome()

    before = open_descriptors()
    with pytest.raises(HelperLost, match="no answer"):
        await run_inside(HERE, "hang", hang, timeout_s=0.05)
    assert open_descriptors() <= before


async def test_failed_work_names_its_operation():
    def fail() -> Outcome:
        raise WorkFailed("turn the handle", 5)

    with pytest.raises(KernelRefused, match=r"turn the handle.*EIO"):
        await run_inside(HERE, "fail", fail)
