"""How big a sandbox's machine is: the limits of its containers on top of a base. Pure.

    limits known at the boot ──┐
    base of the configuration ─┴─> wanted size ──> within the guest's minimum and the maxima

The base is what the guest needs besides its containers, and what containers without a limit share:
`default_vcpus` and `default_memory`, as Kata's Go runtime has it. A configuration that names
`overhead_vcpus` or `overhead_memory`, keys of runtime-rs, is sized by that one's rule instead: the
overhead where there is a limit, the default where there is none. Why: decision 0009.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final, NamedTuple

from shimv2.errors import InvalidArgument

MIB: Final = 1 << 20
MILLI: Final = 1000
# Below this the guest's kernel and agent start, but a container's first allocation may fail.
# Source: own measurement; tests/integration/test_sizing.py boots it.
MINIMUM_MEMORY_MIB: Final = 128
# Whole huge pages, if the machine's memory is to be made of them.
MEMORY_STEP_MIB: Final = 2
DEFAULT_PERIOD_US: Final = 100_000
# Source: linux/threads.h: more CPUs than any Linux has. Bounds what a list like 0-9999999 costs.
MAX_CPU_NUMBER: Final = 8191

# Source: containerd pkg/cri/annotations; kubelet's sums over the pod's containers.
CPU_QUOTA: Final = "io.kubernetes.cri.sandbox-cpu-quota"
CPU_PERIOD: Final = "io.kubernetes.cri.sandbox-cpu-period"
MEMORY: Final = "io.kubernetes.cri.sandbox-memory"


class Limits(NamedTuple):
    """What containers may use together, in thousandths of a CPU and in bytes. 0: no limit named."""

    millicpus: int = 0
    memory_bytes: int = 0

    def plus(self, other: Limits) -> Limits:
        """Return the sum, each for itself."""
        return Limits(
            millicpus=self.millicpus + other.millicpus,
            memory_bytes=self.memory_bytes + other.memory_bytes,
        )

    def at_least(self, other: Limits) -> Limits:
        """Return the larger of both, each for itself."""
        return Limits(
            millicpus=max(self.millicpus, other.millicpus),
            memory_bytes=max(self.memory_bytes, other.memory_bytes),
        )


class Base(NamedTuple):
    """What the machine has besides its limits (`overhead`), and without any (`default`)."""

    default_millicpus: int
    default_memory_mib: int
    overhead_millicpus: int | None = None  # None: the default
    overhead_memory_mib: int | None = None


class Size(NamedTuple):
    """So many vCPUs, so much memory."""

    vcpus: int
    memory_mib: int


def wanted(base: Base, limits: Limits) -> Size:
    """Return the size that gives the containers what they may use, whatever the host has."""
    millicpus, memory_mib = base.default_millicpus, base.default_memory_mib
    if limits.millicpus:
        overhead = base.overhead_millicpus
        millicpus = limits.millicpus + (millicpus if overhead is None else overhead)
    if limits.memory_bytes:
        overhead = base.overhead_memory_mib
        memory_mib = _up(limits.memory_bytes, MIB) + (memory_mib if overhead is None else overhead)
        memory_mib = max(MINIMUM_MEMORY_MIB, _up(memory_mib, MEMORY_STEP_MIB) * MEMORY_STEP_MIB)
    return Size(vcpus=max(1, _up(millicpus, MILLI)), memory_mib=memory_mib)


def within(size: Size, maximum: Size) -> Size:
    """Return the size cut down to what can be had."""
    return Size(
        vcpus=min(size.vcpus, maximum.vcpus),
        memory_mib=min(size.memory_mib, maximum.memory_mib),
    )


def shortfall(size: Size, had: Size, *, maximum: Size) -> str:
    """Return the sentence for the log when a machine is smaller than wanted; "" if it isn't."""
    parts = []
    if had.vcpus < size.vcpus:
        parts.append(f"{had.vcpus} of {size.vcpus} vCPUs (`default_maxvcpus`: {maximum.vcpus})")
    if had.memory_mib < size.memory_mib:
        limit = f"`default_maxmemory`: {maximum.memory_mib}"
        parts.append(f"{had.memory_mib} of {size.memory_mib} MiB ({limit})")
    if not parts:
        return ""
    return f"the VM has {' and '.join(parts)}: its containers' limits can't be reached together"


def container_limits(resources: object) -> Limits:
    """Return the limits of one container from its spec's `linux.resources`.

    Without a quota, a cpuset limits to so many CPUs as it has. Raises `InvalidArgument`.
    """
    found = resources if isinstance(resources, dict) else {}
    cpu, memory = _table(found, "cpu"), _table(found, "memory")
    quota, period = _whole(cpu, "quota", "cpu"), _whole(cpu, "period", "cpu")
    millicpus = _millicpus(quota, period) or MILLI * len(cpu_numbers(cpu.get("cpus")))
    limit = _whole(memory, "limit", "memory")
    return Limits(millicpus=millicpus, memory_bytes=max(0, limit))


def sandbox_limits(annotations: Mapping[str, Any]) -> Limits:
    """Return a pod's limits from what CRI puts beside its sandbox. Raises `InvalidArgument`."""
    quota, period, memory = (
        _annotated(annotations, name) for name in (CPU_QUOTA, CPU_PERIOD, MEMORY)
    )
    return Limits(millicpus=_millicpus(quota, period), memory_bytes=max(0, memory))


def total(limits: Iterable[Limits]) -> Limits:
    """Return the sum; those without a limit add nothing: they share the base."""
    result = Limits()
    for one in limits:
        result = result.plus(one)
    return result


def cpu_numbers(text: object) -> tuple[int, ...]:
    """Read a list of CPUs such as "0-2,7"; each once, in order. Raises `InvalidArgument`.

    Source: cpuset(7), "List format".
    """
    if not text:
        return ()
    found: set[int] = set()
    for part in str(text).split(","):
        first, _, last = part.strip().partition("-")
        if not _is_number(first) or (last and not _is_number(last)):
            raise InvalidArgument(f"cpu.cpus is {str(text)[:100]!r}: not a list like 0-2,7")
        low, high = int(first), int(last or first)
        if not low <= high <= MAX_CPU_NUMBER:
            raise InvalidArgument(
                f"cpu.cpus is {str(text)[:100]!r}: CPUs are numbered 0 to {MAX_CPU_NUMBER}"
            )
        found.update(range(low, high + 1))
    return tuple(sorted(found))


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 6


def _millicpus(quota: int, period: int) -> int:
    return _up(quota * MILLI, period if period > 0 else DEFAULT_PERIOD_US) if quota > 0 else 0


def _up(value: int, step: int) -> int:
    return -(-value // step)


def _table(found: dict[str, Any], name: str) -> dict[str, Any]:
    table = found.get(name)
    if table is not None and not isinstance(table, dict):
        raise InvalidArgument(f"resources.{name} is not an object")
    return table or {}


def _whole(table: dict[str, Any], name: str, where: str) -> int:
    value = table.get(name)
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidArgument(f"resources.{where}.{name} must be a whole number, not {value!r}")
    return value


def _annotated(annotations: Mapping[str, Any], name: str) -> int:
    text = str(annotations.get(name, "")).strip()
    if not text:
        return 0
    try:
        return int(text)
    except ValueError:
        raise InvalidArgument(
            f"annotation {name} must be a whole number, not {text[:100]!r}"
        ) from None
