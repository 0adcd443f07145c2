"""Memory of huge pages, or taken at once: asked for in each backend's words, refused in time."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from hypervisors import clh_config, qemu_argv
from hypervisors.errors import PreconditionFailed
from hypervisors.spec_check import check_huge_pages
from tests.harness.limitations import documented
from tests.hypervisors.test_clh_config import SPEC as CLH
from tests.hypervisors.test_qemu_argv import SPEC as QEMU


def test_qemu_is_asked_for_both() -> None:
    backend = qemu_argv.memory_backend("mem", 64, replace(QEMU, huge_pages=True, prealloc=True))
    assert (backend["hugetlb"], backend["hugetlbsize"], backend["prealloc"]) == (
        True,
        2 << 20,
        True,
    )
    plain = qemu_argv.memory_backend("mem", 64, QEMU)
    assert not {"hugetlb", "prealloc"} & set(plain)


def test_cloud_hypervisor_is_asked_for_both() -> None:
    plain = json.dumps(clh_config._memory(CLH))
    assert "huge" not in plain
    assert "prefault" not in plain
    memory = clh_config._memory(replace(CLH, huge_pages=True, prealloc=True))
    assert (memory["hugepages"], memory["hugepage_size"], memory["prefault"]) == (
        True, 2 << 20, True,
    )  # fmt: skip


def test_too_few_free_huge_pages_are_refused_with_the_numbers(tmp_path: Path) -> None:
    (tmp_path / "free_hugepages").write_text("32\n")
    check_huge_pages(64, tmp_path)
    with pytest.raises(PreconditionFailed, match=r"32 of 2 MiB are free, 66 MiB of memory need 33"):
        check_huge_pages(66, tmp_path)
    with pytest.raises(
        PreconditionFailed,
        match=documented(
            "huge pages …: … of 2 MiB are free, … MiB of memory need …; reserve more "
            "(vm.nr_hugepages), or set enable_hugepages = false"
        ),
    ):
        check_huge_pages(63, tmp_path)
    with pytest.raises(PreconditionFailed, match="0 of 2 MiB are free"):
        check_huge_pages(64, tmp_path / "none")
