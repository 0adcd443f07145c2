//! RPCs on the guest as a machine: memory, processors, time, randomness, swap.

use std::ffi::CString;
use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::Duration;

use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_settime};

use crate::agent::Agent;
use crate::block;
use crate::network::Network;
use crate::pb::grpc;
use crate::status::{Context, Result, Status};
use crate::{devices, storage, warn};

const MEMORY: &str = "/sys/devices/system/memory";
const CPUS: &str = "/sys/devices/system/cpu";
/// Bits of an entropy pool; more than that is no more random.
const MAX_SEED_BYTES: usize = 4096;
/// From the hot-plug of a processor to its being online.
const ONLINE_TIMEOUT: Duration = Duration::from_secs(5);

nix::ioctl_write_ptr_bad!(
    add_entropy,
    nix::request_code_write!(b'R', 0x03, std::mem::size_of::<[libc::c_int; 2]>()),
    Entropy
);

/// Source: linux/random.h, struct rand_pool_info.
#[repr(C)]
pub struct Entropy {
    bits: libc::c_int,
    bytes: libc::c_int,
    data: [u8; MAX_SEED_BYTES],
}

impl Agent {
    pub async fn get_guest_details(
        &self,
        request: grpc::GuestDetailsRequest,
    ) -> Result<grpc::GuestDetailsResponse> {
        let block_bytes = if request.mem_block_size { memory_block_bytes()? } else { 0 };
        let probe = Path::new(MEMORY).join("probe").exists();
        let names = |list: &[&str]| list.iter().map(ToString::to_string).collect();
        Ok(grpc::GuestDetailsResponse {
            mem_block_size_bytes: block_bytes,
            agent_details: Some(grpc::AgentDetails {
                version: env!("CARGO_PKG_VERSION").to_owned(),
                init_daemon: self.is_init,
                device_handlers: names(&devices::HANDLERS),
                storage_handlers: names(&storage::HANDLERS),
                supports_seccomp: fs::exists("/proc/sys/kernel/seccomp").unwrap_or(false),
                extra_features: Vec::new(),
            }),
            support_mem_hotplug_probe: request.mem_hotplug_probe && probe,
        })
    }

    /// Puts hot-plugged processors and memory to work. With `wait`, answers only when `nb_cpus`
    /// processors that were offline are online.
    pub async fn online_cpu_mem(&self, request: grpc::OnlineCpuMemRequest) -> Result<()> {
        if !request.cpu_only {
            online_below(MEMORY, "memory");
        }
        let mut left = request.nb_cpus.saturating_sub(online_below(CPUS, "cpu"));
        if left > 0 && request.wait {
            // The kernel tells of each processor that has been plugged in.
            let what = format!("{left} more processors");
            let online = || {
                left = left.saturating_sub(online_below(CPUS, "cpu"));
                (left == 0).then_some(())
            };
            block::wait_for(&what, ONLINE_TIMEOUT, online).await?;
        }
        // An unset cpuset.cpus of cgroup v2 follows its parent, so no container has to be told.
        Ok(())
    }

    pub async fn mem_hotplug_by_probe(
        &self,
        request: grpc::MemHotplugByProbeRequest,
    ) -> Result<()> {
        let file = Path::new(MEMORY).join("probe");
        if !file.exists() {
            return Err(Status::unimplemented("this guest kernel has no memory probe interface"));
        }
        for address in request.mem_hotplug_probe_addr {
            fs::write(&file, format!("{address:#x}"))
                .context(|| format!("probing memory at {address:#x}"))?;
        }
        Ok(())
    }

    /// Feeds the seed to the kernel and makes it use it at once.
    pub async fn reseed_random_dev(&self, request: grpc::ReseedRandomDevRequest) -> Result<()> {
        let length = request.data.len();
        if length == 0 || length > MAX_SEED_BYTES {
            return Err(Status::invalid(format!("a seed of {length} bytes")));
        }
        let size = i32::try_from(length).context(|| "seed".to_owned())?;
        let mut entropy = Entropy { bits: size * 8, bytes: size, data: [0; MAX_SEED_BYTES] };
        entropy.data[..length].copy_from_slice(&request.data);
        let device = File::options()
            .write(true)
            .open("/dev/random")
            .context(|| "opening /dev/random".to_owned())?;
        // SAFETY: RNDADDENTROPY reads two ints and `bytes` bytes, all inside of the structure.
        unsafe { add_entropy(device.as_raw_fd(), &raw const entropy) }
            .context(|| "adding entropy".to_owned())?;
        // SAFETY: RNDRESEEDCRNG takes no argument.
        let result =
            unsafe { libc::ioctl(device.as_raw_fd(), nix::request_code_none!(b'R', 0x07)) };
        nix::errno::Errno::result(result).context(|| "reseeding".to_owned())?;
        Ok(())
    }

    pub async fn set_guest_date_time(&self, request: grpc::SetGuestDateTimeRequest) -> Result<()> {
        if !self.is_init {
            return Err(Status::unimplemented("the clock belongs to the host of a plain process"));
        }
        if request.sec <= 0 || !(0..1_000_000).contains(&request.usec) {
            return Err(Status::invalid(format!("time {}.{:06}", request.sec, request.usec)));
        }
        clock_settime(ClockId::CLOCK_REALTIME, TimeSpec::new(request.sec, request.usec * 1000))
            .context(|| "setting the clock".to_owned())
    }

    pub async fn add_swap(&self, request: grpc::AddSwapRequest) -> Result<()> {
        let slots: Vec<String> =
            request.pci_path.iter().map(|slot| format!("{slot:02x}")).collect();
        let node = block::by_pci_path(&slots.join("/"), self.config.hotplug_timeout).await?;
        swap_on(&node)
    }

    pub async fn add_swap_path(&self, request: grpc::AddSwapPathRequest) -> Result<()> {
        let node = block::by_node(&request.path, self.config.hotplug_timeout).await?;
        swap_on(&node)
    }

    pub async fn set_policy(&self, _: grpc::SetPolicyRequest) -> Result<()> {
        Err(Status::unimplemented(
            "SetPolicy: this agent has no Rego engine, so it can't enforce a policy",
        ))
    }

    pub async fn mem_agent_memcg_set(&self, _: grpc::MemAgentMemcgConfig) -> Result<()> {
        Err(Status::unimplemented("MemAgentMemcgSet: this agent reclaims no memory by itself"))
    }

    pub async fn mem_agent_compact_set(&self, _: grpc::MemAgentCompactConfig) -> Result<()> {
        Err(Status::unimplemented("MemAgentCompactSet: this agent compacts no memory by itself"))
    }

    pub async fn get_metrics(&self, _: grpc::GetMetricsRequest) -> Result<grpc::Metrics> {
        Ok(grpc::Metrics { metrics: crate::metrics::collect(&Network::open()?.links()?) })
    }
}

fn memory_block_bytes() -> Result<u64> {
    let file = Path::new(MEMORY).join("block_size_bytes");
    // A kernel without memory hotplug has no such file.
    let Ok(text) = fs::read_to_string(file) else { return Ok(0) };
    u64::from_str_radix(text.trim(), 16).context(|| format!("memory block size {text:?}"))
}

/// Puts everything `<name>N` online that is not; says how many became so.
fn online_below(directory: &str, name: &str) -> u32 {
    let Ok(entries) = fs::read_dir(directory) else { return 0 };
    let mut count = 0;
    for entry in entries.flatten() {
        let file_name = entry.file_name();
        let number = file_name.to_str().and_then(|text| text.strip_prefix(name));
        if !number.is_some_and(|text| text.bytes().all(|byte| byte.is_ascii_digit())) {
            continue;
        }
        let switch = entry.path().join("online");
        if fs::read_to_string(&switch).is_ok_and(|text| text.trim() == "0") {
            match fs::write(&switch, "1") {
                Ok(()) => count += 1,
                Err(error) => warn!("{}: {error}", switch.display()),
            }
        }
    }
    count
}

fn swap_on(node: &str) -> Result<()> {
    let path = CString::new(node).context(|| node.to_owned())?;
    // SAFETY: swapon reads a NUL-terminated string that lives for the call.
    let result = unsafe { libc::swapon(path.as_ptr(), 0) };
    nix::errno::Errno::result(result).context(|| format!("swapping to {node}"))?;
    Ok(())
}
