//! The agent's state and the table from RPC names to handlers.
//!
//! One thread: state is in cells, and no borrow of it lives across an await.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;

use prost::Message;
use tokio::sync::Mutex;

use crate::config::Config;
use crate::container::Container;
use crate::native;
use crate::oom::OomEvents;
use crate::pb::TtrpcRequest;
use crate::reaper::Reaper;
use crate::rpc_network::Configured;
use crate::sandbox::Sandbox;
use crate::settle::Settling;
use crate::status::{Code, Result, Status};
use crate::storage::Mounted;
use crate::ttrpc::Service;
use crate::turns::Turns;

pub struct Agent {
    pub config: Config,
    /// The agent is the guest's process 1 and so owns the machine.
    pub is_init: bool,
    pub reaper: Rc<Reaper>,
    pub containers: RefCell<BTreeMap<String, Rc<Container>>>,
    pub sandbox: RefCell<Sandbox>,
    /// Storages by mount point.
    pub mounted: RefCell<BTreeMap<String, Mounted>>,
    /// Locks of the mount points that are being made.
    pub mounting: Turns,
    /// A process that may have CAP_SYS_PTRACE has been made.
    pub has_tracers: Cell<bool>,
    pub oom: OomEvents,
    pub settling: Settling,
    pub network: Mutex<Configured>,
    /// Set by DestroySandbox; nothing new is made after it.
    pub ending: Cell<bool>,
}

impl Agent {
    /// To be told of what a process and its programs can ever be allowed, before it is made.
    pub fn note_capabilities(&self, bounding: &[String]) {
        if native::may_trace(bounding) {
            self.has_tracers.set(true);
        }
    }

    /// The container of an RPC.
    pub fn container(&self, id: &str) -> Result<Rc<Container>> {
        self.containers
            .borrow()
            .get(id)
            .cloned()
            .ok_or_else(|| Status::not_found(format!("container {id:?} not found")))
    }
}

fn decode<M: Message + Default>(payload: &[u8]) -> Result<M> {
    M::decode(payload).map_err(|error| Status::invalid(format!("request does not decode: {error}")))
}

/// Matches the method's name and calls the handler, decoding and encoding around it.
macro_rules! dispatch {
    ($agent:expr, $request:expr, { $($name:literal => $handler:ident,)* }) => {
        match $request.method.as_str() {
            $($name => {
                let message = decode(&$request.payload)?;
                drop($request);
                $agent.$handler(message).await.map(|reply| reply.encode_to_vec())
            })*
            other => Err(Status::unimplemented(format!("method {other}"))),
        }
    };
}

impl Service for Agent {
    async fn call(self: Rc<Self>, request: TtrpcRequest) -> Result<Vec<u8>> {
        match request.service.as_str() {
            "grpc.AgentService" => self.call_agent(request).await,
            "grpc.Health" => dispatch!(self, request, {
                "Check" => check,
                "Version" => version,
            }),
            other => Err(Status::new(Code::Unimplemented, format!("service {other}"))),
        }
    }

    fn ends_with_connection(method: &str) -> bool {
        matches!(method, "WaitProcess" | "ReadStdout" | "ReadStderr" | "WriteStdin" | "GetOOMEvent")
    }
}

impl Agent {
    async fn call_agent(self: Rc<Self>, request: TtrpcRequest) -> Result<Vec<u8>> {
        dispatch!(self, request, {
            "CreateSandbox" => create_sandbox,
            "DestroySandbox" => destroy_sandbox,
            "CreateContainer" => create_container,
            "StartContainer" => start_container,
            "RemoveContainer" => remove_container,
            "UpdateContainer" => update_container,
            "PauseContainer" => pause_container,
            "ResumeContainer" => resume_container,
            "ExecProcess" => exec_process,
            "SignalProcess" => signal_process,
            "WaitProcess" => wait_process,
            "WriteStdin" => write_stdin,
            "ReadStdout" => read_stdout,
            "ReadStderr" => read_stderr,
            "CloseStdin" => close_stdin,
            "TtyWinResize" => tty_win_resize,
            "GetOOMEvent" => get_oom_event,
            "StatsContainer" => stats_container,
            "GetDiagnosticData" => get_diagnostic_data,
            "UpdateInterface" => update_interface,
            "UpdateRoutes" => update_routes,
            "ListInterfaces" => list_interfaces,
            "ListRoutes" => list_routes,
            "AddARPNeighbors" => add_arp_neighbors,
            "GetIPTables" => get_ip_tables,
            "SetIPTables" => set_ip_tables,
            "CopyFile" => copy_file,
            "UpdateEphemeralMounts" => update_ephemeral_mounts,
            "RemoveStaleVirtiofsShareMounts" => remove_stale_virtiofs_share_mounts,
            "GetVolumeStats" => get_volume_stats,
            "ResizeVolume" => resize_volume,
            "GetGuestDetails" => get_guest_details,
            "OnlineCPUMem" => online_cpu_mem,
            "MemHotplugByProbe" => mem_hotplug_by_probe,
            "AddSwap" => add_swap,
            "AddSwapPath" => add_swap_path,
            "ReseedRandomDev" => reseed_random_dev,
            "SetGuestDateTime" => set_guest_date_time,
            "GetMetrics" => get_metrics,
            "MemAgentMemcgSet" => mem_agent_memcg_set,
            "MemAgentCompactSet" => mem_agent_compact_set,
            "SetPolicy" => set_policy,
        })
    }
}
