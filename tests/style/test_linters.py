"""ruff and mypy over everything we wrote."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.style import source


def _run(*command: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=source.ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    if result.returncode != 0:
        pytest.fail(f"{' '.join(command)}\n{result.stdout}{result.stderr}", pytrace=False)


@pytest.mark.parametrize("directory", [*source.PACKAGES, "packaging", "tests"])
def test_ruff_finds_nothing(directory: str) -> None:
    _run("ruff", "check", "--no-cache", directory)


@pytest.mark.parametrize("directory", [*source.PACKAGES, "packaging", "tests"])
def test_code_is_formatted(directory: str) -> None:
    _run("ruff", "format", "--no-cache", "--check", directory)


@pytest.mark.parametrize("package", source.PACKAGES)
def test_mypy_finds_nothing(package: str) -> None:
    _run("mypy", "--strict", "--cache-dir=build/mypy_cache", "-p", package)
