"""The agent's statistics of a container -> the metrics message that containerd's clients expect.

Pure, apart from one look at the host's cgroup mode: CRI, `ctr` and nerdctl accept only the message
of the host's own mode. Guest numbers are data for display: lists are capped, nothing is computed
with them but unit changes.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

from shimv2.pb import cgroups_v1_pb2, cgroups_v2_pb2

if TYPE_CHECKING:
    from collections.abc import Iterable

    from agent_proto.pb import agent_pb2
    from netns.model import Statistics

V1_TYPE_URL: Final = "io.containerd.cgroups.v1.Metrics"
V2_TYPE_URL: Final = "io.containerd.cgroups.v2.Metrics"
_MAX_ENTRIES: Final = 256
_NS_PER_US: Final = 1000


@lru_cache(maxsize=1)
def host_is_unified() -> bool:
    """Whether the host runs cgroup v2 alone. Source: statfs CGROUP2_SUPER_MAGIC on the root."""
    return Path("/sys/fs/cgroup/cgroup.controllers").exists()


def metrics(
    stats: agent_pb2.StatsContainerResponse,
    *,
    unified: bool,
    network: Iterable[Statistics] = (),
) -> tuple[str, bytes]:
    """The type URL and the encoded message for a host of that cgroup mode.

    `network` is what the host counted on the pod's interfaces; it takes the guest's place.
    """
    if network := tuple(network):
        del stats.network_stats[:]
        for one in network:
            stats.network_stats.add(**one._asdict())
    if unified:
        return V2_TYPE_URL, _v2(stats).SerializeToString()
    return V1_TYPE_URL, _v1(stats).SerializeToString()


def _v2(stats: agent_pb2.StatsContainerResponse) -> cgroups_v2_pb2.Metrics:
    cgroup = stats.cgroup_stats
    message = cgroups_v2_pb2.Metrics()
    message.pids.current = cgroup.pids_stats.current
    message.pids.limit = cgroup.pids_stats.limit
    usage = cgroup.cpu_stats.cpu_usage
    message.cpu.usage_usec = usage.total_usage // _NS_PER_US
    message.cpu.user_usec = usage.usage_in_usermode // _NS_PER_US
    message.cpu.system_usec = usage.usage_in_kernelmode // _NS_PER_US
    throttling = cgroup.cpu_stats.throttling_data
    message.cpu.nr_periods = throttling.periods
    message.cpu.nr_throttled = throttling.throttled_periods
    message.cpu.throttled_usec = throttling.throttled_time // _NS_PER_US
    _v2_memory(message.memory, cgroup.memory_stats)
    message.memory_events.oom_kill = cgroup.memory_stats.stats.get("oom_kill", 0)
    message.memory_events.oom = cgroup.memory_stats.stats.get("oom", 0)
    _v2_io(message.io, cgroup.blkio_stats)
    for size in sorted(cgroup.hugetlb_stats)[:_MAX_ENTRIES]:
        entry = message.hugetlb.add()
        entry.pagesize = size
        entry.current = cgroup.hugetlb_stats[size].usage
        entry.max = cgroup.hugetlb_stats[size].max_usage
    for network in stats.network_stats[:_MAX_ENTRIES]:
        _copy_network(message.network.add(), network)
    return message


# memory.stat keys of cgroup v2 that the metrics message has under the same name.
_V2_MEMORY_KEYS: Final = (
    "anon", "file", "kernel_stack", "slab", "sock", "shmem", "file_mapped", "file_dirty",
    "file_writeback", "anon_thp", "inactive_anon", "active_anon", "inactive_file", "active_file",
    "unevictable", "slab_reclaimable", "slab_unreclaimable", "pgfault", "pgmajfault",
    "workingset_refault", "workingset_activate", "workingset_nodereclaim", "pgrefill", "pgscan",
    "pgsteal", "pgactivate", "pgdeactivate", "pglazyfree", "pglazyfreed", "thp_fault_alloc",
    "thp_collapse_alloc",
)  # fmt: skip


def _v2_memory(memory: cgroups_v2_pb2.MemoryStat, stats: agent_pb2.MemoryStats) -> None:
    for key in _V2_MEMORY_KEYS:
        value = stats.stats.get(key)
        if value:
            setattr(memory, key, value)
    memory.usage = stats.usage.usage
    memory.usage_limit = stats.usage.limit
    memory.max_usage = stats.usage.max_usage
    memory.swap_usage = stats.swap_usage.usage
    memory.swap_limit = stats.swap_usage.limit


def _v2_io(io: cgroups_v2_pb2.IOStat, stats: agent_pb2.BlkioStats) -> None:
    """One entry a device: the agent lists bytes and operations by device and kind."""
    io.SetInParent()
    found: dict[tuple[int, int], dict[str, int]] = {}
    for entries, suffix in (
        (stats.io_service_bytes_recursive, "bytes"),
        (stats.io_serviced_recursive, "ios"),
    ):
        for entry in entries[:_MAX_ENTRIES]:
            kind = entry.op.lower()
            if kind in ("read", "write"):
                counters = found.setdefault((entry.major, entry.minor), {})
                counters[kind[0] + suffix] = entry.value
    for (major, minor), counters in found.items():
        usage = io.usage.add()
        usage.major, usage.minor = major, minor
        for name, value in counters.items():
            setattr(usage, name, value)


def _v1(stats: agent_pb2.StatsContainerResponse) -> cgroups_v1_pb2.Metrics:
    cgroup = stats.cgroup_stats
    message = cgroups_v1_pb2.Metrics()
    message.pids.current = cgroup.pids_stats.current
    message.pids.limit = cgroup.pids_stats.limit
    usage = cgroup.cpu_stats.cpu_usage
    message.cpu.usage.total = usage.total_usage
    message.cpu.usage.kernel = usage.usage_in_kernelmode
    message.cpu.usage.user = usage.usage_in_usermode
    message.cpu.usage.per_cpu.extend(usage.percpu_usage[:_MAX_ENTRIES])
    throttling = cgroup.cpu_stats.throttling_data
    message.cpu.throttling.periods = throttling.periods
    message.cpu.throttling.throttled_periods = throttling.throttled_periods
    message.cpu.throttling.throttled_time = throttling.throttled_time
    _v1_memory(message.memory, cgroup.memory_stats)
    message.memory_oom_control.oom_kill = cgroup.memory_stats.stats.get("oom_kill", 0)
    message.blkio.SetInParent()  # nerdctl looks into it without asking whether it is there
    for target, entries in (
        (message.blkio.io_service_bytes_recursive, cgroup.blkio_stats.io_service_bytes_recursive),
        (message.blkio.io_serviced_recursive, cgroup.blkio_stats.io_serviced_recursive),
        (message.blkio.io_queued_recursive, cgroup.blkio_stats.io_queued_recursive),
        (message.blkio.io_service_time_recursive, cgroup.blkio_stats.io_service_time_recursive),
        (message.blkio.io_wait_time_recursive, cgroup.blkio_stats.io_wait_time_recursive),
        (message.blkio.io_merged_recursive, cgroup.blkio_stats.io_merged_recursive),
        (message.blkio.io_time_recursive, cgroup.blkio_stats.io_time_recursive),
        (message.blkio.sectors_recursive, cgroup.blkio_stats.sectors_recursive),
    ):
        for entry in entries[:_MAX_ENTRIES]:
            target.add(op=entry.op, major=entry.major, minor=entry.minor, value=entry.value)
    for size in sorted(cgroup.hugetlb_stats)[:_MAX_ENTRIES]:
        found = cgroup.hugetlb_stats[size]
        message.hugetlb.add(
            usage=found.usage, max=found.max_usage, failcnt=found.failcnt, pagesize=size
        )
    for network in stats.network_stats[:_MAX_ENTRIES]:
        _copy_network(message.network.add(), network)
    return message


def _v1_memory(memory: cgroups_v1_pb2.MemoryStat, stats: agent_pb2.MemoryStats) -> None:
    """Fill v1's fields from either mode's memory.stat: the guest has cgroup v2."""
    found = stats.stats
    memory.cache = stats.cache or found.get("file", 0)
    memory.rss = found.get("rss") or found.get("anon", 0)
    memory.mapped_file = found.get("mapped_file") or found.get("file_mapped", 0)
    memory.pg_fault = found.get("pgfault", 0)
    memory.pg_maj_fault = found.get("pgmajfault", 0)
    memory.inactive_file = found.get("inactive_file", 0)
    memory.active_file = found.get("active_file", 0)
    memory.inactive_anon = found.get("inactive_anon", 0)
    memory.active_anon = found.get("active_anon", 0)
    memory.total_cache = memory.cache
    memory.total_rss = memory.rss
    memory.total_inactive_file = found.get("total_inactive_file") or memory.inactive_file
    for target, data in (
        (memory.usage, stats.usage),
        (memory.swap, stats.swap_usage),
        (memory.kernel, stats.kernel_usage),
    ):
        target.limit, target.usage = data.limit, data.usage
        target.max, target.failcnt = data.max_usage, data.failcnt


def _copy_network(
    target: cgroups_v1_pb2.NetworkStat | cgroups_v2_pb2.NetworkStat,
    network: agent_pb2.NetworkStats,
) -> None:
    target.name = network.name[:64]
    for direction in ("rx", "tx"):
        for counter in ("bytes", "packets", "errors", "dropped"):
            name = f"{direction}_{counter}"
            setattr(target, name, getattr(network, name))
