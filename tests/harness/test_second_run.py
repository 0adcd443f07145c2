"""What `make test` makes of failures."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness.node import REPOSITORY

# Each of these tests leaves a file when it runs, so that it knows the second time.
_TESTS = """\
from pathlib import Path
import pytest

def is_first(name):
    seen = Path(name + ".seen").exists()
    Path(name + ".seen").touch()
    return not seen

@pytest.fixture
def leaks_once():
    yield
    if is_first("leak"):
        pytest.fail("left behind: a mount", pytrace=False)

def test_fine():
    assert is_first("fine")

@pytest.mark.parametrize("odd", ["a::b [c]"])
def test_once(odd):
    assert not is_first("once")

def test_leak_once(leaks_once):
    pass

def test_always():
    assert False

@pytest.mark.parametrize("number", range(4))
def test_many(number):
    assert not is_first(f"many-{number}")
"""


def run(directory: Path, *arguments: str) -> tuple[int, list[str]]:
    """Run some of the tests above; return the status and the last lines."""
    (directory / "test_some.py").write_text(_TESTS)
    (directory / "pytest.ini").write_text("[pytest]\n")
    done = subprocess.run(
        [sys.executable, "-m", "tests.second_run", "-p", "no:cacheprovider", *arguments],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout.splitlines()


def test_failures_that_do_not_come_again_are_named_and_do_not_fail_the_run(tmp_path: Path):
    status, lines = run(tmp_path, "-k", "fine or once")
    assert status == 0, lines
    assert lines[-2:] == [
        f"failed once, passed on the second run: {test}: a defect to be found"
        for test in ("test_some.py::test_once[a::b [c]]", "test_some.py::test_leak_once")
    ]


def test_failure_that_comes_again_fails_the_run(tmp_path: Path):
    status, lines = run(tmp_path, "-k", "always or once")
    assert status == 1
    assert not any("passed on the second run" in line for line in lines)
    assert "1 failed, 2 passed" in lines[-1]


@pytest.mark.parametrize("arguments", [("-k", "many"), ("-x", "-k", "once")])
def test_many_failures_and_a_run_that_stopped_early_are_not_run_again(
    tmp_path: Path, arguments: tuple[str, ...]
):
    status, lines = run(tmp_path, *arguments)
    assert status == 1
    assert not any("once more" in line for line in lines)


def test_run_without_failures_or_tests_has_pytests_status(tmp_path: Path):
    assert run(tmp_path, "-k", "fine")[0] == 0
    assert run(tmp_path, "-k", "nothing")[0] == pytest.ExitCode.NO_TESTS_COLLECTED
