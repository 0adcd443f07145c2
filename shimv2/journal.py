"""The write-ahead list of what a sandbox holds on this host, and the one way all of it is undone.

One JSON object a line, appended by one write(2) *before* the resource is taken:

    {"journal":1,"boot":"…","namespace":"…","sandbox":"…","shim":812,"shim_start":99123}
    {"take":1,"kind":"directory","path":"/run/kata/…/share"}
    {"take":2,"kind":"process","name":"qemu","pid":815,"start_time":99140,"container":"…"}
    {"release":2}

A killed shim leaves a prefix of such lines, perhaps with a torn last one, and every prefix replays.
The file lies on a tmpfs and must outlive the process, not the machine: no fsync.

`replay` serves Delete, a failed Create, the `delete` program and what an earlier boot left. It
undoes backwards, takes what is gone already for done, and may be run any number of times.
"""

from __future__ import annotations

import json
import os
import time
from typing import TYPE_CHECKING, NamedTuple

from shimv2.errors import FailedPrecondition, ResourceExhausted
from shimv2.host_process import boot_id, start_time_ticks
from shimv2.undo import LIVE, UNDO, Outcome, is_below

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    Undo = Callable[[Mapping[str, str | int]], Outcome]

VERSION = 1
Value = str | int
_NO_SPACE = (28, 122, 30)  # ENOSPC, EDQUOT, EROFS
_OWN = {"mount": "target", "poststop": "path"}
"""Kinds that are only undone below the journal's directory, and the field that says where."""

DEFERRED = ("poststop", "hook")
"""Kinds whose time is not the sandbox's end: hooks may run until the Delete of their container."""

HOOKS_LIMIT_S = 3.0
"""For all poststop hooks of one replay: containerd kills `delete` after 5 s."""

_PROCESSES = ("process", "hook")

_OUTLASTING = (*_PROCESSES, "network", "cgroup")
"""Kinds that stay on the host when the sandbox's directory goes."""

_MAX_BYTES = 16 << 20
"""A journal is a few KiB; this bounds what `delete` reads of a file it did not write."""


class Entry(NamedTuple):
    """One resource: what kind, its fields, and the number by which it is released."""

    number: int
    kind: str
    fields: Mapping[str, Value]

    @property
    def container(self) -> str:
        """The container it belongs to; empty for what the sandbox holds."""
        return str(self.fields.get("container", ""))


class Left(NamedTuple):
    """What replay could not undo, and why."""

    entry: Entry
    problem: str


class Head(NamedTuple):
    """Whose journal it is."""

    boot: str
    namespace: str
    sandbox: str
    shim: int
    shim_start: int


class Journal:
    """The journal of the running sandbox; its one writer is the shim."""

    def __init__(self, path: str, descriptor: int, next_number: int) -> None:
        self.path = path
        self._descriptor = descriptor
        self._next = next_number
        self._held: dict[int, Entry] = {}

    @classmethod
    def open(cls, path: str, *, namespace: str = "", sandbox_id: str = "") -> Journal:
        """Start the journal at `path`, in a directory that exists.

        Raises `FailedPrecondition` if one is there: replay it first. Raises `ResourceExhausted`
        on a full file system.
        """
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            descriptor = os.open(path, flags, 0o600)
        except FileExistsError as error:
            text = (
                f"{path} exists: an earlier shim was not cleaned up; containerd's log says what "
                "was left behind; end the processes that the journal names, then remove "
                f"{os.path.dirname(path)}"
            )
            raise FailedPrecondition(text) from error
        journal = cls(path, descriptor, 1)
        journal._append({
            "journal": VERSION, "boot": boot_id(), "namespace": namespace, "sandbox": sandbox_id,
            "shim": os.getpid(), "shim_start": start_time_ticks(os.getpid()) or 0,
        })  # fmt: skip
        return journal

    @property
    def held(self) -> tuple[Entry, ...]:
        """What is taken and not released, oldest first."""
        return tuple(self._held.values())

    def take(self, kind: str, **fields: Value) -> Entry:
        """Record a resource that is about to be taken; only after this returns, take it.

        `container="…"` marks what goes with one container. Raises `ResourceExhausted` when the line
        could not be written: then nothing was recorded, and nothing may be taken.
        """
        if kind not in UNDO:
            raise KeyError(f"no way to undo a {kind!r} is known")
        entry = Entry(self._next, kind, fields)
        self._append({"take": entry.number, "kind": kind, **fields})
        self._next += 1
        self._held[entry.number] = entry
        return entry

    def release(self, entry: Entry) -> None:
        """Record that a resource is gone. Harmless if repeated; never fails.

        On a full disk the line is lost, which only makes a later replay undo it once more.
        """
        if self._held.pop(entry.number, None) is None:
            return
        try:
            self._append({"release": entry.number})
        except ResourceExhausted:
            return

    def undo(self, *, container: str | None = None) -> list[str]:
        """Undo and release what is held (of one container), newest first; return the problems.

        What is `DEFERRED` stays held.
        """
        return self.undo_some(
            [
                entry
                for entry in self.held
                if entry.kind not in DEFERRED
                and (container is None or entry.container == container)
            ]
        )

    def undo_some(self, entries: Sequence[Entry]) -> list[str]:
        """Undo and release these, the last one first; return the problems."""
        problems: list[str] = []
        for entry in reversed(entries):
            outcome = undo_entry(entry, os.path.dirname(self.path), LIVE.get(entry.kind))
            if outcome is None:
                self.release(entry)
            else:
                problems.append(outcome)
        return problems

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _append(self, line: Mapping[str, Value]) -> None:
        data = json.dumps(line, separators=(",", ":")).encode() + b"\n"
        before = os.fstat(self._descriptor).st_size
        try:
            written = os.write(self._descriptor, data)
        except OSError as error:
            if error.errno in _NO_SPACE:
                raise ResourceExhausted(f"journal {self.path}: {error.strerror}") from error
            raise
        if written != len(data):
            os.ftruncate(self._descriptor, before)
            raise ResourceExhausted(f"journal {self.path}: no space left on device")


def read(path: str) -> tuple[Head | None, list[Entry]]:
    """Return the head and the entries that are still held; unreadable lines count as not written.

    Nothing at `path`, or nothing readable, gives `(None, [])`.
    """
    head: Head | None = None
    held: dict[int, Entry] = {}
    for line in _lines(path):
        number = line.get("take")
        kind = line.get("kind")
        if isinstance(number, int) and isinstance(kind, str):
            fields = {k: v for k, v in line.items() if isinstance(v, str | int)}
            held[number] = Entry(number, kind, fields)
        elif isinstance(released := line.get("release"), int):
            held.pop(released, None)
        elif head is None and line.get("journal") == VERSION:
            head = _head(line)
    return head, list(held.values())


def replay(path: str, *, container: str | None = None) -> list[str]:
    """Undo everything the journal at `path` still holds (of one container); return the problems."""
    return [one.problem for one in replay_all(path, container=container)]


def replay_all(path: str, *, container: str | None = None) -> list[Left]:
    """Do as `replay`; return what could not be undone.

    The journal stays, for whoever removes the directory; an undone entry is undone again by the
    next replay, without harm. Entries from before the last boot of the machine kill no process.
    """
    home = os.path.dirname(path)
    return [
        Left(entry, problem)
        for entry in to_replay(path, container=container)
        if (problem := undo_entry(entry, home)) is not None
    ]


def to_replay(path: str, *, container: str | None = None) -> Iterator[Entry]:
    """Give what a replay has to undo, in its order, as `undo_entry` takes it."""
    head, held = read(path)
    same_boot = head is not None and head.boot == boot_id()
    hooks_give_up_ms = int((time.monotonic() + HOOKS_LIMIT_S) * 1000)
    for entry in reversed(held):
        if container is not None and entry.container != container:
            continue
        if entry.kind in _PROCESSES and not same_boot:
            continue
        if entry.kind == "poststop":
            fields = {**entry.fields, "give_up_ms": hooks_give_up_ms}
            entry = entry._replace(fields=fields)
        yield entry


def outlasts(entry: Entry, home: str) -> bool:
    """Tell whether a held resource would be forgotten if the state directory `home` went.

    While there is one the directory must stay: a later cleanup needs the journal.
    """
    path = str(entry.fields.get("path"))
    if entry.kind == "file":
        return not is_below(home, path)
    if entry.kind == "poststop":
        return is_below(home, path) and os.path.exists(path)  # still to be run
    return entry.kind in _OUTLASTING


def undo_entry(entry: Entry, home: str, live: Undo | None = None) -> str | None:
    """Undo one entry of the journal in `home`, by `live` if given; return the problem."""
    undo = live or UNDO.get(entry.kind)
    own = _OWN.get(entry.kind)
    if own is not None and not is_below(home, str(entry.fields.get(own))):
        # `delete` runs among the host's mounts, and a journal is only a file.
        return f"{entry.kind} #{entry.number}: {entry.fields.get(own)} is not of this sandbox"
    if undo is None:
        return f"{entry.kind} #{entry.number}: not known to this version"
    try:
        outcome: Outcome = undo(entry.fields)
    except (OSError, KeyError, TypeError, ValueError) as error:
        return f"{entry.kind} #{entry.number}: {error}"
    except Exception as error:  # an undo must never stop the others
        return f"{entry.kind} #{entry.number}: {type(error).__name__}: {error}"
    return None if outcome is None else f"{entry.kind} #{entry.number}: {outcome}"


def _lines(path: str) -> Iterator[dict[str, object]]:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return
    with os.fdopen(descriptor, "rb") as stream:
        data = stream.read(_MAX_BYTES)
    for raw in data.split(b"\n"):
        try:
            line = json.loads(raw)
        except (ValueError, RecursionError):
            continue  # torn by the death of its writer
        if isinstance(line, dict):
            yield line


def _head(line: Mapping[str, object]) -> Head:
    def number(key: str) -> int:
        value = line.get(key)
        return value if isinstance(value, int) else 0

    return Head(
        boot=str(line.get("boot", "")),
        namespace=str(line.get("namespace", "")),
        sandbox=str(line.get("sandbox", "")),
        shim=number("shim"),
        shim_start=number("shim_start"),
    )
