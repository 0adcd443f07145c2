"""The frequency of the time stamp counter, which an emulated guest is told."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from hypervisors.accel import tsc_khz

if TYPE_CHECKING:
    from pathlib import Path

_TOLD = "fpu tsc constant_tsc tsc_known_freq hypervisor"


@pytest.mark.parametrize(
    ("flags", "mhz", "khz"),
    [
        (_TOLD, "2299.998", 2299998),
        (_TOLD + " aperfmperf", "2299.998", None),
        ("fpu tsc constant_tsc tsc_known_freq", "800.000", None),
        ("fpu tsc hypervisor", "2299.998", None),
        (_TOLD, "unknown", None),
    ],
)
def test_frequency_is_told_only_where_a_hypervisor_told_it(
    tmp_path: Path, flags: str, mhz: str, khz: int | None
) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    processor = f"processor\t: 0\ncpu MHz\t\t: {mhz}\nflags\t\t: {flags}\n\n"
    cpuinfo.write_text(processor + processor.replace(mhz, "1.000"))
    assert tsc_khz(cpuinfo) == khz
