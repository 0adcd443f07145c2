"""The library's replacement: nobody finds it missing, nobody loses the version that it runs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness.node import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "packaging"))

import versions

# Opens a module of the library until it is told to stop; says how often it was missing.
WATCH = """
import select, sys
missing = looks = 0
print("looking", flush=True)
while not select.select([sys.stdin], [], [], 0)[0]:
    looks += 1
    try:
        open(sys.argv[1]).close()
    except FileNotFoundError:
        missing += 1
print(missing)
"""
# Maps a file, as a process does with an extension.
HOLD = """
import mmap, sys
with open(sys.argv[1], "rb") as stream:
    held = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def put(tmp_path: Path) -> Callable[[str], Path]:
    """Install a library of one file with this text; return the version's directory."""

    def put(text: str) -> Path:
        scratch = tmp_path / "scratch"
        scratch.mkdir()
        (scratch / "module.py").write_text(text)
        versions.put(scratch, tmp_path / "lib")
        assert (tmp_path / "lib/module.py").read_text() == text
        return (tmp_path / "lib").resolve()

    return put


def run(script: str, path: Path) -> subprocess.Popen[str]:
    child = subprocess.Popen(
        [sys.executable, "-c", script, path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    assert child.stdout.readline()
    return child


def test_nobody_finds_the_library_missing(put: Callable[[str], Path], tmp_path: Path) -> None:
    put("0")
    with run(WATCH, tmp_path / "lib/module.py") as watcher:
        for number in range(1, 20):
            put(str(number))
        assert watcher.communicate("stop")[0].strip() == "0"


def test_directory_of_an_earlier_installation_is_replaced_and_stays_once(
    put: Callable[[str], Path], tmp_path: Path
) -> None:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib/module.py").write_text("old")
    new = put("new")
    assert (tmp_path / "lib-earlier/module.py").read_text() == "old"
    newest = put("newest")
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "lib", new, newest])


def test_version_that_somebody_runs_stays(put: Callable[[str], Path], tmp_path: Path) -> None:
    first = put("1")
    with run(HOLD, first / "module.py") as shim:
        assert put("2") != first
        put("3")
        put("4")
        assert (first / "module.py").read_text() == "1"
        shim.communicate("")
    others = tmp_path / "lib-of-somebody-else"
    others.mkdir()
    last = [put("5"), put("6")]
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "lib", others, *last])


def test_same_content_again_is_a_version_of_its_own(
    put: Callable[[str], Path], tmp_path: Path
) -> None:
    first = put("same")
    (first / "stale.py").write_text("")
    assert put("same").name == f"{first.name}.1"
    assert not (tmp_path / "lib/stale.py").exists()
