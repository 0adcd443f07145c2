"""The serving process's log: JSON, one event a line, into the bundle's `log` fifo.

containerd copies the fifo to its own stderr. A reader that is slow, gone or never came costs
nothing: lines that don't fit are dropped and counted. Calls look like structlog's, which the
operator programs use; here it would cost 46 ms and 10 MiB a pod (decision 0006).
"""

from __future__ import annotations

import json
import os
import stat
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_LINE_BYTES = 4096
"""Source: pipe(7): up to PIPE_BUF, a non-blocking write is all or nothing."""

_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}
_MAX_VALUE_CHARACTERS = 2048


class LogSink:
    """Where lines go: one descriptor, shared by every `Log` bound from the first."""

    def __init__(self, descriptor: int = -1, *, level: str = "info") -> None:
        self.descriptor = descriptor
        self.threshold = _LEVELS[level]
        self.dropped = 0

    def write(self, line: bytes) -> None:
        """Write one line or drop it; never blocks, never raises."""
        if self.descriptor < 0:
            return
        try:
            os.write(self.descriptor, line)
        except OSError:  # full, no reader, no space: nobody waits for a log
            self.dropped += 1


class Log:
    """A logger that adds its bound fields to each event. Method names are structlog's."""

    __slots__ = ("_fields", "_sink")

    def __init__(self, sink: LogSink, fields: Mapping[str, object] | None = None) -> None:
        self._sink = sink
        self._fields = dict(fields or {})

    def bind(self, **fields: object) -> Log:
        """Return a logger that also carries `fields`, for example `container_id`."""
        return Log(self._sink, {**self._fields, **fields})

    def debug(self, event: str, **fields: object) -> None:
        self._emit("debug", event, fields)

    def info(self, event: str, **fields: object) -> None:
        self._emit("info", event, fields)

    def warning(self, event: str, **fields: object) -> None:
        self._emit("warning", event, fields)

    def error(self, event: str, **fields: object) -> None:
        self._emit("error", event, fields)

    def exception(self, event: str, error: BaseException, **fields: object) -> None:
        """Log an error nobody expected, with the last lines of its traceback."""
        import traceback

        lines = "".join(traceback.format_exception(error))
        self._emit("error", event, {**fields, "error": repr(error), "traceback": lines[-1800:]})

    def _emit(self, level: str, event: str, fields: Mapping[str, object]) -> None:
        if _LEVELS[level] < self._sink.threshold:
            return
        record = {"timestamp": timestamp(), "level": level, "event": event}
        self._sink.write(encode({**record, **self._fields, **fields}))


def timestamp() -> str:
    """Return the time in UTC as RFC 3339 with milliseconds."""
    now = time.time_ns()
    seconds, rest = divmod(now, 1_000_000_000)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{rest // 1_000_000:03d}Z"


def encode(record: Mapping[str, object]) -> bytes:
    """Return one line of JSON of at most `MAX_LINE_BYTES`; long values give way first."""
    line = json.dumps(record, default=str, separators=(",", ":")).encode() + b"\n"
    limit = _MAX_VALUE_CHARACTERS
    while len(line) > MAX_LINE_BYTES and limit >= 16:
        limit //= 2
        short = {key: _shorten(value, limit) for key, value in record.items()}
        line = json.dumps(short, default=str, separators=(",", ":")).encode() + b"\n"
    return line if len(line) <= MAX_LINE_BYTES else b'{"event":"a log line was too long"}\n'


def open_bundle_log(bundle: str) -> int:
    """Open the bundle's `log` fifo without blocking; -1 if there is none to write to.

    Opened for reading too, so that a containerd that restarts loses no line that the pipe can hold,
    and a write finds no broken pipe meanwhile.
    """
    try:
        flags = os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(f"{bundle}/log", flags)
    except OSError:
        return -1
    if stat.S_ISFIFO(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    return -1


def _shorten(value: object, limit: int) -> object:
    if value is None or isinstance(value, bool | int | float):
        return value
    text = value if isinstance(value, str) else str(value)
    return text if len(text) <= limit else text[:limit] + "…"
