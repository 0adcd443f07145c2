"""Processes of the fake agent: a script of output and exit in place of a program."""

from __future__ import annotations

import signal
from dataclasses import dataclass, field
from enum import Enum

import trio


class Exits(Enum):
    """When a process ends by itself."""

    AT_ONCE = "as soon as it runs"
    AT_EOF = "at the end of its input"
    NEVER = "only by a signal"


@dataclass
class Program:
    """What a process does once it runs."""

    stdout: bytes = b""
    stderr: bytes = b""
    exit_status: int = 0
    exits: Exits = Exits.AT_ONCE
    echoes: bool = False  # writes its input to stdout
    takes: int | None = None  # bytes of input a single write gets rid of; 0: writes hang
    ignores: frozenset[int] = frozenset()  # signals; never SIGKILL


SLEEP = Program(exits=Exits.NEVER)
CAT = Program(exits=Exits.AT_EOF, echoes=True)


class FakePipe:
    """One output stream: readers wait for bytes or for the end."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.ended = False
        self._changed = trio.Event()

    def write(self, data: bytes) -> None:
        self.data += data
        self._wake()

    def end(self) -> None:
        self.ended = True
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def read(self, size: int) -> bytes:
        while not self.data and not self.ended:
            await self._changed.wait()
        chunk = bytes(self.data[:size])
        del self.data[:size]
        return chunk


@dataclass
class FakeProcess:
    """One process, from creation to exit."""

    program: Program
    terminal: bool = False
    stdout: FakePipe = field(default_factory=FakePipe)
    stderr: FakePipe = field(default_factory=FakePipe)
    stdin: bytearray = field(default_factory=bytearray)
    stdin_ended: bool = False
    size: tuple[int, int] | None = None  # rows, columns
    signals: list[int] = field(default_factory=list)
    started: bool = False
    status: int | None = None
    exited: trio.Event = field(default_factory=trio.Event)

    def start(self) -> None:
        self.started = True
        self.stdout.write(self.program.stdout)
        self.stderr.write(self.program.stderr)
        if self.program.exits is Exits.AT_ONCE or (
            self.program.exits is Exits.AT_EOF and self.stdin_ended
        ):
            self.exit(self.program.exit_status)

    def exit(self, status: int) -> None:
        """End with `status`; only the first call counts."""
        if self.status is None:
            self.status = status
            self.stdout.end()
            self.stderr.end()
            self.exited.set()

    def signal(self, number: int) -> None:
        self.signals.append(number)
        if number == signal.SIGKILL or number not in self.program.ignores:
            # Source: kata-containers agent signal.rs: 128 + the signal's number.
            self.exit(128 + number)

    async def write(self, data: bytes) -> int:
        """Take input; no data is its end."""
        if not data:
            self.end_stdin()
            return 0
        if self.program.takes == 0:
            await self.exited.wait()
        taken = data[: self.program.takes]
        self.stdin += taken
        if self.program.echoes:
            self.stdout.write(taken)
        return len(taken)

    def end_stdin(self) -> None:
        self.stdin_ended = True
        if self.started and self.program.exits is Exits.AT_EOF:
            self.exit(self.program.exit_status)
