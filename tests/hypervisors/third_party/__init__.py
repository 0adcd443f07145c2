"""A backend as another distribution would bring it, and the VMM that it is for."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Final

from hypervisors.registry import ENTRY_POINT_GROUP

_HERE: Final = Path(__file__).parent
_METADATA: Final = "Metadata-Version: 2.1\nName: toy-vmm\nVersion: 1.0\n"
_ENTRY_POINTS: Final = f"[{ENTRY_POINT_GROUP}]\ntoy = toy_hypervisor:Toy\n"


def put(site: Path) -> Path:
    """Leave in `site` what an installer would: a module and metadata. Returns the VMM's program."""
    (site / "toy_hypervisor.py").write_text((_HERE / "toy_hypervisor.py").read_text())
    metadata = site / "toy_vmm-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(_METADATA)
    (metadata / "entry_points.txt").write_text(_ENTRY_POINTS)
    program = site / "toy"
    interpreter = os.path.realpath(sys.executable)
    program.write_text(f"#!{interpreter} -I\n{(_HERE / 'toy_vmm.py').read_text()}")
    program.chmod(0o755)
    return program
