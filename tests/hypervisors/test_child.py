"""Children as real processes: recorded before they run, gone with us, clean of our files."""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import sys
import time
from pathlib import Path

import pytest
import trio

from hypervisors.child import ChildExit, ChildRecord, spawn, start_time_of
from hypervisors.errors import SpawnFailed
from tests.harness.own_process import open_descriptors

REPOSITORY = Path(__file__).parents[2]


async def run(argv, **options):
    """Run a shell script to its end; returns the ended child."""
    records: list[ChildRecord] = []
    child = await spawn("test", argv, record=records.append, **options)
    with trio.fail_after(20):
        await child.run()
    await child.aclose()
    assert [record.pid for record in records] == [child.pid]
    return child


def shell(script):
    return ["/bin/sh", "-c", script]


@pytest.mark.parametrize(
    ("script", "ending"),
    [
        ("exit 0", ChildExit(code=0, signal=None)),
        ("exit 41", ChildExit(code=41, signal=None)),
        ("kill -SEGV $$", ChildExit(code=None, signal=signal.SIGSEGV)),
    ],
)
async def test_exit_code_and_signal_are_told_apart(script, ending):
    assert (await run(shell(script))).exit == ending


async def test_child_holds_only_the_listed_descriptors():
    read_end, write_end = os.pipe()
    try:
        child = await run(shell("exec ls /proc/self/fd >&2"), pass_fds={7: read_end, 3: write_end})
    finally:
        os.close(read_end)
        os.close(write_end)
    # 4 is the directory that ls itself reads.
    assert sorted(map(int, child.stderr_tail)) == [0, 1, 2, 3, 4, 7]


async def test_descriptors_may_swap_numbers():
    pipes = [os.pipe() for _ in range(2)]
    (first, first_write), (second, second_write) = pipes
    os.write(first_write, b"first\n")
    os.write(second_write, b"second\n")
    try:
        script = f"import os; os.write(2, os.read({second}, 9) + os.read({first}, 9))"
        swapped = {second: first, first: second}
        child = await run([sys.executable, "-c", script], pass_fds=swapped)
    finally:
        for pipe in pipes:
            os.close(pipe[0])
            os.close(pipe[1])
    assert child.stderr_tail == ["first", "second"]


async def test_child_starts_with_default_signals_limits_and_environment():
    script = (
        "exec >&2; ulimit -c; ulimit -n; env; pwd; exec grep -E 'Sig(Blk|Ign)' /proc/self/status"
    )
    limits = {resource.RLIMIT_NOFILE: (99, 99)}
    child = await run(shell(script), rlimits=limits, env={"ONLY": "this"}, cwd="/usr")
    *lines, blocked, ignored = child.stderr_tail
    assert blocked.split() == ["SigBlk:", "0" * 16]
    # GNU make leaves 32 and 33, which are the C library's own and beyond sigaction(2), ignored.
    assert int(ignored.split()[1], 16) & ~(0b11 << 31) == 0
    assert lines[:2] == ["0", "99"]
    assert {"ONLY=this", "PWD=/usr"} <= set(lines[2:])
    assert not any(line.startswith(("HOME=", "USER=")) for line in lines)
    assert lines[-1] == "/usr"


async def test_record_happens_before_the_first_instruction(tmp_path):
    witness = tmp_path / "ran"
    seen = []

    def record(entry):
        assert start_time_of(entry.pid) == entry.start_time
        time.sleep(0.1)
        seen.append(witness.exists())

    child = await spawn("test", shell(f"echo > {witness}"), record=record)
    with trio.fail_after(20):
        await child.run()
    await child.aclose()
    assert seen == [False]
    assert witness.exists()


async def test_refused_record_means_that_the_program_never_ran(tmp_path):
    witness = tmp_path / "ran"
    pids = []

    def record(entry):
        pids.append(entry.pid)
        raise OSError(28, "no space left")

    with pytest.raises(OSError, match="no space left"):
        await spawn("test", shell(f"echo > {witness}"), record=record)
    assert not witness.exists()
    assert not exists(pids[0])


@pytest.mark.parametrize(
    ("argv", "options", "stage", "errno"),
    [
        (["/nowhere/program"], {}, "exec", 2),
        (["/etc/passwd"], {}, "exec", 13),
        (["/bin/true"], {"cwd": "/nowhere"}, "directory", 2),
        (["/bin/true"], {"pass_fds": {3: 987654}}, "descriptors", 9),
    ],
)
async def test_what_failed_before_exec_is_named(argv, options, stage, errno):
    before = open_descriptors()
    with pytest.raises(SpawnFailed) as caught:
        await spawn("test", argv, record=lambda _: None, **options)
    assert (caught.value.stage, caught.value.errno) == (stage, errno)
    assert argv[0] in str(caught.value)
    assert open_descriptors() <= before


async def test_wait_returns_same_exit_to_every_caller():
    child = await spawn("test", shell("read _; exit 5"), record=lambda _: None, stdin=None)
    endings = []

    async def wait():
        endings.append(await child.wait())

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(wait)
        # A waiter that goes away takes nothing with it.
        with trio.move_on_after(0):
            await child.wait()
    await child.aclose()
    assert endings == [ChildExit(code=5, signal=None)] * 3


async def test_stderr_is_drained_and_only_its_tail_kept():
    child = await run(shell("i=0; while [ $i -lt 20000 ]; do echo line $i; i=$((i+1)); done >&2"))
    tail = child.stderr_tail
    assert tail[-1] == "line 19999"
    assert sum(map(len, tail)) <= 8192


async def test_grandchild_that_keeps_stderr_open_does_not_delay_the_exit():
    with trio.fail_after(30):
        child = await run(shell("sleep 1000 & echo $! >&2; exit 3"))
    assert child.exit == ChildExit(code=3, signal=None)
    os.kill(int(child.stderr_tail[0]), signal.SIGKILL)


async def test_stop_escalates_to_a_child_that_ignores_the_request():
    ready_read, ready_write = os.pipe()
    script = "trap '' TERM; echo >&1; while :; do sleep 1; done"
    child = await spawn("test", shell(script), record=lambda _: None, stdout=ready_write)
    os.close(ready_write)
    await trio.lowlevel.wait_readable(ready_read)
    os.close(ready_read)
    with trio.fail_after(30):
        ending = await child.stop(grace_s=0.05)
    await child.aclose()
    assert ending.signal == signal.SIGKILL
    assert not child.send_signal(signal.SIGTERM)


async def test_cancelled_spawn_leaves_no_process_and_no_descriptor():
    before = open_descriptors()
    pids = []
    with trio.CancelScope() as scope:

        def record(entry):
            pids.append(entry.pid)
            scope.cancel()

        await spawn("test", shell("sleep 100"), record=record)
    assert scope.cancelled_caught
    assert not exists(pids[0])
    assert open_descriptors() <= before


async def test_aclose_is_idempotent_and_closes_everything():
    before = open_descriptors()
    child = await spawn("test", shell("sleep 100"), record=lambda _: None)
    await child.aclose()
    await child.aclose()
    assert child.exit == ChildExit(code=None, signal=signal.SIGKILL)
    assert open_descriptors() <= before


async def test_only_the_main_thread_may_spawn():
    async def attempt():
        await spawn("test", ["/bin/true"], record=lambda _: None)

    def in_thread():
        with pytest.raises(RuntimeError):
            trio.run(attempt)

    await trio.to_thread.run_sync(in_thread)


PARENT = """
import os, sys, trio
from hypervisors.child import spawn
from hypervisors.child_exec import Account
def record(entry):
    print(entry.pid, flush=True)
    if sys.argv[1] == "in-record":
        os.kill(os.getpid(), 9)
async def main():
    user = Account(uid=1801519104, gid=1801519104) if sys.argv[1] == "other-user" else None
    argv = ["/bin/sh", "-c", "echo ran; exec sleep 100"]
    await spawn("test", argv, record=record, stdout=1, user=user)
    os.kill(os.getpid(), 9)
trio.run(main)
"""


@pytest.mark.parametrize(
    "when",
    [
        "in-record",
        "running",
        # A change of user clears the death signal; it must have been set again.
        pytest.param(
            "other-user",
            marks=[
                pytest.mark.root,
                pytest.mark.skipif(os.geteuid() != 0, reason="only root changes users"),
            ],
        ),
    ],
)
async def test_child_dies_with_its_parent(when):
    """Both ways the parent can vanish: while the child waits at its gate, and later."""
    read_end, write_end = os.pipe()
    argv = [sys.executable, "-c", PARENT, when]
    env = {"PYTHONPATH": str(REPOSITORY)}
    parent = await spawn("parent", argv, record=lambda _: None, stdout=write_end, env=env)
    os.close(write_end)
    with trio.fail_after(20):
        await parent.run()
        said = b""
        # The pipe ends when the last process that holds it has ended.
        while data := await read(read_end):
            said += data
    os.close(read_end)
    await parent.aclose()
    pid, *rest = said.split()
    assert parent.exit == ChildExit(code=None, signal=signal.SIGKILL)
    assert when != "in-record" or rest == []
    await wait_gone(int(pid))


async def read(fd):
    await trio.lowlevel.wait_readable(fd)
    assert select.select([fd], [], [], 0)[0]
    return os.read(fd, 4096)


async def wait_gone(pid):
    """A process closes its files before it has ended; this waits for the end."""
    with contextlib.suppress(ProcessLookupError), trio.fail_after(10):
        pidfd = os.pidfd_open(pid)
        await trio.lowlevel.wait_readable(pidfd)
        os.close(pidfd)


def exists(pid):
    """Whether the process lives; a dead one whose new parent has not looked yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
