"""A process's standard streams: what containerd named them, opened, and how they end.

`parse_stdio` turns the request's fields into a plan and refuses what nobody can serve; `Stdio.open`
takes the files. Relaying between these and the agent is `relay`'s work; loggers are `logger`'s.

Rules that tests hold (Source: containerd docs/runtime-v2.md "IO"; runc's and Kata's shims):
- no scheme is a fifo; all empty is no stdio at all; any other scheme is refused by name.
- output fifos are opened for reading too: they never block the open, and survive their reader.
- a stdin fifo has its first writer waited for; a writer of ours keeps it open until CloseIO.
- every descriptor is closed exactly once, so that the reader sees the end.
"""

from __future__ import annotations

import os
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, Protocol
from urllib.parse import parse_qsl, unquote, urlsplit

from shimv2.errors import FailedPrecondition, InvalidArgument, NotFound
from shimv2.stdio_fifo import FileSink, Sink, StdinFifo, open_output

LOG_FILE_MODE: Final = 0o640


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggerCommand:
    """A `binary://` logger: its program and its arguments, in the order of the query."""

    path: Path
    arguments: tuple[str, ...]
    must_report_ready: bool = (
        False  # binary-v2: the end of the ready pipe without a byte is failure
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class StdioPlan:
    """What a process's streams lead to. Empty strings in the request are None here."""

    stdin: Path | None = None
    stdout: Path | None = None
    stderr: Path | None = None
    log_file: Path | None = None
    logger: LoggerCommand | None = None
    terminal: bool = False
    # As the client wrote them; State repeats them.
    stdin_url: str = ""
    stdout_url: str = ""
    stderr_url: str = ""


def parse_stdio(stdin: str, stdout: str, stderr: str, *, terminal: bool) -> StdioPlan:
    """Understand the three fields of Create and Exec.

    Raises:
        InvalidArgument: naming the stream, the scheme and those that exist.
    """
    plan = StdioPlan(
        stdin=_fifo_path(stdin, "stdin"),
        terminal=terminal,
        stdin_url=stdin,
        stdout_url=stdout,
        stderr_url=stderr,
    )
    url = urlsplit(stdout or stderr)
    if url.scheme == "file":
        return replace(plan, log_file=_absolute(unquote(url.path), "stdout"))
    if url.scheme in ("binary", "binary-v2"):
        logger = LoggerCommand(
            path=_absolute(unquote(url.path), "stdout"),
            arguments=_logger_arguments(url.query),
            must_report_ready=url.scheme == "binary-v2",
        )
        return replace(plan, logger=logger)
    return replace(plan, stdout=_fifo_path(stdout, "stdout"), stderr=_fifo_path(stderr, "stderr"))


def _fifo_path(value: str, name: str) -> Path | None:
    if not value:
        return None
    url = urlsplit(value)
    if url.scheme == "fifo":
        return _absolute(unquote(url.path), name)
    if url.scheme:
        raise InvalidArgument(
            f"{name} {value!r}: unknown stdio scheme {url.scheme!r}; "
            "use a fifo's path, binary:// or file://"
        )
    return _absolute(value, name)


def _absolute(path: str, name: str) -> Path:
    if not path.startswith("/") or "\0" in path:
        raise InvalidArgument(f"{name} {path!r} is not an absolute path")
    return Path(path)


def _logger_arguments(query: str) -> tuple[str, ...]:
    """Each key, then its first value. Source: containerd pkg/process NewBinaryCmd."""
    arguments: dict[str, str] = {}
    for key, value in parse_qsl(query, keep_blank_values=True):
        arguments.setdefault(key, value)
    return tuple(part for pair in arguments.items() for part in pair)


class Logger(Protocol):
    """A started logger: two pipes to write to, and its end."""

    @property
    def stdout(self) -> Sink: ...
    @property
    def stderr(self) -> Sink: ...

    async def stop(self) -> None: ...


@dataclass(slots=True)
class Stdio:
    """Open streams of one process. Owned by its relay; `aclose` may be called at any time."""

    stdin: StdinFifo | None = None
    stdout: Sink | None = None
    stderr: Sink | None = None
    logger: Logger | None = None
    _is_closed: bool = field(default=False)

    def close_outputs(self) -> None:
        """Let the readers see the end. Idempotent."""
        for sink in {id(s): s for s in (self.stdout, self.stderr) if s is not None}.values():
            sink.close()

    def close(self) -> None:
        """Close all files; a logger is left to `aclose`. Idempotent."""
        if self.stdin is not None:
            self.stdin.close()
        self.close_outputs()

    async def aclose(self) -> None:
        """Close all files and end the logger within its bound. Idempotent."""
        self.close()
        logger, self.logger = self.logger, None
        if logger is not None:
            await logger.stop()


class StartsLogger(Protocol):
    """How a `binary://` logger is started; raises a ShimError when it can't be."""

    async def __call__(self, command: LoggerCommand) -> Logger: ...


async def open_stdio(plan: StdioPlan, start_logger: StartsLogger) -> Stdio:
    """Open everything the plan names. On failure or cancellation nothing stays open.

    Raises:
        NotFound: a fifo that isn't there.
        InvalidArgument: a path of a kind that can't be a stream.
    """
    stdio = Stdio()
    async with AsyncExitStack() as stack:
        stack.push_async_callback(stdio.aclose)
        if plan.stdin is not None:
            stdio.stdin = StdinFifo(plan.stdin)
        if plan.logger is not None:
            stdio.logger = await start_logger(plan.logger)
            stdio.stdout = stdio.logger.stdout
            stdio.stderr = stdio.logger.stderr
        elif plan.log_file is not None:
            stdio.stdout = stdio.stderr = _open_log_file(plan.log_file)
        else:
            stdio.stdout = open_output(plan.stdout, "stdout") if plan.stdout else None
            if plan.stderr and plan.stderr == plan.stdout:
                stdio.stderr = stdio.stdout
            elif plan.stderr and not plan.terminal:
                stdio.stderr = open_output(plan.stderr, "stderr")
        stack.pop_all()
    return stdio


def _open_log_file(path: Path) -> FileSink:
    try:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
        return FileSink(os.open(path, flags, LOG_FILE_MODE))
    except FileNotFoundError as exc:
        raise NotFound(f"log file {path}: {exc.strerror}") from exc
    except OSError as exc:
        raise FailedPrecondition(f"log file {path}: {exc.strerror}") from exc
