"""From limits to a machine's size, and from host CPUs to vCPUs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shimv2.errors import InvalidArgument
from shimv2.sizing import (
    MIB,
    MINIMUM_MEMORY_MIB,
    Base,
    Limits,
    Size,
    container_limits,
    cpu_numbers,
    sandbox_limits,
    shortfall,
    total,
    wanted,
    within,
)
from shimv2.vcpu_map import VcpuMap

BASE = Base(default_millicpus=1000, default_memory_mib=2048)

limits = st.builds(
    Limits,
    millicpus=st.integers(0, 512_000),
    memory_bytes=st.integers(0, 1 << 44),
)
bases = st.builds(
    Base,
    default_millicpus=st.integers(0, 64_000),
    default_memory_mib=st.integers(64, 1 << 20),
    overhead_millicpus=st.none() | st.integers(1, 4000),
    overhead_memory_mib=st.none() | st.integers(1, 4096),
)
cpu_sets = st.sets(st.integers(0, 200), min_size=1, max_size=40)


@pytest.mark.parametrize(
    ("given_limits", "size"),
    [
        (Limits(), Size(vcpus=1, memory_mib=2048)),
        (Limits(millicpus=500), Size(vcpus=2, memory_mib=2048)),
        (Limits(millicpus=1000), Size(vcpus=2, memory_mib=2048)),
        (Limits(millicpus=1001), Size(vcpus=3, memory_mib=2048)),
        (Limits(memory_bytes=1), Size(vcpus=1, memory_mib=2050)),
        (Limits(memory_bytes=64 * MIB), Size(vcpus=1, memory_mib=2112)),
    ],
)
def test_limits_come_on_top_of_the_default(given_limits: Limits, size: Size) -> None:
    assert wanted(BASE, given_limits) == size


@pytest.mark.parametrize(
    ("given_limits", "size"),
    [
        (Limits(), Size(vcpus=1, memory_mib=2048)),
        (Limits(millicpus=1000), Size(vcpus=2, memory_mib=2048)),
        (Limits(millicpus=800, memory_bytes=512 * MIB), Size(vcpus=1, memory_mib=544)),
        (Limits(memory_bytes=MIB), Size(vcpus=1, memory_mib=MINIMUM_MEMORY_MIB)),
    ],
)
def test_an_overhead_takes_the_defaults_place_where_there_is_a_limit(
    given_limits: Limits, size: Size
) -> None:
    base = Base(
        default_millicpus=1000,
        default_memory_mib=2048,
        overhead_millicpus=200,
        overhead_memory_mib=32,
    )
    assert wanted(base, given_limits) == size


@given(bases, limits)
def test_a_machine_holds_what_its_containers_may_use_and_can_live(base: Base, some: Limits) -> None:
    size = wanted(base, some)
    assert size.vcpus >= 1
    assert size.vcpus * 1000 >= some.millicpus
    assert size.memory_mib * MIB >= some.memory_bytes
    assert size.memory_mib >= min(MINIMUM_MEMORY_MIB, base.default_memory_mib)


@given(bases, limits, limits)
def test_more_limits_never_make_a_machine_smaller(base: Base, one: Limits, two: Limits) -> None:
    if not (one.millicpus and one.memory_bytes):
        return  # from the default to limit + overhead it may well become smaller
    small, large = wanted(base, one), wanted(base, one.plus(two))
    assert small.vcpus <= large.vcpus
    assert small.memory_mib <= large.memory_mib


@given(bases, limits, st.integers(1, 255), st.integers(64, 1 << 22))
def test_no_machine_is_larger_than_its_maximum_and_only_a_smaller_one_is_told(
    base: Base, some: Limits, vcpus: int, memory_mib: int
) -> None:
    size, maximum = wanted(base, some), Size(vcpus=vcpus, memory_mib=memory_mib)
    had = within(size, maximum)
    assert had.vcpus <= vcpus
    assert had.memory_mib <= memory_mib
    assert bool(shortfall(size, had, maximum=maximum)) == (had != size)


@given(st.lists(limits, max_size=8))
def test_limits_add_up_in_any_order(several: list[Limits]) -> None:
    assert total(several) == total(reversed(several))
    assert total(several).millicpus == sum(one.millicpus for one in several)


def test_a_containers_limits_are_its_quota_or_its_cpuset_and_its_memory() -> None:
    cpu = {"quota": 150000, "period": 100000, "cpus": "0-7", "shares": 2}
    found = container_limits({"cpu": cpu, "memory": {"limit": 64 * MIB}})
    assert found == Limits(millicpus=1500, memory_bytes=64 * MIB)
    assert container_limits({"cpu": {"quota": 1, "period": 100000}}).millicpus == 1
    assert container_limits({"cpu": {"quota": 50000}}).millicpus == 500
    assert container_limits({"cpu": {"quota": -1, "cpus": "3,5-6"}}).millicpus == 3000
    for nothing in (None, {}, {"cpu": None}, {"cpu": {"quota": -1}, "memory": {"limit": -1}}):
        assert container_limits(nothing) == Limits()


def test_a_pods_limits_are_in_its_annotations() -> None:
    prefix = "io.kubernetes.cri.sandbox"
    found = sandbox_limits(
        {
            f"{prefix}-cpu-quota": "200000",
            f"{prefix}-cpu-period": "100000",
            f"{prefix}-cpu-shares": "2048",
            f"{prefix}-memory": str(512 * MIB),
        }
    )
    assert found == Limits(millicpus=2000, memory_bytes=512 * MIB)
    assert sandbox_limits({f"{prefix}-memory": "0", f"{prefix}-cpu-quota": "-1"}) == Limits()


@pytest.mark.parametrize(
    ("resources", "text"),
    [
        ({"cpu": {"quota": "1"}}, "resources.cpu.quota must be a whole number, not '1'"),
        ({"memory": {"limit": 1.5}}, "resources.memory.limit must be a whole number, not 1.5"),
        ({"memory": {"limit": True}}, "whole number"),
        ({"cpu": 3}, "resources.cpu is not an object"),
        ({"cpu": {"cpus": "0-x"}}, "not a list like 0-2,7"),
        ({"cpu": {"cpus": "5-2"}}, "CPUs are numbered"),
        ({"cpu": {"cpus": "0-9999"}}, "CPUs are numbered 0 to 8191"),
    ],
)
def test_limits_that_cant_be_read_are_refused_by_name(resources: object, text: str) -> None:
    with pytest.raises(InvalidArgument, match=text):
        container_limits(resources)


def test_an_annotation_that_is_no_number_is_refused_by_name() -> None:
    with pytest.raises(InvalidArgument, match=r"cri.sandbox-memory must be a whole number.*'2Gi'"):
        sandbox_limits({"io.kubernetes.cri.sandbox-memory": "2Gi"})


@given(st.text(alphabet="0123456789,- x", max_size=20))
def test_a_list_of_cpus_is_read_or_refused(text: str) -> None:
    try:
        numbers = cpu_numbers(text)
    except InvalidArgument:
        return
    assert list(numbers) == sorted(set(numbers))


@given(st.lists(cpu_sets, min_size=1, max_size=6), st.integers(1, 64))
def test_pinned_containers_get_vcpus_that_exist_and_no_more_than_they_had_cpus(
    sets: list[set[int]], vcpus: int
) -> None:
    places = VcpuMap()
    for wanted_cpus in sets:
        found = cpu_numbers(places.guest_cpus(sorted(wanted_cpus), vcpus))
        assert found
        assert max(found) < vcpus
        assert len(found) <= len(wanted_cpus)
        if vcpus >= len(set().union(*sets)):
            assert len(found) == len(wanted_cpus)


@given(cpu_sets, cpu_sets)
def test_containers_share_vcpus_as_they_would_share_cpus(one: set[int], two: set[int]) -> None:
    places = VcpuMap()
    first = set(cpu_numbers(places.guest_cpus(sorted(one), 500)))
    second = set(cpu_numbers(places.guest_cpus(sorted(two), 500)))
    assert len(first & second) == len(one & two)


def test_vcpus_of_containers_that_left_are_used_again() -> None:
    places = VcpuMap()
    assert places.guest_cpus((8, 9), 4) == "0,1"
    assert places.guest_cpus((4,), 4) == "2"
    places.keep({4})
    assert places.guest_cpus((10, 11), 4) == "0,1"
