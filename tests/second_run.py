"""The whole suite, and once more what failed of it: `make test`.

    python -m tests.second_run [PYTEST-ARGUMENT…]

When a run to the end had at most three failures, those tests run once more, by themselves. Tests
that pass then are named in the last lines as defects to be found, of the test or of the product;
the run has passed. A test that fails again fails it, and so do more than three, or an early stop.
What fails in a fixture, as the leak check does, has failed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

#: More are no accident.
MOST = 3
#: Where the first run leaves its failures.
_VARIABLE = "KATA_TEST_FAILURES"


class Failures:
    """A plugin that writes the ids of failed tests to a file, if the run got to its end."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._failed: dict[str, None] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._failed[report.nodeid] = None

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        is_whole = not session.shouldfail and not session.shouldstop
        if exitstatus == pytest.ExitCode.TESTS_FAILED and is_whole:
            self._path.write_text(json.dumps([*self._failed]))


def pytest_configure(config: pytest.Config) -> None:
    """Hook of pytest: this module is a plugin of the first run (`-p`)."""
    if path := os.environ.pop(_VARIABLE, ""):
        config.pluginmanager.register(Failures(Path(path)))


def main(arguments: list[str]) -> int:
    """Run pytest, and again on few failures; return the status that counts."""
    with tempfile.TemporaryDirectory(prefix="kata-test-") as directory:
        path = Path(directory, "failures.json")
        status = _pytest(["-p", __spec__.name, *arguments], {_VARIABLE: str(path)})
        failed: list[str] = json.loads(path.read_text()) if path.exists() else []
    if not 0 < len(failed) <= MOST:
        return status
    print(f"\nfailed, and run once more by themselves: {', '.join(failed)}\n", flush=True)
    status = _pytest(failed, {})
    if status == 0:
        for test in failed:
            print(f"failed once, passed on the second run: {test}: a defect to be found")
    return status


def _pytest(arguments: list[str], variables: dict[str, str]) -> int:
    argv = [sys.executable, "-m", "pytest", "-v", *arguments]
    return subprocess.run(argv, env={**os.environ, **variables}, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
