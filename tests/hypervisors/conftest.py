"""Fixtures of the hypervisor tests."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from hypervisors.machine import MachineSpec, Rng

from . import scratch_guest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from hypervisors.child import ChildRecord


@pytest.fixture(scope="session")
def initrd(tmp_path_factory):
    if why := scratch_guest.missing():
        pytest.skip(why)
    if os.geteuid() != 0:
        pytest.skip("helpers of a virtual machine need root")
    return scratch_guest.write_initrd(tmp_path_factory.mktemp("guest") / "initrd.img")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """An image where a VMM's own user can reach it, which pytest's directories are not."""
    with tempfile.TemporaryDirectory(prefix="kata-disk-") as name:
        path = Path(name) / "disk.img"
        path.write_bytes(bytes(1 << 20))
        path.parent.chmod(0o755)
        path.chmod(0o666)
        yield path


@pytest.fixture
def make_spec(initrd: Path, tmp_path: Path, disk: Path) -> Callable[..., MachineSpec]:
    """A small machine; keyword arguments replace its fields."""

    def make(scenario: str = "", **changes) -> MachineSpec:
        fields: dict[str, Any] = {
            "id": "test",
            "kernel": scratch_guest.KERNEL,
            "initrd": initrd,
            "cmdline": f"scenario={scenario}",
            "vcpus": 1,
            "max_vcpus": 2,
            "memory_mib": 256,
            "max_memory_mib": 1024,
            "binary": scratch_guest.QEMU,
            "run_dir": tmp_path,
            "devices": (Rng(),),
            "hotplug_ports": 2,
        }
        return MachineSpec(**(fields | changes))

    return make


@pytest.fixture
def records():
    """A journal in memory; what is in it must be gone when the test ends."""
    kept: list[ChildRecord] = []
    yield kept
    left = [record for record in kept if os.path.exists(f"/proc/{record.pid}/stat")]
    assert left == [], "processes were left behind"
