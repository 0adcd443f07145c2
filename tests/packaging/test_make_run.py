"""`make run` as a user calls it: the output it promises, twice, and with an image of one's own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness import oci_image, registry
from tests.harness.node import BUILD, REPOSITORY

pytestmark = [
    pytest.mark.root,
    pytest.mark.e2e,
    pytest.mark.skipif(
        not (BUILD / "guest" / "vmlinux").exists(), reason="needs `make setup guest shim`"
    ),
]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = REPOSITORY / "packaging" / "demo" / "run.py"
    return subprocess.run(
        [sys.executable, program, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )


def mounts() -> str:
    return Path("/proc/self/mountinfo").read_text()


def test_shows_both_kernels_the_output_and_the_phases_twice_in_a_row() -> None:
    before = mounts()
    for _ in range(2):
        done = run()
        assert done.returncode == 0, done.stdout + done.stderr
        for text in ("| kernel 6.", "exit status    0", "host kernel", "guest kernel   6."):
            assert text in done.stdout
        for phase in ("VMM launched", "guest kernel booted", "agent ready", "container exited"):
            assert phase in done.stdout
    assert mounts() == before


def test_exit_status_of_the_users_command_is_passed_on() -> None:
    done = run("--", "sh", "-c", "echo mine; exit 7")
    assert done.returncode == 7
    assert "  | mine\n" in done.stdout


def test_users_image_is_pulled_over_the_hosts_network() -> None:
    images = BUILD / "tests" / "images"
    archive = images / "busybox.tar"
    if not archive.exists():
        oci_image.write_busybox_image(images)
    with registry.serving(archive) as address:
        done = run("--image", f"{address}/library/mine:v1", "--", "uname", "-r")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "cloud-amd64" in done.stdout


def test_image_that_no_registry_has_is_named_with_the_fix() -> None:
    done = run("--image", "localhost:1/library/none:v1")
    assert done.returncode == 1
    assert "localhost:1/library/none:v1 could not be pulled" in done.stderr
    assert "the name must be complete" in done.stderr
    assert "Traceback" not in done.stderr
