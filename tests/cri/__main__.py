"""Run all of critest against kata and, for comparison, runc; say what differs from the list.

    python -m tests.cri [--containerd 1|2] [--handler kata|runc]… [SPEC-REGEX…]

With regular expressions only the specs that match one. Two nodes work side by side, each on its
part of the specs: as many machines as the runs of `make test-cri` were measured with, two CPUs.
Exits with 1 when a spec does otherwise than tests/cri/expected.toml says.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tests.cri import critest, expected
from tests.cri.images import write_images
from tests.harness.containerd_daemon import ContainerdVersion, find_containerd
from tests.harness.node import BUILD, Node

if TYPE_CHECKING:
    from pathlib import Path

    from tests.cri.critest import Outcome

#: Halves of about the same length: one of the files holds a third of the specs.
_PARTS = {
    "security": ["--ginkgo.focus-file=security_context"],
    "others": ["--ginkgo.skip-file=security_context"],
}
_LIMIT_S = 3000.0


@dataclass(frozen=True)
class Suite:
    """critest with one containerd; with `only` those of its specs that match an expression."""

    version: ContainerdVersion
    images: list[Path]
    only: list[str]

    def run(self, handler: str) -> list[Outcome]:
        """Run the specs on one runtime, two parts at a time."""
        with ThreadPoolExecutor(len(_PARTS)) as pool:
            parts = [pool.submit(self._run_part, handler, part) for part in _PARTS.values()]
            return [outcome for part in parts for outcome in part.result()]

    def _run_part(self, handler: str, options: list[str]) -> list[Outcome]:
        focus = [f"--ginkgo.focus={expression}" for expression in self.only]
        with Node(self.version) as node:
            node.serve_images(self.images)
            return critest.run(node, handler, [*options, *focus], timeout_s=_LIMIT_S)


def show(handler: str, version: ContainerdVersion, outcomes: list[Outcome], seconds: float) -> None:
    """Print what didn't pass, then how many did what."""
    listed = {each.spec: each for each in expected.read_list() if handler in each.on}
    for each in sorted(outcomes, key=lambda each: (each.outcome, each.spec)):
        if each.outcome != "passes":
            entry = listed.get(each.spec)
            reason = entry.reason if entry else each.reason.partition("\n")[0]
            print(f"  {each.outcome:8} {each.spec}\n           {reason}")
    counts = Counter(each.outcome for each in outcomes)
    print(
        f"critest, {handler}, containerd {version.name}: {counts['passes']} pass, "
        f"{counts['fails']} fail, {counts['skipped']} skipped, {seconds:.0f} s\n",
        flush=True,
    )


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m tests.cri")
    parser.add_argument("--containerd", type=int, default=2, choices=(1, 2))
    parser.add_argument("--handler", action="append", choices=("kata", "runc"))
    parser.add_argument("only", nargs="*", metavar="SPEC-REGEX")
    arguments = parser.parse_args()
    version = find_containerd(arguments.containerd)
    suite = Suite(version, write_images(BUILD / "tests" / "images"), arguments.only)
    told: list[str] = []
    for handler in arguments.handler or ("runc", "kata"):
        started = time.monotonic()
        outcomes = suite.run(handler)
        show(handler, version, outcomes, time.monotonic() - started)
        whole = not arguments.only
        found = expected.differences(outcomes, expected.read_list(), handler, is_whole=whole)
        told += [f"{handler}: {each}" for each in found]
    if told:
        print("not as tests/cri/expected.toml says:\n")
        print("\n".join(told))
    return 1 if told else 0


if __name__ == "__main__":
    sys.exit(main())
