//! StatsContainer: cgroup v2's files in the terms of the protocol, which are those of version 1.
//!
//! Source: agent.proto CgroupStats; kernel cgroup-v2.rst. Unlimited is the largest number, as
//! upstream has it for memory, and 0 for pids.

use std::collections::BTreeMap;
use std::fs;

use crate::agent::Agent;
use crate::cgroup::{Cgroup, field};
use crate::network::Network;
use crate::pb::grpc;
use crate::status::Result;

const NANOSECONDS_PER_MICROSECOND: u64 = 1000;
/// Device lines of io.stat that are reported; a container can't add devices.
const MAX_IO_LINES: usize = 64;

impl Agent {
    pub async fn stats_container(
        &self,
        request: grpc::StatsContainerRequest,
    ) -> Result<grpc::StatsContainerResponse> {
        let container = self.container(&request.container_id)?;
        let cgroup = &container.cgroup;
        Ok(grpc::StatsContainerResponse {
            cgroup_stats: Some(grpc::CgroupStats {
                cpu_stats: Some(cpu(cgroup)),
                memory_stats: Some(memory(cgroup)),
                pids_stats: Some(pids(cgroup)),
                blkio_stats: Some(blkio(cgroup)),
                hugetlb_stats: hugetlb(cgroup),
            }),
            network_stats: network()?,
        })
    }
}

fn cpu(cgroup: &Cgroup) -> grpc::CpuStats {
    let text = cgroup.read("cpu.stat").unwrap_or_default();
    let value = |key| field(&text, key).unwrap_or(0);
    let nanoseconds = |key| value(key).saturating_mul(NANOSECONDS_PER_MICROSECOND);
    grpc::CpuStats {
        cpu_usage: Some(grpc::CpuUsage {
            total_usage: nanoseconds("usage_usec"),
            percpu_usage: Vec::new(),
            usage_in_kernelmode: nanoseconds("system_usec"),
            usage_in_usermode: nanoseconds("user_usec"),
        }),
        throttling_data: Some(grpc::ThrottlingData {
            periods: value("nr_periods"),
            throttled_periods: value("nr_throttled"),
            throttled_time: nanoseconds("throttled_usec"),
        }),
    }
}

fn memory(cgroup: &Cgroup) -> grpc::MemoryStats {
    let number = |file| cgroup.number(file).unwrap_or(0);
    let text = cgroup.read("memory.stat").unwrap_or_default();
    let stats: BTreeMap<String, u64> = text
        .lines()
        .filter_map(|line| {
            let (key, value) = line.split_once(' ')?;
            Some((key.to_owned(), value.parse().ok()?))
        })
        .collect();
    let events = cgroup.read("memory.events").unwrap_or_default();
    let data = |usage, max_usage, failcnt, limit| {
        Some(grpc::MemoryData { usage, max_usage, failcnt, limit })
    };
    let usage = number("memory.current");
    let peak = cgroup.number("memory.peak").unwrap_or(usage);
    let failed = field(&events, "max").unwrap_or(0);
    let swap = number("memory.swap.current");
    let kernel = stats.get("kernel").copied().unwrap_or(0);
    grpc::MemoryStats {
        cache: stats.get("file").copied().unwrap_or(0),
        usage: data(usage, peak, failed, number("memory.max")),
        swap_usage: data(swap, swap, 0, number("memory.swap.max")),
        kernel_usage: data(kernel, kernel, 0, u64::MAX),
        use_hierarchy: true,
        stats,
    }
}

fn pids(cgroup: &Cgroup) -> grpc::PidsStats {
    let limit = cgroup.number("pids.max").filter(|limit| *limit != u64::MAX).unwrap_or(0);
    grpc::PidsStats { current: cgroup.number("pids.current").unwrap_or(0), limit }
}

/// Lines are `MAJOR:MINOR rbytes=N wbytes=N rios=N wios=N dbytes=N dios=N`.
fn blkio(cgroup: &Cgroup) -> grpc::BlkioStats {
    let mut stats = grpc::BlkioStats::default();
    let text = cgroup.read("io.stat").unwrap_or_default();
    for line in text.lines().take(MAX_IO_LINES) {
        let mut fields = line.split_ascii_whitespace();
        let device = fields.next().and_then(|device| device.split_once(':'));
        let Some((major, minor)) = device else { continue };
        let (Ok(major), Ok(minor)) = (major.parse(), minor.parse()) else { continue };
        for (key, value) in fields.filter_map(|part| part.split_once('=')) {
            let entry = |op: &str| grpc::BlkioStatsEntry {
                major,
                minor,
                op: op.to_owned(),
                value: value.parse().unwrap_or(0),
            };
            match key {
                "rbytes" => stats.io_service_bytes_recursive.push(entry("Read")),
                "wbytes" => stats.io_service_bytes_recursive.push(entry("Write")),
                "dbytes" => stats.io_service_bytes_recursive.push(entry("Discard")),
                "rios" => stats.io_serviced_recursive.push(entry("Read")),
                "wios" => stats.io_serviced_recursive.push(entry("Write")),
                "dios" => stats.io_serviced_recursive.push(entry("Discard")),
                _ => {}
            }
        }
    }
    stats
}

fn hugetlb(cgroup: &Cgroup) -> BTreeMap<String, grpc::HugetlbStats> {
    let Ok(entries) = fs::read_dir(&cgroup.path) else { return BTreeMap::new() };
    entries
        .flatten()
        .filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            let size = name.strip_prefix("hugetlb.")?.strip_suffix(".current")?.to_owned();
            if size.ends_with(".rsvd") {
                return None;
            }
            let usage = cgroup.number(&name).unwrap_or(0);
            let events = cgroup.read(&format!("hugetlb.{size}.events")).unwrap_or_default();
            let failcnt = field(&events, "max").unwrap_or(0);
            Some((size, grpc::HugetlbStats { usage, max_usage: usage, failcnt }))
        })
        .collect()
}

/// The pod's interfaces; every container of the pod has the same.
fn network() -> Result<Vec<grpc::NetworkStats>> {
    let links = Network::open()?.links()?;
    let read = |name: &str, file: &str| {
        let path = format!("/sys/class/net/{name}/statistics/{file}");
        fs::read_to_string(path).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0)
    };
    let describe = |name: &str| grpc::NetworkStats {
        name: name.to_owned(),
        rx_bytes: read(name, "rx_bytes"),
        rx_packets: read(name, "rx_packets"),
        rx_errors: read(name, "rx_errors"),
        rx_dropped: read(name, "rx_dropped"),
        tx_bytes: read(name, "tx_bytes"),
        tx_packets: read(name, "tx_packets"),
        tx_errors: read(name, "tx_errors"),
        tx_dropped: read(name, "tx_dropped"),
    };
    Ok(links.iter().map(|link| describe(&link.name)).collect())
}
