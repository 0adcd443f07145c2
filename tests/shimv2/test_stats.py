"""The agent's counters in containerd's two messages."""

from __future__ import annotations

from typing import Any

import pytest

from agent_proto.pb import agent_pb2
from netns.model import Statistics
from shimv2.pb import cgroups_v1_pb2, cgroups_v2_pb2
from shimv2.stats import V1_TYPE_URL, V2_TYPE_URL, metrics


def counters() -> Any:
    stats = agent_pb2.StatsContainerResponse()
    cgroup = stats.cgroup_stats
    cgroup.cpu_stats.cpu_usage.total_usage = 9_000_000
    cgroup.cpu_stats.cpu_usage.usage_in_kernelmode = 3_000_000
    cgroup.cpu_stats.cpu_usage.usage_in_usermode = 6_000_000
    cgroup.memory_stats.usage.usage = 100
    cgroup.memory_stats.usage.limit = 200
    for key, value in {"anon": 10, "file": 20, "inactive_file": 5, "pgfault": 7, "oom_kill": 1,
                       "pgmajfault": 2}.items():  # fmt: skip
        cgroup.memory_stats.stats[key] = value
    cgroup.pids_stats.current = 3
    for minor, op, value in ((0, "Read", 11), (0, "Write", 12), (16, "read", 13)):
        cgroup.blkio_stats.io_service_bytes_recursive.add(major=8, minor=minor, op=op, value=value)
    cgroup.blkio_stats.io_serviced_recursive.add(major=8, minor=0, op="read", value=1)
    stats.network_stats.add(name="eth0", rx_bytes=5, tx_dropped=6)
    return stats


def test_user_and_system_time_are_not_swapped() -> None:
    url, value = metrics(counters(), unified=True)
    assert url == V2_TYPE_URL
    message = cgroups_v2_pb2.Metrics.FromString(value)
    assert (message.cpu.usage_usec, message.cpu.user_usec, message.cpu.system_usec) == (
        9000,
        6000,
        3000,
    )


def test_every_block_device_survives() -> None:
    message = cgroups_v2_pb2.Metrics.FromString(metrics(counters(), unified=True)[1])
    found = {(u.major, u.minor): (u.rbytes, u.wbytes, u.rios) for u in message.io.usage}
    assert found == {(8, 0): (11, 12, 1), (8, 16): (13, 0, 0)}


def test_v2_has_what_cri_reads() -> None:
    message = cgroups_v2_pb2.Metrics.FromString(metrics(counters(), unified=True)[1])
    assert (message.memory.usage, message.memory.usage_limit) == (100, 200)
    assert (message.memory.inactive_file, message.memory.anon, message.memory.pgfault) == (5, 10, 7)
    assert message.memory_events.oom_kill == 1
    assert message.pids.current == 3
    assert message.network[0].tx_dropped == 6


def test_v1_has_what_cri_reads() -> None:
    url, value = metrics(counters(), unified=False)
    assert url == V1_TYPE_URL
    message = cgroups_v1_pb2.Metrics.FromString(value)
    assert (message.cpu.usage.total, message.cpu.usage.kernel, message.cpu.usage.user) == (
        9_000_000,
        3_000_000,
        6_000_000,
    )
    assert (message.memory.usage.usage, message.memory.usage.limit) == (100, 200)
    assert (message.memory.rss, message.memory.cache) == (10, 20)
    assert message.memory.total_inactive_file == 5
    assert message.memory_oom_control.oom_kill == 1
    assert [e.value for e in message.blkio.io_service_bytes_recursive] == [11, 12, 13]


def test_an_empty_answer_still_has_cpu_and_memory() -> None:
    for unified in (True, False):
        value = metrics(agent_pb2.StatsContainerResponse(), unified=unified)[1]
        kind: Any = cgroups_v2_pb2.Metrics if unified else cgroups_v1_pb2.Metrics
        message = kind.FromString(value)
        assert message.HasField("cpu")
        assert message.HasField("memory")


def test_a_flood_of_entries_is_cut() -> None:
    stats = agent_pb2.StatsContainerResponse()
    for minor in range(100_000):
        stats.cgroup_stats.blkio_stats.io_service_bytes_recursive.add(minor=minor, op="read")
    message = cgroups_v2_pb2.Metrics.FromString(metrics(stats, unified=True)[1])
    assert len(message.io.usage) == 256


@pytest.mark.parametrize("unified", [True, False])
def test_what_the_host_counted_on_the_pods_interfaces_takes_the_guests_place(
    unified: bool,
) -> None:
    stats = agent_pb2.StatsContainerResponse()
    stats.network_stats.add(name="lo", rx_bytes=7)
    names = ("rx_bytes", "rx_packets", "rx_errors", "rx_dropped")
    counted = Statistics("eth0", 1, 2, 3, 4, 5, 6, 7, 8)
    _, encoded = metrics(stats, unified=unified, network=[counted])
    kind = cgroups_v2_pb2.Metrics if unified else cgroups_v1_pb2.Metrics
    (shown,) = kind.FromString(encoded).network
    assert shown.name == "eth0"
    assert [getattr(shown, name) for name in names] == [1, 2, 3, 4]
    assert (shown.tx_bytes, shown.tx_dropped) == (5, 8)
