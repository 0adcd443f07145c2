//! Exit statuses of every process the agent is parent of, by birth or by adoption.
//!
//! As PID 1 (or subreaper) the agent inherits orphans of exec processes, so one place must call wait
//! for all. An exit that arrives before anybody claimed the pid is kept.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
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

/// Exits of unknown processes that are remembered; orphans of containers come here too.
const MAX_UNCLAIMED: usize = 256;

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

#[derive(Default)]
struct Table {
    claimed: BTreeMap<i32, Rc<Exit>>,
    unclaimed: VecDeque<(i32, i32)>,
}

pub struct Reaper {
    signals: Pollable,
    table: RefCell<Table>,
}

impl Reaper {
    /// Blocks SIGCHLD for this process; children get a clean mask from `Command`.
    pub fn new() -> io::Result<Self> {
        let mut mask = SigSet::empty();
        mask.add(Signal::SIGCHLD);
        mask.thread_block()?;
        let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
        let signals = Pollable::new(signals.as_fd().try_clone_to_owned()?)?;
        Ok(Self { signals, table: RefCell::default() })
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
        let mut table = self.table.borrow_mut();
        if let Some(exit) = table.claimed.remove(&pid) {
            exit.set(code);
            return;
        }
        if table.unclaimed.len() == MAX_UNCLAIMED {
            table.unclaimed.pop_front();
        }
        table.unclaimed.push_back((pid, code));
    }

    /// The exit of a child that has just been made known; it may already have ended.
    pub fn claim(&self, pid: i32) -> Rc<Exit> {
        let mut table = self.table.borrow_mut();
        let exit = Rc::new(Exit::default());
        let ended = table.unclaimed.iter().rposition(|(ended, _)| *ended == pid);
        match ended.and_then(|index| table.unclaimed.remove(index)) {
            Some((_, code)) => exit.set(code),
            None => {
                table.claimed.insert(pid, exit.clone());
            }
        }
        exit
    }

    /// Starts a helper process and returns its pid and exit.
    pub fn spawn(&self, command: &mut Command) -> io::Result<(i32, Rc<Exit>)> {
        let child = command.spawn()?;
        let pid = child.id().cast_signed();
        // No await lies between spawn and claim, so `collect` can't have run: an old unclaimed exit
        // with this pid is another process's.
        self.table.borrow_mut().unclaimed.retain(|(ended, _)| *ended != pid);
        Ok((pid, self.claim(pid)))
    }
}
