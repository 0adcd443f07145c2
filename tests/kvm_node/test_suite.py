"""What `make test-kvm` says of each VMM, with programs in the place of pytest and of the node."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.harness import vmm
from tests.kvm_node import suite

if TYPE_CHECKING:
    from pathlib import Path

    from tests.kvm_node.node import Job

_PYTEST = """\
#!/bin/sh
echo "$KATA_TEST_HYPERVISOR $KATA_TEST_MACHINE_TYPE"
case $KATA_TEST_HYPERVISOR in
one) echo '=== 3 passed, 1 skipped in 2s ===';;
two) echo '=== 1 failed in 2s ==='; exit 1;;
esac
"""


@pytest.fixture
def setups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three setups of two VMMs that are there and one that isn't, tested by a script."""
    script = tmp_path / "pytest"
    script.write_text(_PYTEST)
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    monkeypatch.setattr(vmm, "PROGRAMS", {"one": "vmm-1", "two": "vmm-2", "three": "vmm-3"})
    monkeypatch.setattr(vmm, "SETUPS", ("one", "one:small", "two", "three"))
    monkeypatch.setattr(suite, "_SAID", f"{tmp_path}/said.")
    for name in ("ONE", "TWO"):
        monkeypatch.setenv(f"KATA_TEST_{name}", str(script))

    def run(job: Job, output: object) -> int:
        assert callable(output)
        done = subprocess.run(
            job.command, env={**os.environ, **job.environment}, capture_output=True, check=False
        )
        output(done.stdout)
        return done.returncode

    monkeypatch.setattr(suite, "run", run)


@pytest.mark.usefixtures("setups")
def test_end_says_what_passed_with_each_vmm_and_which_was_left_out_and_why(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["suite"])
    assert suite.main() == 1
    said = capfd.readouterr().out
    assert said.startswith("booting a node with KVM for one, one:small, two\n")
    assert "\nwith one:small:\none small\n" in said
    assert said.endswith("""
on the node with KVM:
one: 3 passed, 1 skipped in 2s
one:small: 3 passed, 1 skipped in 2s
two: 1 failed in 2s
left out: three: no vmm-3 in PATH and KATA_TEST_THREE names none
""")


@pytest.mark.usefixtures("setups")
def test_single_vmm_can_be_asked_for(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["suite", "--vmm", "one"])
    assert suite.main() == 0
    assert capfd.readouterr().out.endswith(
        "on the node with KVM:\none: 3 passed, 1 skipped in 2s\n"
    )
