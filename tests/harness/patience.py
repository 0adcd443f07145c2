"""How long tests wait, on machines as slow as an emulated one.

`KATA_TEST_PATIENCE=6` makes every deadline of the harness, and every limit of a test that it
states through `patient`, six times as long.
"""

from __future__ import annotations

import os

FACTOR = float(os.environ.get("KATA_TEST_PATIENCE", "1"))


def patient(seconds: float) -> float:
    """Return what `seconds` on an ordinary machine are here."""
    return seconds * FACTOR
