//! RPCs that ask about the agent itself.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use tokio::sync::Mutex;

use crate::agent::Agent;
use crate::config::Config;
use crate::oom::OomEvents;
use crate::pb::grpc;
use crate::reaper::Reaper;
use crate::settle::Settling;
use crate::status::{Context, Result};
use crate::turns::Turns;

/// Version of the agent API. Source: kata agent protocol, Health.Version.
const API_VERSION: &str = "0.0.1";

impl Agent {
    pub fn new(config: Config, is_init: bool, reaper: Rc<Reaper>) -> Result<Self> {
        Ok(Self {
            config,
            is_init,
            reaper,
            containers: RefCell::default(),
            sandbox: RefCell::default(),
            mounted: RefCell::default(),
            mounting: Turns::default(),
            has_tracers: Cell::new(false),
            oom: OomEvents::new().context(|| "inotify".to_owned())?,
            settling: Settling::default(),
            network: Mutex::default(),
            ending: Cell::new(false),
        })
    }

    pub async fn check(&self, _: grpc::CheckRequest) -> Result<grpc::HealthCheckResponse> {
        let status = grpc::health_check_response::ServingStatus::Serving as i32;
        Ok(grpc::HealthCheckResponse { status })
    }

    pub async fn version(&self, _: grpc::CheckRequest) -> Result<grpc::VersionCheckResponse> {
        Ok(grpc::VersionCheckResponse {
            grpc_version: API_VERSION.to_owned(),
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
        })
    }
}
