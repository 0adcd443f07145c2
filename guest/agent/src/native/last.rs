//! The last steps on the way to the program, of the process that becomes it.

use std::os::fd::BorrowedFd;

use nix::unistd::setsid;

use super::clone;
use super::credentials::Program;
use super::hooks;
use super::seccomp::Filter;
use super::sync::from_child;
use super::terminal;
use crate::pb::grpc::Hook;
use crate::status::{Context, Result, Status};

/// What is left to the process that becomes the program.
pub struct Last<'a> {
    pub program: Program<'a>,
    pub filter: Option<Filter>,
    pub hooks: &'a [Hook],
    pub hook_state: &'a str,
    pub has_terminal: bool,
}

impl Last<'_> {
    /// Without no_new_privs a filter takes a capability to be loaded, which nobody may take over
    /// from the sibling. So it is loaded before that one is born, if it lets the rest through; a
    /// profile that is stricter has to wait, which is safe where nobody can look into the sibling.
    pub fn confine_early(&mut self, is_watched: bool) -> Result<()> {
        let filter = self.filter.as_ref().filter(|_| self.program.needs_capability_to_confine());
        let Some(filter) = filter else { return Ok(()) };
        match filter.first_refused(&self.calls_to_come()) {
            None => {
                self.program.confine(Some(filter))?;
                self.filter = None;
                Ok(())
            }
            Some(_) if !is_watched => Ok(()),
            Some(call) => Err(Status::invalid(format!(
                "the seccomp profile does not allow {call}, which a process takes that is put among \
                 others of which one may have CAP_SYS_PTRACE; allow it, or set no_new_privs \
                 (allowPrivilegeEscalation: false)"
            ))),
        }
    }

    /// What this process and its sibling still call, by name and arguments as far as they are known.
    fn calls_to_come(&self) -> Vec<(&'static str, [u64; 6])> {
        let flags = u64::from(clone::SIBLING_FLAGS.cast_unsigned());
        let mut calls = vec![("clone", [flags, 0, 0, 0, 0, 0])];
        calls.extend(
            ["capset", "sendmsg", "close", "exit_group", "setsid", "read", "write", "execve"]
                .map(|name| (name, [0; 6])),
        );
        if self.has_terminal {
            calls.push(("ioctl", [0, libc::TIOCSCTTY, 0, 0, 0, 0]));
        }
        calls
    }

    pub fn steps(self, socket: BorrowedFd<'_>) -> Result<()> {
        setsid().context(|| "setsid".to_owned())?;
        if self.has_terminal {
            terminal::take_control()?;
        }
        if from_child::wait_for_go(socket).context(|| "waiting to start".to_owned())? {
            self.program.confine(self.filter.as_ref())?;
            // Programs of the image: they may do what the container may, and no more.
            hooks::run(self.hooks, self.hook_state)?;
            self.program.execute()?;
        }
        Ok(())
    }
}
