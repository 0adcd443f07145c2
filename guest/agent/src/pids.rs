//! Pid namespaces that several containers share: a pod's, or one container's that another examines.
//!
//! A pid namespace is its first process's: the sandbox container's for a pod, so that it lasts as
//! long as the pod. Who joins it needs a procfs of it as well, and only a process inside can make
//! one; so the first process makes one at its birth, before it is anybody's, and the agent keeps it.

use std::cell::RefCell;
use std::fs::{self, File};
use std::os::fd::OwnedFd;

use nix::mount::{MntFlags, umount2};

use crate::agent::Agent;
use crate::container::Container;
use crate::native::{Pids, place_mount};
use crate::pb::grpc::Spec;
use crate::sandbox::NAMESPACE_DIR;
use crate::status::{Code, Context, Result, Status};
use crate::warn;

/// Names the container whose processes this one is to see. Ours: the protocol itself knows only the
/// sandbox's.
const TARGET: &str = "kata-shimv2.pid-namespace-of";
/// Source: kata agent protocol, "OCI spec as the agent wants it".
const KIND: &str = "io.katacontainers.pkg.oci.container_type";

/// A procfs of a container's pid namespace.
#[derive(Default)]
enum Proc {
    /// Nobody can join.
    #[default]
    None,
    Detached(OwnedFd),
    At(String),
}

#[derive(Default)]
pub struct ProcMount(RefCell<Proc>);

impl ProcMount {
    pub fn new(mount: Option<OwnedFd>) -> Self {
        Self(RefCell::new(mount.map_or(Proc::None, Proc::Detached)))
    }

    /// Where it is mounted, from the first question on.
    fn path(&self, id: &str) -> Result<Option<String>> {
        let mut proc = self.0.borrow_mut();
        match &*proc {
            Proc::None => Ok(None),
            Proc::At(path) => Ok(Some(path.clone())),
            Proc::Detached(mount) => {
                let path = format!("{NAMESPACE_DIR}/proc-{id}");
                let what = || format!("mounting {path}");
                fs::create_dir_all(&path).context(what)?;
                place_mount(mount, &path).context(what)?;
                *proc = Proc::At(path.clone());
                Ok(Some(path))
            }
        }
    }

    /// Lets it go with its container.
    pub fn release(&self) {
        let Proc::At(path) = self.0.take() else { return };
        let gone = umount2(path.as_str(), MntFlags::MNT_DETACH).map_err(std::io::Error::from);
        if let Err(error) = gone.and_then(|()| fs::remove_dir(&path)) {
            warn!("unmounting {path}: {error}");
        }
    }
}

/// Whether another container may come to join this one's pid namespace.
pub fn may_be_joined(spec: &Spec) -> bool {
    spec.annotations.get(KIND).is_none_or(|kind| kind != "single_container")
}

impl Agent {
    /// The pid namespace that a container with this spec joins; none if it has its own.
    pub fn pids_to_join(&self, spec: &Spec, sandbox_pidns: bool) -> Result<Option<Pids>> {
        let target = match spec.annotations.get(TARGET) {
            Some(target) => Some(target.clone()),
            None if sandbox_pidns => self.sandbox.borrow().first_container.clone(),
            None => None,
        };
        target.map(|target| pids_of(&*self.container(&target)?)).transpose()
    }
}

fn pids_of(container: &Container) -> Result<Pids> {
    let id = &container.id;
    let refuse = |why: &str| {
        let text = format!("the processes of container {id} cannot be shared: {why}");
        Err(Status::new(Code::FailedPrecondition, text))
    };
    if container.init.exit.get().is_some() {
        return refuse("it has ended");
    }
    if !container.started.get() {
        return refuse("it has not been started, and its process is the agent's copy until then");
    }
    let Some(proc) = container.proc.path(id)? else {
        return refuse("it joined another's, or is alone in its sandbox");
    };
    // Opened while its process has not been reaped (that takes an await): by number, a later process
    // of the guest's own might be meant.
    let path = format!("/proc/{}/ns/pid", container.init.pid);
    let namespace = File::open(&path).context(|| format!("opening {path}"))?;
    Ok(Pids { namespace, proc })
}
