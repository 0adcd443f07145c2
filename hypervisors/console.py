"""What the guest wrote on its serial console: a bounded ring, safe to print.

The guest owns every byte here, so nothing is interpreted: control characters are escaped, lines
are cut, and old output is dropped.
"""

from __future__ import annotations

from collections import deque
from typing import Final

import trio

# A longer line is split. Longest useful kernel line is printk's LOG_LINE_MAX, about 1 KiB.
MAX_LINE_BYTES: Final = 4096
# What a held line costs besides its text (bytes object and slot), so that a flood of short lines
# is bounded like a flood of long ones. Source: sys.getsizeof(b"") plus a pointer, rounded.
LINE_OVERHEAD_BYTES: Final = 40


def escape(line: bytes) -> str:
    """Make one console line printable: control and non-ASCII bytes become `\\xNN`, tab a space."""
    text = line.decode("ascii", "backslashreplace").replace("\t", " ")
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


class ConsoleRing:
    """Keeps the last `limit_bytes` of console output as lines."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._lines: deque[bytes] = deque()
        self._held_bytes = 0
        self._partial = bytearray()
        self._watches: list[tuple[bytes, trio.Event]] = []
        self.total_bytes = 0

    def feed(self, data: bytes) -> None:
        """Take output as it arrives, at any split."""
        self.total_bytes += len(data)
        self._partial += data
        *lines, rest = self._partial.split(b"\n")
        for line in lines:
            text = bytes(line.rstrip(b"\r"))
            for start in range(0, max(len(text), 1), MAX_LINE_BYTES):
                self._append(text[start : start + MAX_LINE_BYTES])
        while len(rest) > MAX_LINE_BYTES:
            self._append(bytes(rest[:MAX_LINE_BYTES]))
            rest = rest[MAX_LINE_BYTES:]
        self._partial = rest
        for needle, seen in self._watches:
            if needle in rest:
                seen.set()

    def tail(self, lines: int) -> list[str]:
        """The last `lines` lines, oldest first, an unfinished one included."""
        kept = list(self._lines)[-lines:] if lines > 0 else []
        if self._partial and lines > 0:
            kept = [*kept, bytes(self._partial)][-lines:]
        return [escape(line) for line in kept]

    async def wait_for(self, needle: bytes) -> None:
        """Return once a line containing `needle` is or was held. Safe to cancel."""
        if needle in self._partial or any(needle in line for line in self._lines):
            return
        watch = (needle, trio.Event())
        self._watches.append(watch)
        try:
            await watch[1].wait()
        finally:
            self._watches.remove(watch)

    def _append(self, line: bytes) -> None:
        for needle, seen in self._watches:
            if needle in line:
                seen.set()
        self._lines.append(line)
        self._held_bytes += len(line) + LINE_OVERHEAD_BYTES
        while self._held_bytes > self._limit_bytes:
            self._held_bytes -= len(self._lines.popleft()) + LINE_OVERHEAD_BYTES
