//! What the machine still needs when the host has been told that the agent listens.
//!
//! The host needs a while to connect and to ask for its first container; these steps use that time,
//! one after the other, and each lets the event loop look for requests before it. A request that
//! depends on a step waits for it.

use std::cell::Cell;
use std::rc::Rc;

use tokio::sync::Notify;
use tokio::task::yield_now;

use crate::agent::Agent;
use crate::{boot, cgroup, error, modules, native, rpc_network, warn};

/// How far the machine is.
#[derive(Clone, Copy, Default, PartialEq, PartialOrd)]
pub enum Stage {
    #[default]
    Booted,
    /// Drivers of the devices that are there, the shared filesystem among them.
    Devices,
    /// Everything that a container takes for granted.
    Complete,
}

#[derive(Default)]
pub struct Settling {
    stage: Cell<Stage>,
    changed: Notify,
}

impl Settling {
    fn reach(&self, stage: Stage) {
        self.stage.set(stage);
        self.changed.notify_waiters();
    }

    pub async fn wait_for(&self, stage: Stage) {
        loop {
            let changed = self.changed.notified();
            if self.stage.get() >= stage {
                return;
            }
            changed.await;
        }
    }
}

impl Agent {
    /// Brings the machine to its last stage. A step that fails is told, and what needs it fails
    /// with its own error.
    pub async fn settle(self: Rc<Self>) {
        modules::load_for_devices();
        self.settling.reach(Stage::Devices);
        yield_now().await;
        if self.is_init {
            if let Err(status) = rpc_network::loopback_up() {
                warn!("loopback: {status}");
            }
            yield_now().await;
            if let Err(problem) = boot::enable_controllers(boot::CGROUP_ROOT) {
                error!("cgroup controllers of {}: {problem}", boot::CGROUP_ROOT);
            }
            yield_now().await;
        }
        if let Err(problem) = cgroup::prepare_parent() {
            warn!("cgroup of containers: {problem}");
        }
        yield_now().await;
        native::warm_up();
        self.settling.reach(Stage::Complete);
        yield_now().await;
        modules::load_the_rest();
    }
}
