//! Guest agent of kata-shimv2: serves Kata's agent protocol to the host's shim over ttrpc.
//!
//! As PID 1 it owns the machine: it prepares it, reaps, and turns it off. With `--listen unix:/path`
//! it is a plain process without those duties, which is how tests on a host drive it.

mod agent;
mod beneath;
mod block;
mod boot;
mod cgroup;
mod config;
mod container;
mod copy_file;
mod devices;
mod forward;
mod fs_group;
mod hugepages;
mod io;
mod json;
mod logging;
mod metrics;
mod modprobe;
mod modules;
mod mount_options;
mod native;
mod netlink;
mod network;
mod oom;
mod overlay;
mod pb;
mod pids;
mod reaper;
mod replace;
mod rpc_container;
mod rpc_guest;
mod rpc_network;
mod rpc_process;
mod rpc_sandbox;
mod rpc_stats;
mod rpc_volume;
mod sandbox;
mod settle;
mod spec;
mod status;
mod stdio;
mod storage;
mod submount;
mod ttrpc;
mod turns;
mod vsock;
mod watchable;

use std::process::ExitCode;
use std::rc::Rc;
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};
use tokio::task::LocalSet;

use crate::agent::Agent;
use crate::config::Config;
use crate::json::Object;
use crate::reaper::Reaper;
use crate::status::{Code, Context, Result};

/// A host that wants to be told listens already, so it takes the line at once.
const ANNOUNCE_TIMEOUT: Duration = Duration::from_millis(500);

/// Keeps a lack of descriptors from becoming a busy loop.
const ACCEPT_PAUSE: Duration = Duration::from_millis(20);

/// Milliseconds since the kernel's clock began at the steps of the start.
#[derive(Default)]
struct BootTimes {
    init: u64,
    modules: u64,
    listening: u64,
}

fn uptime_ms() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC)
        .map_or(0, |time| time.tv_sec() * 1000 + time.tv_nsec() / 1_000_000);
    u64::try_from(now).unwrap_or(0)
}

fn main() -> ExitCode {
    let mut times = BootTimes { init: uptime_ms(), ..BootTimes::default() };
    let is_pid_1 = std::process::id() == 1;
    if !is_pid_1 && std::env::args().nth(1).is_some_and(|argument| argument == "--version") {
        println!("{}", env!("CARGO_PKG_VERSION"));
        return ExitCode::SUCCESS;
    }
    if !is_pid_1 && std::env::args().nth(1).is_some_and(|argument| argument == "-q") {
        return run_as_modprobe();
    }
    // The kernel gives init the words of its command line that it doesn't know (`nokaslr` of a PVH
    // boot), so an argument alone doesn't mean that a test runs us in a pid namespace.
    let is_init = is_pid_1 && !std::env::args().any(|argument| argument == "--listen");
    let config = match configure(is_init, &mut times) {
        Ok(config) => config,
        Err(message) => {
            eprintln!("agent: {message}");
            return ExitCode::from(2);
        }
    };
    logging::set_level(&config.log_level);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let served = runtime
        .context(|| "event loop".to_owned())
        .and_then(|runtime| LocalSet::new().block_on(&runtime, serve(config, is_init, times)));
    if let Err(status) = served {
        error!("{status}");
    }
    ExitCode::FAILURE
}

/// The kernel asks for a module by running `modprobe -q -- ALIAS`.
fn run_as_modprobe() -> ExitCode {
    let alias = std::env::args().nth(3).unwrap_or_default();
    match modules::load_by_name(&alias, "") {
        Ok(()) => ExitCode::SUCCESS,
        Err(status) => {
            // Most that is asked for exists nowhere, and whoever asked is told.
            if status.code != Code::NotFound {
                logging::use_kernel_log();
                error!("{status}");
            }
            ExitCode::FAILURE
        }
    }
}

fn configure(is_init: bool, times: &mut BootTimes) -> std::result::Result<Config, String> {
    if !is_init {
        return Config::from_args(std::env::args().skip(1));
    }
    boot::prepare_machine().map_err(|status| status.message)?;
    logging::use_kernel_log();
    modules::load_transport();
    times.modules = uptime_ms();
    let cmdline = std::fs::read_to_string("/proc/cmdline").map_err(|error| error.to_string())?;
    Ok(Config::from_cmdline(&cmdline))
}

/// Serves for ever; returns only if it can't begin.
async fn serve(config: Config, is_init: bool, mut times: BootTimes) -> Result<()> {
    let listener = vsock::listen_on(&config.address)
        .context(|| format!("listening on {:?}", config.address))?;
    times.listening = uptime_ms();
    if !is_init {
        nix::sys::prctl::set_child_subreaper(true).context(|| "subreaper".to_owned())?;
    }
    let reaper = Rc::new(Reaper::new().context(|| "reaper".to_owned())?);
    let (ready_port, forward_port) = (config.ready_port, config.forward_port);
    let agent = Rc::new(Agent::new(config, is_init, reaper.clone())?);
    tokio::task::spawn_local(async move { reaper.run().await });
    if ready_port != 0 {
        let _ = tokio::time::timeout(ANNOUNCE_TIMEOUT, announce(ready_port, times)).await;
    }
    let watcher = agent.clone();
    tokio::task::spawn_local(async move { watcher.oom.run().await });
    tokio::task::spawn_local(agent.clone().settle());
    if forward_port != 0 {
        tokio::task::spawn_local(forward::serve(forward_port));
    }
    loop {
        match vsock::accept(&listener).await {
            Ok(socket) => {
                tokio::task::spawn_local(ttrpc::serve(socket, agent.clone()));
            }
            Err(error) => {
                // The peer was gone before it was let in, or descriptors have run out for a while.
                warn!("accepting: {error}");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Tells the host that the agent listens, so that it need not poll.
async fn announce(port: u32, times: BootTimes) {
    let mut boot = Object::new();
    boot.integer("init", times.init)
        .integer("modules", times.modules)
        .integer("listening", times.listening);
    let mut line = Object::new();
    line.string("agent", "kata-shimv2-agent")
        .string("version", env!("CARGO_PKG_VERSION"))
        .raw("boot_ms", &boot.finish());
    let text = line.finish() + "\n";
    let sent = match vsock::dial_host(port).await {
        Ok(socket) => socket.write_all(text.as_bytes()).await,
        Err(error) => Err(error),
    };
    if let Err(error) = sent {
        warn!("telling host port {port} that the agent is ready: {error}");
    }
}
