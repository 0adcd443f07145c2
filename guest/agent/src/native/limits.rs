//! The spec's resources as files of a cgroup of version 2.
//!
//! Zero in the protocol means that the spec said nothing; -1 is no limit.
//! Source: OCI runtime-spec config-linux.md; kernel cgroup-v2.rst; the conversions of shares and
//! swap are those of all OCI runtimes.

use std::io;

use crate::cgroup::Cgroup;
use crate::pb::grpc::{LinuxBlockIo, LinuxCpu, LinuxMemory, LinuxResources, LinuxThrottleDevice};
use crate::status::{Context, Result};

const DEFAULT_PERIOD_US: u64 = 100_000;

/// Sets what the resources name and leaves the rest.
pub fn apply(cgroup: &Cgroup, resources: &LinuxResources) -> Result<()> {
    for (file, value) in files(resources) {
        match cgroup.write(&file, &value) {
            // No such controller: a limit that can't hold is better told than passed over, but a
            // weight only matters where there is something to share, and a size of huge pages that
            // the guest lacks (kubelet names all of the host's) can't be used at all.
            Err(error) if error.kind() == io::ErrorKind::NotFound && may_be_absent(&file) => {}
            result => result.context(|| format!("setting {file} to {value}"))?,
        }
    }
    Ok(())
}

fn may_be_absent(file: &str) -> bool {
    file.ends_with("weight") || file.starts_with("hugetlb.")
}

fn files(resources: &LinuxResources) -> Vec<(String, String)> {
    let mut files = Vec::new();
    let mut set = |file: &str, value: String| files.push((file.to_owned(), value));
    if let Some(memory) = &resources.memory {
        memory_files(memory, &mut set);
    }
    if let Some(cpu) = &resources.cpu {
        cpu_files(cpu, &mut set);
    }
    if let Some(pids) = resources.pids.filter(|pids| pids.limit != 0) {
        set("pids.max", limit(pids.limit));
    }
    for huge in &resources.hugepage_limits {
        set(&format!("hugetlb.{}.max", huge.pagesize), huge.limit.to_string());
    }
    if let Some(block) = &resources.block_io {
        block_files(block, &mut set);
    }
    files
}

fn limit(value: i64) -> String {
    if value < 0 { "max".to_owned() } else { value.to_string() }
}

fn memory_files(memory: &LinuxMemory, set: &mut impl FnMut(&str, String)) {
    // Swap of version 1 is memory and swap together.
    if memory.swap != 0 {
        let unlimited = memory.swap < 0 || memory.limit <= 0;
        let swap = if unlimited { -1 } else { (memory.swap - memory.limit).max(0) };
        set("memory.swap.max", limit(swap));
    }
    if memory.limit != 0 {
        set("memory.max", limit(memory.limit));
    }
    if memory.reservation != 0 {
        set("memory.low", limit(memory.reservation));
    }
}

fn cpu_files(cpu: &LinuxCpu, set: &mut impl FnMut(&str, String)) {
    if cpu.shares != 0 {
        set("cpu.weight", weight(cpu.shares).to_string());
    }
    if cpu.quota != 0 || cpu.period != 0 {
        let period = if cpu.period == 0 { DEFAULT_PERIOD_US } else { cpu.period };
        let quota = if cpu.quota <= 0 { "max".to_owned() } else { cpu.quota.to_string() };
        set("cpu.max", format!("{quota} {period}"));
    }
    if !cpu.cpus.is_empty() {
        set("cpuset.cpus", cpu.cpus.clone());
    }
    if !cpu.mems.is_empty() {
        set("cpuset.mems", cpu.mems.clone());
    }
}

/// Shares 2..262144 become weight 1..10000.
fn weight(shares: u64) -> u64 {
    1 + (shares.clamp(2, 262_144) - 2) * 9999 / 262_142
}

fn block_files(block: &LinuxBlockIo, set: &mut impl FnMut(&str, String)) {
    if block.weight != 0 {
        // Weights 10..1000 of version 1 become 1..10000.
        let weight = 1 + (u64::from(block.weight.clamp(10, 1000)) - 10) * 9999 / 990;
        set("io.weight", weight.to_string());
    }
    let mut throttle = |devices: &[LinuxThrottleDevice], key: &str| {
        for device in devices {
            set("io.max", format!("{}:{} {key}={}", device.major, device.minor, device.rate));
        }
    };
    throttle(&block.throttle_read_bps_device, "rbps");
    throttle(&block.throttle_write_bps_device, "wbps");
    throttle(&block.throttle_read_iops_device, "riops");
    throttle(&block.throttle_write_iops_device, "wiops");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pb::grpc::LinuxPids;

    #[test]
    fn only_weights_and_sizes_of_huge_pages_may_be_absent() {
        assert!(may_be_absent("hugetlb.1GB.max") && may_be_absent("io.bfq.weight"));
        assert!(!may_be_absent("memory.max") && !may_be_absent("pids.max"));
    }

    #[test]
    fn zero_says_nothing_and_minus_one_is_no_limit() {
        let memory = LinuxMemory { limit: 64, swap: 96, ..LinuxMemory::default() };
        let cpu = LinuxCpu { shares: 1024, quota: -1, period: 50_000, ..LinuxCpu::default() };
        let resources = LinuxResources {
            memory: Some(memory),
            cpu: Some(cpu),
            pids: Some(LinuxPids { limit: -1 }),
            ..LinuxResources::default()
        };
        let expected = [
            ("memory.swap.max", "32"),
            ("memory.max", "64"),
            ("cpu.weight", "39"),
            ("cpu.max", "max 50000"),
            ("pids.max", "max"),
        ];
        let got = files(&resources);
        let got: Vec<_> = got.iter().map(|(file, value)| (file.as_str(), value.as_str())).collect();
        assert_eq!(got, expected);
        assert!(files(&LinuxResources::default()).is_empty());
    }

    #[test]
    fn weights_cover_the_whole_range() {
        assert_eq!((weight(2), weight(262_144), weight(0)), (1, 10_000, 1));
    }
}
