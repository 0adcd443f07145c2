"""A shim that serves goes on serving while it gives back what takes its time."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
import trio.testing

from shimv2 import host_process, host_resources
from shimv2.journal import Journal
from shimv2.live_undo import remove_state_live, undo_live
from shimv2.state_dir import StateDir
from shimv2.undo import KILL_DEADLINE_S
from tests.shimv2.shim_bench import ShimBench


def opened(directory: Path) -> Journal:
    return Journal.open(str(directory / "journal"), namespace="n", sandbox_id="s")


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "100"]) as made:
        yield made
        made.kill()


async def test_all_is_undone_newest_first_and_what_is_deferred_stays(
    tmp_path: Path, child: subprocess.Popen[bytes]
) -> None:
    start = host_process.start_time_ticks(child.pid)
    assert start is not None
    book = opened(tmp_path)
    book.take("directory", path=str(tmp_path / "d"))
    book.take("file", path=str(tmp_path / "d" / "f"))
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "f").write_text("x")
    book.take("poststop", path=str(tmp_path / "poststop-c1.json"))
    book.take("process", name="sleep", pid=child.pid, start_time=start)
    with trio.fail_after(10):
        assert await undo_live(book) == []
        assert await undo_live(book) == []
    assert child.wait() == -9
    assert [entry.kind for entry in book.held] == ["poststop"]
    assert os.listdir(tmp_path) == ["journal"]


async def test_process_that_does_not_die_holds_up_nobody_and_stays_in_the_journal(
    tmp_path: Path,
    child: subprocess.Popen[bytes],
    monkeypatch: pytest.MonkeyPatch,
    autojump_clock: trio.testing.MockClock,
) -> None:
    monkeypatch.setattr(host_process, "kill", lambda pid, start: os.pidfd_open(child.pid))
    book = opened(tmp_path)
    book.take("directory", path=str(tmp_path / "d"))
    (tmp_path / "d").mkdir()
    book.take("process", name="qemu", pid=child.pid, start_time=1)
    others: list[float] = []

    async def other() -> None:
        await trio.sleep(KILL_DEADLINE_S / 2)
        others.append(trio.current_time())

    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        (problem,) = await undo_live(book)
    assert others == [began + KILL_DEADLINE_S / 2]
    assert f"qemu (pid {child.pid}) survived SIGKILL for 2 s" in problem
    assert [entry.kind for entry in book.held] == ["process"]
    assert not (tmp_path / "d").exists()


async def test_state_of_an_earlier_sandbox_stays_until_its_process_is_dead(
    tmp_path: Path,
    child: subprocess.Popen[bytes],
    monkeypatch: pytest.MonkeyPatch,
    autojump_clock: trio.testing.MockClock,
) -> None:
    start = host_process.start_time_ticks(child.pid)
    assert start is not None
    state_dir = StateDir("k", str(tmp_path))
    volume = tmp_path / "k" / "f"
    assert str(volume.parent) == state_dir.path
    assert await remove_state_live(state_dir) == []
    state_dir.create()
    book = Journal.open(state_dir.journal)
    book.take("file", path=str(volume))
    book.take("process", name="qemu", pid=child.pid, start_time=start)
    book.close()
    volume.write_text("x")
    with monkeypatch.context() as patched:
        patched.setattr(host_process, "kill", lambda pid, start: os.pidfd_open(child.pid))
        (problem,) = await remove_state_live(state_dir)
    assert "survived SIGKILL" in problem
    assert os.listdir(state_dir.path) == ["journal"]
    child.kill()
    child.wait()
    assert await remove_state_live(state_dir) == []
    assert not state_dir.exists()


async def test_undo_that_fails_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(pid: int, start: int) -> int:
        raise PermissionError(1, "not allowed")

    monkeypatch.setattr(host_process, "kill", broken)
    book = opened(tmp_path)
    book.take("file", path=str(tmp_path / "f"))
    (tmp_path / "f").write_text("x")
    book.take("process", name="qemu", pid=os.getpid(), start_time=1)
    (problem,) = await undo_live(book)
    assert "not allowed" in problem
    assert not (tmp_path / "f").exists()


async def test_hooks_that_end_while_all_is_given_back_leave_the_journal_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NoHooks:
        async def stopped(self, container_id: str) -> None:
            pass

        async def release_holder(self) -> None:
            pass

    bench = ShimBench(tmp_path)
    state, host = bench.state_dir, bench.service._sandbox._host
    state.create()
    host._journal = book = opened(state.directory)
    host._hooks = NoHooks()  # type: ignore[assignment]
    book.take("file", path=str(state.directory / "f"))

    async def undo_slowly(journal: Journal) -> list[str]:
        await host.run_poststop("c1")
        return await undo_live(journal)

    monkeypatch.setattr(host_resources, "undo_live", undo_slowly)
    await host.give_back()
    assert book.held == ()
    assert not state.exists()
