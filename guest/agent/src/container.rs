//! Records of containers and their processes. No system calls here except by their owners' types.

use std::cell::{Cell, OnceCell, RefCell};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::rc::{Rc, Weak};

use nix::sys::signal::Signal;
use tokio::sync::{Mutex, oneshot};

use crate::cgroup::Cgroup;
use crate::native;
use crate::pb::grpc;
use crate::pids::ProcMount;
use crate::reaper::Exit;
use crate::status::{Context, Result, Status};
use crate::stdio::Stdio;
use crate::submount::Submount;

/// Most processes of one container that the agent keeps records of.
const MAX_EXECS: usize = 1024;

pub struct Process {
    pub pid: i32,
    pub exit: Rc<Exit>,
    pub io: Stdio,
    /// Set when somebody has been told how it ended; whoever forgets the record then hears of it.
    pub waited: OnceCell<oneshot::Sender<()>>,
}

impl Process {
    /// Sends a signal; an ended process is not found.
    pub fn signal(&self, signal: i32) -> Result<()> {
        if self.exit.get().is_some() {
            return Err(Status::not_found("process not found: ESRCH, it has ended"));
        }
        // The pid is ours until the reaper has collected it, and the check above says it has not.
        // SAFETY: kill takes two numbers and touches no memory.
        let result = unsafe { libc::kill(self.pid, signal) };
        nix::errno::Errno::result(result).context(|| format!("signal {signal}"))?;
        Ok(())
    }

    /// Whether the process hears the signal: by a handler, or blocked, for `sigwait` or a `signalfd`
    /// as small inits do it. The kernel keeps a blocked signal even for a namespace's first process.
    pub fn handles(&self, signal: Signal) -> bool {
        let Ok(status) = std::fs::read_to_string(format!("/proc/{}/status", self.pid)) else {
            return false;
        };
        hears(&status, signal)
    }
}

fn hears(status: &str, signal: Signal) -> bool {
    let mask = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok()).unwrap_or(0)
    };
    (mask("SigCgt:") | mask("SigBlk:")) & (1 << (signal as u32 - 1)) != 0
}

pub struct Container {
    pub id: String,
    /// The init process until it has been told to start.
    pub waiting: native::Waiting,
    /// The agent's own directory for it, in the guest.
    pub bundle: PathBuf,
    pub cgroup: Cgroup,
    pub init: Rc<Process>,
    pub execs: RefCell<BTreeMap<String, Rc<Process>>>,
    /// Storages it uses, by mount point.
    pub storages: Vec<String>,
    /// The init process as it was asked for: what exec requests leave out is taken from here.
    pub init_spec: grpc::Process,
    /// For those that join its pid namespace.
    pub proc: ProcMount,
    /// It has a user namespace.
    pub own_users: bool,
    /// The init process's filter, which every exec process gets as well.
    pub seccomp: Option<grpc::LinuxSeccomp>,
    pub rootfs: PathBuf,
    /// The root's file system, if it is the host's, until the container is removed.
    pub root: RefCell<Option<Submount>>,
    /// Source, in the guest, of the mount at the Kubernetes termination log path.
    pub termination_log: Option<PathBuf>,
    pub started: Cell<bool>,
    /// Held by whoever changes the container's state.
    pub changing: Mutex<()>,
}

impl Container {
    /// The process that an RPC names; its init by an empty id or the container's own.
    pub fn process(&self, exec_id: &str) -> Result<Rc<Process>> {
        if exec_id.is_empty() || exec_id == self.id {
            return Ok(self.init.clone());
        }
        self.execs.borrow().get(exec_id).cloned().ok_or_else(|| {
            Status::not_found(format!("process {exec_id} of container {} not found", self.id))
        })
    }

    /// Forgets an exec process that has been waited for and has no output left.
    pub fn forget_if_done(&self, exec_id: &str) {
        let mut execs = self.execs.borrow_mut();
        if let Some(process) = execs.get(exec_id)
            && process.waited.get().is_some()
            && process.io.is_drained()
        {
            execs.remove(exec_id);
        }
    }

    /// Forgets this exec process, not another that has come to have its id.
    pub fn forget(&self, exec_id: &str, process: &Weak<Process>) {
        let mut execs = self.execs.borrow_mut();
        if execs.get(exec_id).is_some_and(|present| Weak::ptr_eq(&Rc::downgrade(present), process))
        {
            execs.remove(exec_id);
        }
    }

    /// Checks that an exec with this id may begin.
    pub fn admit_exec(&self, exec_id: &str) -> Result<()> {
        let mut execs = self.execs.borrow_mut();
        if let Some(process) = execs.get(exec_id) {
            if process.exit.get().is_none() {
                return Err(Status::new(
                    crate::status::Code::AlreadyExists,
                    format!("process {exec_id} of container {} already exists", self.id),
                ));
            }
            execs.remove(exec_id);
        }
        if execs.len() >= MAX_EXECS {
            return Err(Status::new(
                crate::status::Code::ResourceExhausted,
                format!("container {} has {MAX_EXECS} exec processes", self.id),
            ));
        }
        Ok(())
    }
}

/// Checks an id before it becomes part of a path.
/// Source: containerd `identifiers`, kata agent `verify_id`.
pub fn check_id(id: &str) -> Result<()> {
    let mut bytes = id.bytes();
    let first_ok = bytes.next().is_some_and(|byte| byte.is_ascii_alphanumeric());
    let rest_ok = bytes.all(|byte| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte));
    if first_ok && rest_ok && id.len() <= 128 {
        return Ok(());
    }
    Err(Status::invalid(format!("{:?} is not an id", id.chars().take(64).collect::<String>())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_caught_or_blocked_signal_is_heard_and_an_ignored_one_is_not() {
        let status = |blocked: &str, ignored: &str, caught: &str| {
            format!("Name:\tinit\nSigBlk:\t{blocked}\nSigIgn:\t{ignored}\nSigCgt:\t{caught}\n")
        };
        let (none, term) = ("0000000000000000", "0000000000004000");
        assert!(hears(&status(none, none, term), Signal::SIGTERM));
        assert!(hears(&status(term, none, none), Signal::SIGTERM));
        assert!(!hears(&status(none, term, none), Signal::SIGTERM));
        assert!(!hears(&status(term, none, term), Signal::SIGINT));
    }

    #[test]
    fn ids_that_could_leave_a_directory_are_refused() {
        for good in ["a", "c1", "4f2a_x.y-z"] {
            assert!(check_id(good).is_ok(), "{good}");
        }
        for bad in ["", ".", "..", "a/b", "../x", "-a", "a b", "a\0", &"x".repeat(129)] {
            assert!(check_id(bad).is_err(), "{bad}");
        }
    }
}
