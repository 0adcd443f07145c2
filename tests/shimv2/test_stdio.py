"""Standard streams: fifos, files, loggers, and every rule about who waits for whom."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

import pytest
import trio
import trio.testing

from shimv2.errors import DeadlineExceeded, FailedPrecondition, InvalidArgument, NotFound
from shimv2.logger import start_logger
from shimv2.pb import containerd_task_pb2 as pb
from shimv2.stdio import LoggerCommand, open_stdio, parse_stdio
from shimv2.stdio_fifo import CLOSED_INPUT_QUIET_S, PipeSink, StdinFifo, open_output
from tests.fakes.fake_process import CAT, SLEEP, Exits, Program
from tests.harness.own_process import open_descriptors
from tests.shimv2.shim_bench import ShimBench, refusal
from ttrpc import Code


async def read_to_end(descriptor: int) -> bytes:
    data = b""
    while True:
        await trio.lowlevel.wait_readable(descriptor)
        try:
            chunk = os.read(descriptor, 1 << 16)
        except BlockingIOError:
            continue
        if not chunk:
            os.close(descriptor)
            return data
        data += chunk


def reader_of(path: str) -> int:
    return os.open(path, os.O_RDONLY | os.O_NONBLOCK)


# --- Understanding the request ---


def test_no_stdio_at_all_is_a_plan() -> None:
    plan = parse_stdio("", "", "", terminal=False)
    assert (plan.stdin, plan.stdout, plan.stderr, plan.logger, plan.log_file) == (None,) * 5


@pytest.mark.parametrize("url", ["http://x/y", "ttrpc+unix:///s?streaming_id=a", "npipe://x"])
def test_an_unknown_scheme_is_refused_by_name(url: str) -> None:
    scheme = re.escape(url.split(":", maxsplit=1)[0])
    with pytest.raises(InvalidArgument, match=f"unknown stdio scheme '{scheme}'"):
        parse_stdio("", url, "", terminal=False)


def test_a_relative_fifo_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="absolute"):
        parse_stdio("in", "", "", terminal=False)


def test_logger_arguments_are_keys_and_first_values_in_order() -> None:
    plan = parse_stdio("", "binary:///bin/log?a=1&b&c=x%20y&a=2", "", terminal=False)
    assert plan.logger == LoggerCommand(
        path=Path("/bin/log"), arguments=("a", "1", "b", "", "c", "x y")
    )


def test_state_repeats_what_the_client_wrote() -> None:
    plan = parse_stdio("/in", "file:///log", "", terminal=True)
    assert (plan.stdin_url, plan.stdout_url) == ("/in", "file:///log")


# --- Opening ---


async def no_logger(command: LoggerCommand) -> None:
    raise AssertionError


async def test_output_fifos_open_without_a_reader(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "out")
    with trio.fail_after(30):
        stdio = await open_stdio(
            parse_stdio("", str(tmp_path / "out"), "", terminal=False),
            no_logger,  # type: ignore[arg-type]
        )
        assert stdio.stdout is not None
        await stdio.stdout.write(b"kept for a later reader")
    descriptor = reader_of(str(tmp_path / "out"))
    stdio.close()
    assert await read_to_end(descriptor) == b"kept for a later reader"


async def test_a_missing_fifo_is_not_found_and_leaves_nothing_open(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "in")
    before = open_descriptors()
    plan = parse_stdio(str(tmp_path / "in"), str(tmp_path / "gone"), "", terminal=False)
    with pytest.raises(NotFound, match=r"stdout .*gone does not exist"):
        await open_stdio(plan, no_logger)  # type: ignore[arg-type]
    assert open_descriptors() <= before


def test_a_directory_is_no_stream(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="directory"):
        open_output(tmp_path, "stdout")


async def test_a_log_file_gets_both_streams_and_its_directories(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "log"
    stdio = await open_stdio(parse_stdio("", f"file://{path}", "", terminal=False), no_logger)  # type: ignore[arg-type]
    assert stdio.stdout is stdio.stderr is not None
    await stdio.stdout.write(b"one\n")
    await stdio.stderr.write(b"two\n")
    stdio.close()
    stdio.close()
    assert path.read_bytes() == b"one\ntwo\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


# --- The fifo's rules ---


async def test_stdin_waits_for_its_first_writer(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "in")
    stdin = StdinFifo(tmp_path / "in")
    got: list[bytes] = []

    async def read() -> None:
        got.append(await stdin.read())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        await trio.testing.wait_all_tasks_blocked(0.02)
        assert not got
        writer = os.open(tmp_path / "in", os.O_WRONLY | os.O_NONBLOCK)
        os.write(writer, b"hello")
    assert got == [b"hello"]
    os.close(writer)
    stdin.close()


async def test_a_writer_that_leaves_is_no_end_before_close_io(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "in")
    stdin = StdinFifo(tmp_path / "in")
    writer = os.open(tmp_path / "in", os.O_WRONLY | os.O_NONBLOCK)
    os.write(writer, b"1")
    os.close(writer)
    assert await stdin.read() == b"1"
    with trio.move_on_after(0.05) as scope:
        await stdin.read()
    assert scope.cancelled_caught
    writer = os.open(tmp_path / "in", os.O_WRONLY | os.O_NONBLOCK)
    os.write(writer, b"2")
    stdin.finish()
    stdin.finish()
    assert await stdin.read() == b"2"
    os.close(writer)
    assert await stdin.read() == b""
    stdin.close()


async def test_after_close_io_a_client_that_keeps_its_end_is_taken_to_be_done(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    os.mkfifo(tmp_path / "in")
    stdin = StdinFifo(tmp_path / "in")
    writer = os.open(tmp_path / "in", os.O_WRONLY | os.O_NONBLOCK)
    os.write(writer, b"last")
    stdin.finish()
    assert await stdin.read() == b"last"
    before = trio.current_time()
    assert await stdin.read() == b""
    assert trio.current_time() - before == pytest.approx(CLOSED_INPUT_QUIET_S)
    os.close(writer)
    stdin.close()


async def test_closing_wakes_reader_and_writer(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "in")
    os.mkfifo(tmp_path / "out")
    stdin = StdinFifo(tmp_path / "in")
    sink = open_output(tmp_path / "out", "stdout")

    async def write() -> None:
        with pytest.raises(trio.ClosedResourceError):
            await sink.write(b"x" * (4 << 20))

    async def read() -> None:
        assert await stdin.read() == b""

    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(write)
            nursery.start_soon(read)
            await trio.testing.wait_all_tasks_blocked(0.02)
            sink.close()
            stdin.close()


async def test_bytes_after_the_last_reader_are_dropped() -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    sink = PipeSink(writer)
    os.close(reader)
    await sink.write(b"x")
    await sink.write(b"y")
    sink.close()


# --- Loggers ---


def logger_script(tmp_path: Path, body: str) -> LoggerCommand:
    path = tmp_path / "logger.sh"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return LoggerCommand(path=path, arguments=("key", "value"))


async def test_a_logger_gets_streams_arguments_and_two_variables(tmp_path: Path) -> None:
    out = tmp_path / "got"
    command = logger_script(
        tmp_path,
        f"exec 5>&-; env | grep -v -e ^PWD -e ^_ -e ^SHLVL -e ^OLDPWD | sort >{out};"
        f' echo "$@" >>{out}; cat <&3 >>{out}; cat <&4 >>{out}',
    )
    logger = await start_logger(
        command, container_id="c1", namespace="ns", record=lambda record: None
    )
    await logger.stdout.write(b"out\n")
    await logger.stderr.write(b"err\n")
    with trio.fail_after(30):
        await logger.stop()
    assert out.read_text().split() == [
        "CONTAINER_ID=c1", "CONTAINER_NAMESPACE=ns", "key", "value", "out", "err",
    ]  # fmt: skip


async def test_a_missing_logger_is_named(tmp_path: Path) -> None:
    command = LoggerCommand(path=tmp_path / "gone", arguments=())
    with pytest.raises(FailedPrecondition, match="gone"):
        await start_logger(command, container_id="c", namespace="n", record=lambda record: None)


async def test_a_logger_that_is_never_ready_fails_within_its_deadline(tmp_path: Path) -> None:
    command = logger_script(tmp_path, "exec sleep 1000")
    with pytest.raises(DeadlineExceeded, match="descriptor 5"):
        await start_logger(
            command,
            container_id="c",
            namespace="n",
            record=lambda record: None,
            ready_deadline_s=0.1,
        )


async def test_a_logger_that_does_not_leave_is_told_then_killed(tmp_path: Path) -> None:
    command = logger_script(tmp_path, "trap '' TERM; exec 5>&-; while :; do sleep 0.1; done")
    logger = await start_logger(
        command, container_id="c", namespace="n", record=lambda record: None
    )
    with trio.move_on_after(0.2):
        await logger.stop()
    assert logger._child.exit is not None


async def test_a_logger_that_flushes_outlives_the_vm(tmp_path: Path) -> None:
    out = tmp_path / "got"
    command = logger_script(
        tmp_path, f"exec 5>&-; cat <&3 >{out}; sleep 1; echo last words >>{out}"
    )
    async with ShimBench(tmp_path).running() as shim:
        shim.agent.program(Program(stdout=b"first\n"))
        await shim.create(stdout=f"binary://{command.path}")
        await shim.start()
        await shim.wait()
        with trio.fail_after(30):
            await shim.delete()
        assert out.read_text() == "first\nlast words\n"


# --- The whole way ---


async def test_output_arrives_complete_and_the_reader_sees_its_end(tmp_path: Path) -> None:
    async with ShimBench(tmp_path).running() as shim:
        shim.agent.program(Program(stdout=b"o" * 1_000_000, stderr=b"e" * 10))
        out, err = shim.fifo("out"), shim.fifo("err")
        readers = reader_of(out), reader_of(err)
        await shim.create(stdout=out, stderr=err)
        await shim.start()
        assert await read_to_end(readers[0]) == b"o" * 1_000_000
        assert await read_to_end(readers[1]) == b"e" * 10
        await shim.delete()


async def test_input_is_delivered_and_its_end_follows_it(tmp_path: Path) -> None:
    async with ShimBench(tmp_path).running() as shim:
        shim.agent.program(CAT)
        stdin, out = shim.fifo("in"), shim.fifo("out")
        reader = reader_of(out)
        await shim.create(stdin=stdin, stdout=out)
        await shim.start()
        writer = os.open(stdin, os.O_WRONLY | os.O_NONBLOCK)
        os.write(writer, b"hello")
        await shim.call("CloseIO", pb.CloseIORequest(id="c1", stdin=True))
        os.close(writer)
        assert await read_to_end(reader) == b"hello"
        assert (await shim.wait()).exit_status == 0


async def test_close_io_before_start_is_kept(tmp_path: Path) -> None:
    async with ShimBench(tmp_path).running() as shim:
        shim.agent.program(CAT)
        stdin = shim.fifo("in")
        await shim.create(stdin=stdin)
        await shim.call("CloseIO", pb.CloseIORequest(id="c1", stdin=True))
        await shim.call("CloseIO", pb.CloseIORequest(id="c1", stdin=True))
        await shim.start()
        with trio.fail_after(30):
            assert (await shim.wait()).exit_status == 0


async def test_without_stdin_a_process_reads_its_end_and_close_io_does_nothing(
    tmp_path: Path,
) -> None:
    async with ShimBench(tmp_path).running() as shim:
        shim.agent.program(CAT)
        await shim.run()
        await shim.wait()
        await shim.call("CloseIO", pb.CloseIORequest(id="c1", stdin=True))


async def test_a_stalled_reader_holds_up_neither_kill_nor_wait_nor_delete(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with ShimBench(tmp_path).running() as shim:
        shim.agent.program(Program(stdout=b"x" * (8 << 20), exits=Exits.NEVER))
        out = shim.fifo("out")
        reader = reader_of(out)
        await shim.create(stdout=out)
        await shim.start()
        with trio.fail_after(10):
            await shim.kill()
            assert (await shim.wait()).exit_status == 137
        before = trio.current_time()
        await shim.delete()
        assert trio.current_time() - before < 11
        os.close(reader)


async def test_a_slow_reader_gets_everything_in_order(tmp_path: Path) -> None:
    data = b"".join(b"%09d\n" % number for number in range(300_000))
    async with ShimBench(tmp_path).running() as shim:
        shim.agent.program(Program(stdout=data))
        out = shim.fifo("out")
        reader = reader_of(out)
        await shim.create(stdout=out)
        await shim.start()
        assert (await shim.wait()).exit_status == 0
        await trio.sleep(0.05)
        assert await read_to_end(reader) == data


async def test_an_exec_with_a_fifo_that_is_gone_fails_at_start(tmp_path: Path) -> None:
    async with ShimBench(tmp_path).running() as shim:
        shim.agent.program(SLEEP)
        await shim.run()
        await shim.exec("e1", stdout=str(tmp_path / "gone"))
        error = await refusal(shim.start(exec_id="e1"))
        assert error.code == Code.NOT_FOUND
        await shim.delete(exec_id="e1")


async def test_a_create_with_an_unknown_scheme_takes_nothing(tmp_path: Path) -> None:
    async with ShimBench(tmp_path).running() as shim:
        error = await refusal(shim.create(stdout="gopher://x"))
        assert error.code == Code.INVALID_ARGUMENT
        assert not shim.hypervisor.machines
