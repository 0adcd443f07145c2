"""A backend of another distribution: one module and an entry point, and nothing here knows it.

The distribution is made as an installer leaves it: a module and a directory of metadata beside it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from hypervisors.registry import find_hypervisor, installed
from shimv2.config import load_config
from shimv2.task_service import _real_machinery
from tests.harness.node import BUILD
from tests.harness.patience import patient
from tests.style import hypervisors_page

from . import scratch_guest, third_party

HERE = Path(__file__).parent
LIMIT_S = 240


@dataclass(frozen=True)
class Distribution:
    """Where it was installed, and the VMM that it drives."""

    site: Path
    program: Path


@pytest.fixture
def toy() -> Iterator[Distribution]:
    # Where a user of the VMM's own can go, which pytest's directories are not.
    with tempfile.TemporaryDirectory(prefix="kata-toy-") as name:
        site = Path(name)
        site.chmod(0o755)
        yield Distribution(site, third_party.put(site))


@pytest.fixture
def imported(toy: Distribution, monkeypatch: pytest.MonkeyPatch) -> Iterator[Distribution]:
    """The distribution, in this process's search path."""
    monkeypatch.syspath_prepend(toy.site)
    yield toy
    sys.modules.pop("toy_hypervisor", None)


@pytest.mark.e2e
@pytest.mark.root
@pytest.mark.timeout(2 * LIMIT_S)
def test_toy_passes_the_contract_suite_as_it_is(toy: Distribution) -> None:
    if why := scratch_guest.missing():
        pytest.skip(why)
    done = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "[toy",
            HERE / "test_contract.py", HERE / "test_contract_guest.py",
        ],
        env={**os.environ, "PYTHONPATH": str(toy.site), "KATA_TEST_TOY": str(toy.program)},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        check=False,
        timeout=patient(LIMIT_S),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    counts = re.search(r"(\d+) passed, (?:\d+ skipped, )?\d+ deselected", done.stdout)
    assert counts is not None, done.stdout[-1000:]
    assert int(counts[1]) >= 25


@pytest.mark.root
def test_one_line_of_configuration_chooses_it(imported: Distribution, tmp_path: Path) -> None:
    file = tmp_path / "configuration.toml"
    file.write_text("[hypervisor.toy]\n")
    config = load_config(file)
    assert config.hypervisor.path == Path("/usr/bin/toy")
    machinery = _real_machinery(config)
    assert machinery.hypervisor.name == "toy"
    assert type(machinery.hypervisor).__module__ == "toy_hypervisor"


def test_it_is_in_the_list_of_what_each_can_do(imported: Distribution) -> None:
    assert "toy" in installed()
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in hypervisors_page.table(installed()).splitlines()
    ]
    column = rows[0].index("toy")
    cells = {row[0]: row[column] for row in rows}
    assert cells["vsock device of its own"] == "yes"
    assert cells["directories by virtio-fs"] == "no"


@pytest.mark.root
def test_end_to_end_tests_have_a_configuration_for_it(toy: Distribution) -> None:
    if not (BUILD / "etc" / "configuration.toml").exists():
        pytest.skip("needs `make shim`")
    program = (
        "from pathlib import Path\n"
        "from tests.harness.configuration import configurations\n"
        f"print(configurations(Path({str(BUILD / 'etc')!r}))['configuration.toml'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={
            **os.environ,
            "PYTHONPATH": str(toy.site),
            "KATA_TEST_HYPERVISOR": "toy",
            "KATA_TEST_TOY": str(toy.program),
        },
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert f'[hypervisor.toy]\npath = "{toy.program}"\n' in done.stdout


def test_shim_looks_for_it_in_a_directory_of_its_own(toy: Distribution) -> None:
    launcher = BUILD / "bin" / "containerd-shim-kata-v2"
    if not launcher.exists():
        pytest.skip("needs `make shim`")
    before, _, _ = launcher.read_text().partition("from shimv2.__main__")
    program = before.replace("/opt/kata-shimv2", str(toy.site)) + (
        "from hypervisors.registry import find_hypervisor\n"
        "print(type(find_hypervisor('toy')).__module__)\n"
    )
    command = [sys.executable, "-IS", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "toy_hypervisor\n", "")


def test_without_it_nothing_is_known_of_it() -> None:
    assert "toy" not in installed()
    with pytest.raises(Exception, match="no such hypervisor is installed"):
        find_hypervisor("toy")
