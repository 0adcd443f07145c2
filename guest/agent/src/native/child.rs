//! What the child does between the fork and its program.
//!
//! It is a copy of the agent inside of a container's namespaces, so it is not dumpable, and closes
//! everything of the agent's before it does anything else.
//!
//! Not being dumpable stops nobody who has CAP_SYS_PTRACE, which a container may have. So nobody
//! meets the child in a pid namespace before it is harmless: it is the first process of a new one,
//! or, where others live already, it stays in the agent's until everything else is done, and then
//! forks the sibling that becomes the program. That one is born with the container's root, with the
//! program's own user, capabilities and system call filter, and with no descriptor but its streams,
//! its end of the conversation and what the child has just made for it. It shares no memory with the
//! child, which tells the agent of it and ends.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::prctl::set_dumpable;
use nix::sys::signal::{SigHandler, SigSet, SigmaskHow, Signal, signal, sigprocmask};
use nix::unistd::{
    Gid, Uid, dup2_stderr, dup2_stdin, dup2_stdout, sethostname, setresgid, setresuid,
};

use super::clone;
use super::credentials::Program;
use super::last::Last;
use super::rootfs;
use super::seccomp::Filter;
use super::sync::{Made, from_child};
use super::terminal;
use super::tree::{Sources, Tree};
use super::users;
use crate::pb::grpc::{Hook, LinuxNamespace, LinuxSeccomp, Process, Spec};
use crate::status::{Context, Result, Status};
use crate::stdio::ProcessEnds;

/// What the child is to become.
pub enum Job<'a> {
    Init {
        spec: &'a Spec,
        /// What hooks are told.
        hook_state: &'a str,
        joins: Option<&'a Pids>,
        /// Others may want to join its pid namespace.
        may_be_joined: bool,
    },
    Exec {
        process: &'a Process,
        seccomp: Option<&'a LinuxSeccomp>,
        target: BorrowedFd<'a>,
        /// Opens the cgroup of the container's init, which may be below the container's own.
        init_cgroup: &'a dyn Fn() -> io::Result<OwnedFd>,
        /// The container has users of its own.
        own_users: bool,
        /// Somebody in the pid namespace may have CAP_SYS_PTRACE.
        is_watched: bool,
    },
}

/// The pid namespace of another container that one joins.
pub struct Pids {
    pub namespace: File,
    /// Where a procfs of it is mounted: only a process inside could mount another.
    pub proc: String,
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
        let Job::Init { spec, joins, .. } = self else { return CloneFlags::empty() };
        let mut flags = CloneFlags::CLONE_NEWNS;
        if joins.is_none() {
            flags |= CloneFlags::CLONE_NEWPID;
        }
        if self.users_at_birth() {
            flags |= CloneFlags::CLONE_NEWUSER;
        }
        for (kind, flag) in [("uts", CloneFlags::CLONE_NEWUTS), ("ipc", CloneFlags::CLONE_NEWIPC)] {
            if namespace(spec, kind) == Some("") {
                flags |= flag;
            }
        }
        flags
    }

    /// A pid namespace belongs to a user namespace, so both are made together.
    fn users_at_birth(&self) -> bool {
        matches!(self, Job::Init { spec, joins: None, .. } if users::has_namespace(spec))
    }

    /// Namespaces of the sandbox that the child can't join once it has users of its own.
    pub fn namespaces_at_birth(&self) -> Vec<(&str, CloneFlags)> {
        match self {
            Job::Init { spec, .. } if self.users_at_birth() => shared_namespaces(spec),
            _ => Vec::new(),
        }
    }

    /// Others live in the pid namespace.
    fn needs_sibling(&self) -> bool {
        matches!(self, Job::Exec { .. } | Job::Init { joins: Some(_), .. })
    }

    fn process_and_filter(&self) -> (Option<&Process>, Option<&LinuxSeccomp>) {
        match self {
            Job::Init { spec, .. } => {
                let seccomp = spec.linux.as_ref().and_then(|linux| linux.seccomp.as_ref());
                (spec.process.as_ref(), seccomp)
            }
            Job::Exec { process, seccomp, .. } => (Some(process), *seccomp),
        }
    }

    /// Somebody may look into the process; an init waits for its start for as long as it takes.
    fn is_watched(&self) -> bool {
        matches!(self, Job::Init { .. } | Job::Exec { is_watched: true, .. })
    }

    /// Hooks that are run before the program, and what they are told.
    fn hooks(&self) -> (&[Hook], &str) {
        match self {
            Job::Init { spec, hook_state, .. } => {
                (spec.hooks.as_ref().map_or(&[], |hooks| &hooks.start_container), hook_state)
            }
            Job::Exec { .. } => (&[], ""),
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
    match job {
        Job::Exec { target, .. } => keep.push(target.as_raw_fd()),
        Job::Init { joins, .. } => keep.extend(joins.map(|pids| pids.namespace.as_raw_fd())),
    }
    close_others(&mut keep);
    let (process, seccomp) = job.process_and_filter();
    let filter = seccomp.map(Filter::compile).transpose()?;
    let process = process.ok_or_else(|| Status::invalid("no process"))?;
    set_oom_score(process.oom_score_adj)?;
    let mut made = Made::default();
    match job {
        Job::Init { spec, joins, may_be_joined, .. } => {
            made.proc = enter_new(spec, *joins, *may_be_joined, socket)?;
        }
        Job::Exec { target, own_users, .. } => enter_existing(*target, *own_users)?,
    }
    let has_terminal = matches!(standard, Standard::Terminal);
    if has_terminal {
        made.terminal = Some(terminal::open(process, matches!(job, Job::Init { .. }))?);
    }
    let program = Program::find(process)?;
    let (hooks, hook_state) = job.hooks();
    program.prepare(filter.as_ref())?;
    let mut last = Last { program, filter, hooks, hook_state, has_terminal };
    if job.needs_sibling() {
        last.confine_early(job.is_watched())?;
        let sibling = clone::sibling();
        made.sibling = sibling.context(|| "making the process in its pid namespace".to_owned())?;
        if made.sibling.is_some() {
            // All that this process still does: what follows is the sibling's.
            return from_child::ready(socket, &made).context(|| "ready".to_owned());
        }
    } else {
        from_child::ready(socket, &made).context(|| "ready".to_owned())?;
    }
    drop(made);
    last.steps(socket)
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

/// Makes and joins the container's namespaces and builds its root; returns a procfs for others.
fn enter_new(
    spec: &Spec,
    joins: Option<&Pids>,
    may_be_joined: bool,
    socket: BorrowedFd<'_>,
) -> Result<Option<OwnedFd>> {
    let has_users = users::has_namespace(spec);
    if let Some(pids) = joins {
        enter_pids(pids)?;
    }
    if joins.is_some() || !has_users {
        for (path, kind) in shared_namespaces(spec) {
            join(path, kind)?;
        }
    }
    if has_users {
        if joins.is_some() {
            // Again, because mounts belong to a user namespace as well.
            let new = CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNS;
            unshare(new).context(|| "user namespace".to_owned())?;
        }
        from_child::get_users(socket).context(|| "waiting for users".to_owned())?;
    }
    // While files are still passed as the guest's root.
    rootfs::set_sysctls(spec)?;
    let sources = Sources::open(spec, joins.map(|pids| pids.proc.as_str()))?;
    if has_users {
        become_root()?;
    }
    if namespace(spec, "cgroup").is_some() {
        unshare(CloneFlags::CLONE_NEWCGROUP).context(|| "cgroup namespace".to_owned())?;
    }
    if namespace(spec, "uts") == Some("") && !spec.hostname.is_empty() {
        sethostname(&spec.hostname).context(|| "hostname".to_owned())?;
    }
    // While the agent's own can be seen: without one the kernel gives none to other users.
    let proc = may_be_joined.then(|| Tree::filesystem("proc").map(Tree::into_fd)).transpose();
    let proc = proc.context(|| "procfs for other containers".to_owned())?;
    rootfs::enter(spec, sources)?;
    Ok(proc)
}

/// For what this process forks. The descriptor is closed with that, so that no child has it.
fn enter_pids(pids: &Pids) -> Result<()> {
    let namespace = &pids.namespace;
    setns(namespace, CloneFlags::CLONE_NEWPID).context(|| "joining a pid namespace".to_owned())?;
    // SAFETY: as in `enter_existing`: this copy's owner is never dropped.
    unsafe { libc::close(namespace.as_raw_fd()) };
    Ok(())
}

fn join(path: &str, kind: CloneFlags) -> Result<()> {
    let what = || format!("joining namespace {path}");
    let file = File::open(path).context(what)?;
    setns(file, kind).context(what)
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

/// Joins all of them; the pid namespace is that of the children, as always. The descriptor is closed
/// with that, so that no child has it.
fn enter_existing(target: BorrowedFd<'_>, own_users: bool) -> Result<()> {
    let mut all = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWCGROUP
        | CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWPID;
    if own_users {
        all |= CloneFlags::CLONE_NEWUSER;
    }
    setns(target, all).context(|| "joining the container's namespaces".to_owned())?;
    // SAFETY: the agent owns this descriptor in its own process, not in this copy of it, where the
    // owner is never dropped.
    unsafe { libc::close(target.as_raw_fd()) };
    if own_users { become_root() } else { Ok(()) }
}
