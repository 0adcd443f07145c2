"""How long tests wait, on machines as slow as an emulated one.

`KATA_TEST_PATIENCE=6` makes every deadline of the harness, and every limit of a test that it
states through `patient`, six times as long.
"""

from __future__ import annotations

import os
import select
import time
from typing import IO

FACTOR = float(os.environ.get("KATA_TEST_PATIENCE", "1"))


def patient(seconds: float) -> float:
    """Return what `seconds` on an ordinary machine are here."""
    return seconds * FACTOR


def read_line(stream: IO[bytes], timeout_s: float = 30) -> bytes:
    """Return the next line of a pipe, with its newline; what there is of one at the pipe's end.

    Raises TimeoutError with what has come until then. Takes no byte behind the line.
    """
    line, deadline = b"", time.monotonic() + patient(timeout_s)
    while not line.endswith(b"\n"):
        left_s = max(0.0, deadline - time.monotonic())
        if not select.select([stream], [], [], left_s)[0]:
            raise TimeoutError(f"no line within {patient(timeout_s):g} s, only {line!r}")
        if not (byte := os.read(stream.fileno(), 1)):
            break
        line += byte
    return line
