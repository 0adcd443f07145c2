"""What tests of volumes have in common: an interpreter inside of containers, and a probe for it."""

from __future__ import annotations

from typing import Final

from tests.harness.ctr_pod import bind
from tests.harness.node import REPOSITORY

PROBE: Final = REPOSITORY / "tests" / "integration" / "volume_probe.py"
# The image has no interpreter; the host's is bound in.
PYTHON: Final = [
    *bind("/usr", "/usr", "rbind:ro"),
    *bind("/usr/lib", "/lib", "rbind:ro"),
    *bind("/usr/lib64", "/lib64", "rbind:ro"),
    *bind(str(PROBE), "/probe.py", "rbind:ro"),
]


def probe(*words: str) -> list[str]:
    """The command that runs the probe with these words."""
    return ["/usr/bin/python3", "-I", "-S", "-u", "/probe.py", *words]
