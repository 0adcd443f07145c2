//! Exit statuses of every process the agent is parent of, by birth or by adoption.
//!
//! As PID 1 (or subreaper) the agent inherits orphans of exec processes, so one place must call wait
//! for all. A pid is claimed in the same step that makes the process, before anything can be reaped;
//! so an exit that nobody has claimed is an orphan's, and of no interest.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsFd;
use std::process::Command;
use std::rc::Rc;
use std::time::Instant;

use nix::errno::Errno;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use tokio::sync::Notify;

use crate::io::Pollable;

/// How one process ended; set once.
#[derive(Default)]
pub struct Exit {
    value: Cell<Option<(i32, Instant)>>,
    changed: Notify,
}

impl Exit {
    pub fn set(&self, code: i32) {
        if self.value.get().is_none() {
            self.value.set(Some((code, Instant::now())));
            self.changed.notify_waiters();
        }
    }

    /// The status in a shell's convention (128 + signal) and when it became known.
    pub fn get(&self) -> Option<(i32, Instant)> {
        self.value.get()
    }

    /// Waits for the end; any number of callers get the same value.
    pub async fn wait(&self) -> (i32, Instant) {
        loop {
            let changed = self.changed.notified();
            if let Some(value) = self.value.get() {
                return value;
            }
            changed.await;
        }
    }
}

pub struct Reaper {
    signals: Pollable,
    claimed: RefCell<BTreeMap<i32, Rc<Exit>>>,
}

impl Reaper {
    /// Blocks SIGCHLD for this process; children get a clean mask from `Command`.
    pub fn new() -> io::Result<Self> {
        let mut mask = SigSet::empty();
        mask.add(Signal::SIGCHLD);
        mask.thread_block()?;
        let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
        let signals = Pollable::new(signals.as_fd().try_clone_to_owned()?)?;
        Ok(Self { signals, claimed: RefCell::default() })
    }

    /// Collects exits for ever.
    pub async fn run(&self) -> io::Result<()> {
        let mut record = [0; 128]; // Source: signalfd(2), struct signalfd_siginfo is 128 bytes
        loop {
            self.collect();
            self.signals.read(&mut record).await?;
        }
    }

    fn collect(&self) {
        loop {
            match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(pid, code)) => self.record(pid.as_raw(), code),
                Ok(WaitStatus::Signaled(pid, signal, _)) => {
                    self.record(pid.as_raw(), 128 + signal as i32);
                }
                Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => return,
                Ok(_) | Err(Errno::EINTR) => {}
                Err(error) => {
                    crate::error!("waitpid: {error}");
                    return;
                }
            }
        }
    }

    fn record(&self, pid: i32, code: i32) {
        if let Some(exit) = self.claimed.borrow_mut().remove(&pid) {
            exit.set(code);
        }
    }

    /// The exit of a child that has just been made: no await may lie between the two.
    pub fn claim(&self, pid: i32) -> Rc<Exit> {
        let exit = Rc::new(Exit::default());
        self.claimed.borrow_mut().insert(pid, exit.clone());
        exit
    }

    /// Starts a helper process and returns its pid and exit.
    pub fn spawn(&self, command: &mut Command) -> io::Result<(i32, Rc<Exit>)> {
        let child = command.spawn()?;
        let pid = child.id().cast_signed();
        Ok((pid, self.claim(pid)))
    }
}
