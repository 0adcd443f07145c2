"""What a sandbox uses on the host, from the files of its cgroup, in the agent's own message.

So that one conversion (`stats`) serves containers, whose figures come from the guest, and pods,
whose figures are the host's: the VMM with the guest's memory, its daemons and the shim.
Source: kernel cgroup-v1/*.rst, cgroup-v2.rst.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from agent_proto.pb import agent_pb2
from shimv2.cgroup_files import numbers, read, value

if TYPE_CHECKING:
    from shimv2.sandbox_cgroup import SandboxCgroup

_NS_PER_US: Final = 1000
_MAX_DEVICES: Final = 64


def read_statistics(cgroup: SandboxCgroup) -> agent_pb2.StatsContainerResponse:
    """Read everything there is; a file that is missing counts as zero."""
    found = agent_pb2.StatsContainerResponse()
    if cgroup.is_unified:
        _unified(found.cgroup_stats, cgroup.of(""))
    else:
        _version_1(found.cgroup_stats, cgroup)
    return found


def _unified(found: agent_pb2.CgroupStats, directory: str) -> None:
    cpu = numbers(read(f"{directory}/cpu.stat"))
    usage, throttling = found.cpu_stats.cpu_usage, found.cpu_stats.throttling_data
    usage.total_usage = cpu.get("usage_usec", 0) * _NS_PER_US
    usage.usage_in_usermode = cpu.get("user_usec", 0) * _NS_PER_US
    usage.usage_in_kernelmode = cpu.get("system_usec", 0) * _NS_PER_US
    throttling.periods = cpu.get("nr_periods", 0)
    throttling.throttled_periods = cpu.get("nr_throttled", 0)
    throttling.throttled_time = cpu.get("throttled_usec", 0) * _NS_PER_US
    memory = found.memory_stats
    memory.stats.update(numbers(read(f"{directory}/memory.stat")))
    events = numbers(read(f"{directory}/memory.events"))
    memory.stats.update({key: events.get(key, 0) for key in ("oom", "oom_kill")})
    memory.cache = memory.stats.get("file", 0)
    memory.usage.usage = value(f"{directory}/memory.current")
    memory.usage.max_usage = value(f"{directory}/memory.peak")
    memory.usage.limit = value(f"{directory}/memory.max")
    memory.usage.failcnt = events.get("max", 0)
    memory.swap_usage.usage = value(f"{directory}/memory.swap.current")
    memory.swap_usage.limit = value(f"{directory}/memory.swap.max")
    found.pids_stats.current = value(f"{directory}/pids.current")
    _unified_io(found.blkio_stats, read(f"{directory}/io.stat"))


def _unified_io(found: agent_pb2.BlkioStats, text: str) -> None:
    for line in text.splitlines()[:_MAX_DEVICES]:
        device, *pairs = line.split()
        major, _, minor = device.partition(":")
        for name, _, count in (pair.partition("=") for pair in pairs):
            kind = {"r": "Read", "w": "Write"}.get(name[0])
            target = found.io_service_bytes_recursive
            if name.endswith("ios"):
                target = found.io_serviced_recursive
            if kind is not None and count.isdigit():
                target.add(op=kind, major=int(major), minor=int(minor), value=int(count))


def _version_1(found: agent_pb2.CgroupStats, cgroup: SandboxCgroup) -> None:
    usage, throttling = found.cpu_stats.cpu_usage, found.cpu_stats.throttling_data
    accounts = cgroup.of("cpuacct")
    usage.total_usage = value(f"{accounts}/cpuacct.usage")
    ticks = numbers(read(f"{accounts}/cpuacct.stat"))
    tick_ns = 1_000_000_000 // os.sysconf("SC_CLK_TCK")
    usage.usage_in_usermode = ticks.get("user", 0) * tick_ns
    usage.usage_in_kernelmode = ticks.get("system", 0) * tick_ns
    cpu = numbers(read(f"{cgroup.of('cpu')}/cpu.stat"))
    throttling.periods = cpu.get("nr_periods", 0)
    throttling.throttled_periods = cpu.get("nr_throttled", 0)
    throttling.throttled_time = cpu.get("throttled_time", 0)
    _version_1_memory(found.memory_stats, cgroup.of("memory"))
    found.pids_stats.current = value(f"{cgroup.of('pids')}/pids.current")
    block = cgroup.of("blkio")
    for name, target in (
        ("io_service_bytes", found.blkio_stats.io_service_bytes_recursive),
        ("io_serviced", found.blkio_stats.io_serviced_recursive),
    ):
        for line in read(f"{block}/blkio.throttle.{name}_recursive").splitlines()[:_MAX_DEVICES]:
            device, *rest = line.split()
            major, colon, minor = device.partition(":")
            if colon and len(rest) == 2 and rest[1].isdigit():
                target.add(op=rest[0], major=int(major), minor=int(minor), value=int(rest[1]))


def _version_1_memory(memory: agent_pb2.MemoryStats, directory: str) -> None:
    memory.stats.update(numbers(read(f"{directory}/memory.stat")))
    oom = numbers(read(f"{directory}/memory.oom_control"))
    memory.stats["oom_kill"] = oom.get("oom_kill", 0)
    memory.cache = memory.stats.get("cache", 0)
    memory.use_hierarchy = True
    for data, name in (
        (memory.usage, "memory"),
        (memory.swap_usage, "memory.memsw"),
        (memory.kernel_usage, "memory.kmem"),
    ):
        data.usage = value(f"{directory}/{name}.usage_in_bytes")
        data.max_usage = value(f"{directory}/{name}.max_usage_in_bytes")
        data.limit = value(f"{directory}/{name}.limit_in_bytes")
        data.failcnt = value(f"{directory}/{name}.failcnt")
