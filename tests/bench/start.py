"""A shim's cold start: `start` executed → address printed → first call answered.

The times are taken by `start_probe`, inside of the node, as containerd would call a shim there.
"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

from tests.bench.figure import Aim, Figure
from tests.harness.node import REPOSITORY

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.harness.node import Node

_ROUNDS = 30


def measure(node: Node) -> Iterator[Figure]:
    """Both runtimes' shims in turn."""
    probe = [sys.executable, str(REPOSITORY / "tests" / "bench" / "start_probe.py"), str(_ROUNDS)]
    found = json.loads(node.run(probe, timeout_s=60).stdout)
    kata, runc = found["containerd-shim-kata-v2"], found["containerd-shim-runc-v2"]
    yield Figure(
        name="start executed → address printed",
        unit="ms",
        samples=kata["printed"],
        peer="runc's shim",
        peer_samples=runc["printed"],
        aim=Aim(of="median", limit=15),
    )
    yield Figure(
        name="address printed → first RPC answered",
        unit="ms",
        samples=kata["answered"],
        peer="runc's shim",
        peer_samples=runc["answered"],
        aim=Aim(of="median", limit=100),
    )
