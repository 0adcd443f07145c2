"""Run critest against kata and, for comparison, runc; say what differs from the list.

    python -m tests.cri [--containerd 1|2]… [--handler kata|runc]… [SPEC-REGEX…]

Without options both runtimes with both containerds. With regular expressions only the specs that
match one. Two nodes work side by side, each on its part of the specs: two machines at a time are
what two CPUs emulate without losing time. Exits with 1 when a spec does otherwise than
tests/cri/expected.toml says.
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
    from collections.abc import Mapping
    from pathlib import Path

    from tests.cri.critest import Outcome
    from tests.cri.expected import Expected

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
        """Run the specs on one runtime, two parts at a time; RuntimeError when none was run."""
        with ThreadPoolExecutor(len(_PARTS)) as pool:
            parts = [pool.submit(self._run_part, handler, part) for part in _PARTS.values()]
            outcomes = [outcome for part in parts for outcome in part.result()]
        if missing := critest.unmatched(self.only or [""], outcomes):
            raise RuntimeError(f"critest ran no spec that matches one of {missing}")
        return outcomes

    def _run_part(self, handler: str, options: list[str]) -> list[Outcome]:
        focus = [f"--ginkgo.focus={expression}" for expression in self.only]
        with Node(self.version) as node:
            node.serve_images(self.images)
            return critest.run(node, handler, [*options, *focus], timeout_s=_LIMIT_S)


def check(suite: Suite, handler: str) -> list[str]:
    """Run on one runtime and show what came of it; return what is not as listed."""
    started = time.monotonic()
    outcomes = suite.run(handler)
    seconds = time.monotonic() - started
    listed, features = expected.read_list(), expected.of_machine()
    wanted = expected.of_run(listed, handler, suite.version.major, features)
    show(outcomes, wanted)
    counts = Counter(each.outcome for each in outcomes)
    run = f"{handler}, containerd {suite.version.name}"
    print(
        f"critest, {run}: {counts['passes']} pass, {counts['fails']} fail, "
        f"{counts['skipped']} skipped, {seconds:.0f} s\n",
        flush=True,
    )
    told = expected.differences(outcomes, wanted, is_whole=not suite.only)
    return [f"{run}: {each}" for each in told]


def show(outcomes: list[Outcome], wanted: Mapping[str, Expected]) -> None:
    """Print what didn't pass, with the list's reason or else critest's."""
    for each in sorted(outcomes, key=lambda each: (each.outcome, each.spec)):
        if each.outcome != "passes":
            entry = wanted.get(each.spec)
            reason = entry.reason if entry else each.reason.partition("\n")[0]
            print(f"  {each.outcome:8} {each.spec}\n           {reason}")


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m tests.cri")
    parser.add_argument("--containerd", action="append", type=int, choices=(1, 2))
    parser.add_argument("--handler", action="append", choices=("kata", "runc"))
    parser.add_argument("only", nargs="*", metavar="SPEC-REGEX")
    arguments = parser.parse_args()
    images = write_images(BUILD / "tests" / "images")
    told: list[str] = []
    for major in arguments.containerd or (2, 1):
        suite = Suite(find_containerd(major), images, arguments.only)
        for handler in arguments.handler or ("runc", "kata"):
            told += check(suite, handler)
    if told:
        print("not as tests/cri/expected.toml says:\n")
        print("\n".join(told))
    return 1 if told else 0


if __name__ == "__main__":
    sys.exit(main())
