//! What the child does between the fork and its program.
//!
//! It is a copy of the agent inside of a container's namespaces, so it is not dumpable, and closes
//! everything of the agent's before it does anything else.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::prctl::set_dumpable;
use nix::sys::signal::{SigHandler, SigSet, SigmaskHow, Signal, signal, sigprocmask};
use nix::unistd::{
    Gid, Uid, dup2_stderr, dup2_stdin, dup2_stdout, sethostname, setresgid, setresuid, setsid,
};

use super::credentials::Program;
use super::hooks;
use super::rootfs;
use super::seccomp::Filter;
use super::sync::from_child;
use super::terminal;
use super::tree::Sources;
use super::users;
use crate::pb::grpc::{LinuxNamespace, LinuxSeccomp, Process, Spec};
use crate::status::{Context, Result, Status};
use crate::stdio::ProcessEnds;

/// What the child is to become.
pub enum Job<'a> {
    Init {
        spec: &'a Spec,
        /// What hooks are told.
        hook_state: &'a str,
    },
    Exec {
        process: &'a Process,
        seccomp: Option<&'a LinuxSeccomp>,
        target: BorrowedFd<'a>,
        /// The container has users of its own.
        own_users: bool,
    },
}

pub enum Standard<'a> {
    Pipes(&'a ProcessEnds),
    Terminal,
}

fn namespaces(spec: &Spec) -> &[LinuxNamespace] {
    spec.linux.as_ref().map_or(&[], |linux| &linux.namespaces)
}

fn namespace<'a>(spec: &'a Spec, kind: &str) -> Option<&'a str> {
    namespaces(spec).iter().find(|ns| ns.r#type == kind).map(|ns| ns.path.as_str())
}

impl Job<'_> {
    /// Namespaces that the child gets new at its birth.
    pub fn clone_flags(&self) -> CloneFlags {
        let Job::Init { spec, .. } = self else { return CloneFlags::empty() };
        let mut flags = CloneFlags::CLONE_NEWNS;
        if users::has_namespace(spec) {
            flags |= CloneFlags::CLONE_NEWUSER;
        }
        for (kind, flag) in [
            ("pid", CloneFlags::CLONE_NEWPID),
            ("uts", CloneFlags::CLONE_NEWUTS),
            ("ipc", CloneFlags::CLONE_NEWIPC),
        ] {
            if namespace(spec, kind) == Some("") {
                flags |= flag;
            }
        }
        flags
    }

    /// Namespaces of the sandbox that the child can't join once it has users of its own.
    pub fn namespaces_at_birth(&self) -> Vec<(&str, CloneFlags)> {
        match self {
            Job::Init { spec, .. } if users::has_namespace(spec) => shared_namespaces(spec),
            _ => Vec::new(),
        }
    }

    /// The existing pid namespace that the child is born into.
    pub fn pid_namespace(&self, of_pid: Option<i32>) -> Option<String> {
        match self {
            Job::Init { spec, .. } => {
                namespace(spec, "pid").filter(|path| !path.is_empty()).map(ToOwned::to_owned)
            }
            Job::Exec { .. } => of_pid.map(|pid| format!("/proc/{pid}/ns/pid")),
        }
    }
}

/// The child's whole life before its program. Never returns.
pub fn run(job: &Job<'_>, standard: &Standard<'_>, socket: OwnedFd) -> ! {
    if let Err(status) = become_program(job, standard, socket.as_fd()) {
        from_child::fail(socket.as_fd(), &status.message);
    }
    // Not `exit`: nothing of the agent's must run here.
    // SAFETY: _exit ends the process and takes a number.
    unsafe { libc::_exit(1) };
}

fn become_program(job: &Job<'_>, standard: &Standard<'_>, socket: BorrowedFd<'_>) -> Result<()> {
    set_dumpable(false).context(|| "prctl".to_owned())?;
    reset_signals().context(|| "signals".to_owned())?;
    if let Standard::Pipes(ends) = standard {
        dup2_stdin(&ends.stdin).context(|| "stdin".to_owned())?;
        dup2_stdout(&ends.stdout).context(|| "stdout".to_owned())?;
        dup2_stderr(&ends.stderr).context(|| "stderr".to_owned())?;
    }
    let mut keep = vec![socket.as_raw_fd()];
    if let Job::Exec { target, .. } = job {
        keep.push(target.as_raw_fd());
    }
    close_others(&mut keep);
    setsid().context(|| "setsid".to_owned())?;
    let (process, seccomp) = match job {
        Job::Init { spec, .. } => {
            let seccomp = spec.linux.as_ref().and_then(|linux| linux.seccomp.as_ref());
            (spec.process.as_ref(), seccomp)
        }
        Job::Exec { process, seccomp, .. } => (Some(*process), *seccomp),
    };
    let filter = seccomp.map(Filter::compile).transpose()?;
    let process = process.ok_or_else(|| Status::invalid("no process"))?;
    set_oom_score(process.oom_score_adj)?;
    match job {
        Job::Init { spec, .. } => enter_new(spec, socket)?,
        Job::Exec { target, own_users, .. } => enter_existing(*target, *own_users)?,
    }
    let master = match standard {
        Standard::Terminal => Some(terminal::open(process, matches!(job, Job::Init { .. }))?),
        Standard::Pipes(_) => None,
    };
    let program = Program::find(process)?;
    from_child::ready(socket, master.as_ref().map(AsFd::as_fd)).context(|| "ready".to_owned())?;
    drop(master);
    if from_child::wait_for_go(socket).context(|| "waiting to start".to_owned())? {
        if let Job::Init { spec, hook_state } = job
            && let Some(hooks) = &spec.hooks
        {
            hooks::run(&hooks.start_container, hook_state)?;
        }
        program.execute(filter.as_ref())?;
    }
    Ok(())
}

/// The agent blocks SIGCHLD, Rust ignores SIGPIPE, and whoever started the agent may have had others
/// ignored, which lasts through `exec`; a program expects none of it.
fn reset_signals() -> nix::Result<()> {
    for each in Signal::iterator() {
        if !matches!(each, Signal::SIGKILL | Signal::SIGSTOP) {
            // SAFETY: the default action is no handler, so nothing can run at a wrong time.
            unsafe { signal(each, SigHandler::SigDfl) }?;
        }
    }
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None)
}

/// Closes every descriptor above the standard streams but these.
fn close_others(keep: &mut [RawFd]) {
    keep.sort_unstable();
    let mut first = 3_u32;
    for fd in keep.iter().map(|fd| fd.cast_unsigned()).chain([u32::MAX]) {
        if fd > first {
            // SAFETY: closes descriptors that nothing in this process uses from here on: their
            // owners are never dropped, because this process only executes or ends.
            unsafe { libc::syscall(libc::SYS_close_range, first, fd - 1, 0) };
        }
        first = fd.saturating_add(1);
    }
}

/// Written through the agent's own /proc, which is still there.
fn set_oom_score(score: i64) -> Result<()> {
    if score == 0 {
        return Ok(());
    }
    let score = score.clamp(-1000, 1000);
    std::fs::write("/proc/self/oom_score_adj", score.to_string())
        .context(|| format!("setting oom_score_adj to {score}"))
}

fn enter_new(spec: &Spec, socket: BorrowedFd<'_>) -> Result<()> {
    let sources = if users::has_namespace(spec) {
        // The agent has put the child into the sandbox's namespaces before its birth, and now maps
        // its users. Sources are opened while files are still passed as the guest's root.
        from_child::wait_for_go(socket).context(|| "waiting for users".to_owned())?;
        let sources = Sources::open(spec)?;
        become_root()?;
        sources
    } else {
        join_shared(spec)?;
        Sources::open(spec)?
    };
    if namespace(spec, "cgroup").is_some() {
        unshare(CloneFlags::CLONE_NEWCGROUP).context(|| "cgroup namespace".to_owned())?;
    }
    if namespace(spec, "uts") == Some("") && !spec.hostname.is_empty() {
        sethostname(&spec.hostname).context(|| "hostname".to_owned())?;
    }
    rootfs::enter(spec, sources)
}

fn join_shared(spec: &Spec) -> Result<()> {
    for (path, kind) in shared_namespaces(spec) {
        let what = || format!("joining namespace {path}");
        let file = std::fs::File::open(path).context(what)?;
        setns(file, kind).context(what)?;
    }
    Ok(())
}

/// The sandbox's namespaces that the container is to be in.
pub fn shared_namespaces(spec: &Spec) -> Vec<(&str, CloneFlags)> {
    [("ipc", CloneFlags::CLONE_NEWIPC), ("uts", CloneFlags::CLONE_NEWUTS)]
        .into_iter()
        .filter_map(|(kind, flag)| Some((namespace(spec, kind)?, flag)))
        .filter(|(path, _)| !path.is_empty())
        .collect()
}

/// Root of its own user namespace, so that what it makes belongs to somebody there.
fn become_root() -> Result<()> {
    let (uid, gid) = (Uid::from_raw(0), Gid::from_raw(0));
    setresgid(gid, gid, gid).context(|| "group 0 of the user namespace".to_owned())?;
    setresuid(uid, uid, uid).context(|| "user 0 of the user namespace".to_owned())
}

/// The pid namespace is not among these: the child has been born in it.
fn enter_existing(target: BorrowedFd<'_>, own_users: bool) -> Result<()> {
    let mut all = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWCGROUP
        | CloneFlags::CLONE_NEWNET;
    if own_users {
        all |= CloneFlags::CLONE_NEWUSER;
    }
    setns(target, all).context(|| "joining the container's namespaces".to_owned())?;
    if own_users { become_root() } else { Ok(()) }
}
