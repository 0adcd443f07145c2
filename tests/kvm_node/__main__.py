"""Run a command on a node with KVM: `python -m tests.kvm_node [--writable DIR] -- COMMAND …`.

The status is the command's; 125 when the node itself failed.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from tests.kvm_node.node import Job, NodeFailed, run

_PASSED_ON = ("HOME", "LANG", "TERM", "XDG_CACHE_HOME")


def main() -> int:
    """Read the command line, run the command, return the status."""
    parser = argparse.ArgumentParser(prog="python -m tests.kvm_node", description=__doc__)
    parser.add_argument(
        "--writable",
        type=Path,
        action="append",
        default=[],
        help="directory whose changes stay; everything else that is written is lost",
    )
    parser.add_argument("--memory", type=int, default=4096, help="MiB")
    parser.add_argument("--deadline", type=float, default=600, help="seconds")
    parser.add_argument("command", nargs="+")
    options = parser.parse_args()
    passed = {
        name: value
        for name, value in os.environ.items()
        if name in _PASSED_ON or name.startswith("KATA_")
    }
    job = Job(
        command=options.command,
        environment=passed,
        directory=Path.cwd(),
        writable=tuple(path.resolve(strict=True) for path in options.writable),
        memory_mib=options.memory,
        deadline_s=options.deadline,
    )
    try:
        return run(job, lambda data: os.write(sys.stdout.fileno(), data))
    except NodeFailed as failure:
        print(failure, file=sys.stderr)
        return 125


if __name__ == "__main__":
    sys.exit(main())
