//! Makes containers and processes in them: one fork each, no program of a runtime.
//!
//! crun costs 100-200 ms a verb in an emulated guest, most of it for starting the program; this
//! costs a fork.
//!
//! ```text
//! agent                         child
//! cgroup, clone ──────────────> namespaces, mounts, devices, pivot_root, program lookup
//! create answers <──── ready ── (tty master goes with it)
//! start ────────────── go ────> credentials, execve
//! start answers  <──── EOF ──── or an error text
//! ```
//!
//! In a pid namespace that has processes already the child forks the program's process last of all,
//! for the reason that `child` gives.

mod capabilities;
mod child;
mod clone;
mod credentials;
mod devices;
mod hooks;
mod last;
pub mod limits;
mod rootfs;
mod seccomp;
mod sync;
mod syscalls;
mod terminal;
mod tree;
mod users;

use std::cell::RefCell;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::time::Duration;

use crate::cgroup::Cgroup;
use crate::io::Pollable;
use crate::pb::grpc::{LinuxSeccomp, Process, Spec};
use crate::reaper::{Exit, Reaper};
use crate::status::{Code, Context, Result, Status};
use crate::stdio::ProcessEnds;

use self::child::{Job, Standard};
use self::sync::Made;

/// From the fork to the program; an emulated guest on a loaded host needs a second.
const STEP_TIMEOUT: Duration = Duration::from_secs(60);
/// From the kill of processes to their end.
const KILL_TIMEOUT: Duration = Duration::from_secs(30);

/// What a new process gets as stdin, stdout and stderr.
pub enum ProcessIo {
    Pipes(ProcessEnds),
    Terminal,
}

/// A process that has been made; `terminal` is the master if it was asked for.
pub struct Launched {
    pub pid: i32,
    pub exit: Rc<Exit>,
    pub terminal: Option<Pollable>,
    /// A procfs of its pid namespace, if others may join that.
    pub proc: Option<OwnedFd>,
}

/// A container that has not been told to go yet holds its end of the conversation.
#[derive(Default)]
pub struct Waiting(RefCell<Option<Pollable>>);

pub use self::capabilities::may_trace;
pub use self::child::Pids;
pub use self::hooks::{check as check_hooks, state as hook_state};
pub use self::users::has_namespace as has_own_users;

/// What a container is made of.
pub struct Blueprint<'a> {
    pub spec: &'a Spec,
    pub hook_state: &'a str,
    pub cgroup: &'a Cgroup,
    /// The pid namespace that it joins instead of having its own.
    pub joins: Option<&'a Pids>,
    /// Others may want to join its own.
    pub may_be_joined: bool,
}

/// Makes the container, stopped before its program.
pub async fn create(
    reaper: &Reaper,
    blueprint: &Blueprint<'_>,
    io: ProcessIo,
) -> Result<(Launched, Waiting)> {
    let &Blueprint { spec, hook_state, cgroup, joins, may_be_joined } = blueprint;
    let directory = cgroup.create().context(|| format!("cgroup {}", cgroup.path.display()))?;
    let resources = spec.linux.as_ref().and_then(|linux| linux.resources.as_ref());
    if let Some(resources) = resources {
        limits::apply(cgroup, resources)?;
    }
    devices::restrict(directory.as_fd(), resources)?;
    let job = Job::Init { spec, hook_state, joins, may_be_joined };
    let (launched, socket) = launch(reaper, job, io, directory).await?;
    if let Some(process) = &spec.process {
        users::set_limits(launched.pid, &process.rlimits)?;
    }
    Ok((launched, Waiting(RefCell::new(Some(socket)))))
}

/// Makes the device filter that most containers share, while nobody waits for it.
pub fn warm_up() {
    let resources = crate::spec::default_resources();
    if let Err(status) = devices::prepare(&resources) {
        crate::warn!("{status}");
    }
}

/// Mounts what a child has made somewhere.
pub fn place_mount(mount: &OwnedFd, path: &str) -> std::io::Result<()> {
    let place = File::open(path)?;
    Ok(tree::place(mount.as_fd(), place.as_fd())?)
}

/// Lets the program begin; an answer means that it has been executed.
pub async fn start(waiting: &Waiting) -> Result<()> {
    let socket = waiting.0.borrow_mut().take();
    let socket = socket.ok_or_else(|| Status::internal("the container is not waiting to start"))?;
    sync::tell(&socket).await.context(|| "telling the container to start".to_owned())?;
    within_deadline(sync::executed(&socket)).await
}

/// The process whose namespaces an exec joins.
#[derive(Clone, Copy)]
pub struct Init {
    pub pid: i32,
    /// The container has users of its own.
    pub own_users: bool,
    /// Somebody in its pid namespace may have CAP_SYS_PTRACE.
    pub is_watched: bool,
}

/// Runs a process in the namespaces of the container's init.
pub async fn exec(
    reaper: &Reaper,
    process: &Process,
    seccomp: Option<&LinuxSeccomp>,
    init: Init,
    cgroup: &Cgroup,
    io: ProcessIo,
) -> Result<Launched> {
    let target = clone::open_pidfd(init.pid)
        .context(|| "the container's init has ended; its namespaces can't be joined".to_owned())?;
    // Without it there would be neither limits nor the filter of devices.
    let directory = File::open(&cgroup.path).context(|| "the container's cgroup".to_owned())?;
    let Init { own_users, is_watched, .. } = init;
    let init_cgroup = || {
        let lists = std::fs::read_to_string(format!("/proc/{}/cgroup", init.pid))?;
        // By number: it has to be the process of the pidfd still.
        clone::living_process(target.as_fd())?
            .ok_or_else(|| std::io::Error::other("the container's init has ended"))?;
        cgroup.open_member(&lists)
    };
    let target = target.as_fd();
    let init_cgroup = &init_cgroup;
    let job = Job::Exec { process, seccomp, target, init_cgroup, own_users, is_watched };
    let (launched, socket) = launch(reaper, job, io, directory.into()).await?;
    users::set_limits(launched.pid, &process.rlimits)?;
    sync::tell(&socket).await.context(|| "telling the process to start".to_owned())?;
    let executed = within_deadline(sync::executed(&socket)).await;
    if executed.is_err() {
        if launched.exit.get().is_none() {
            clone::kill(launched.pid); // it may hang in its program's file system
        }
        ended(&launched.exit).await;
    }
    executed.map(|()| launched)
}

async fn launch(
    reaper: &Reaper,
    job: Job<'_>,
    io: ProcessIo,
    cgroup: OwnedFd,
) -> Result<(Launched, Pollable)> {
    let (ours, theirs) = sync::pair().context(|| "socket pair".to_owned())?;
    let standard = match &io {
        ProcessIo::Pipes(ends) => Standard::Pipes(ends),
        ProcessIo::Terminal => Standard::Terminal,
    };
    let cloned =
        clone::in_namespaces(&job.namespaces_at_birth(), || clone_into(&job, cgroup.as_fd()));
    let pid = match cloned.context(|| "making a process".to_owned())? {
        0 => child::run(&job, &standard, theirs),
        pid => pid,
    };
    drop(theirs);
    let exit = reaper.claim(pid);
    let socket = Pollable::new(ours).context(|| "socket pair".to_owned())?;
    let prepared = prepare_users(&job, &io, pid, &socket).await;
    drop(io);
    let ready = match prepared {
        Ok(()) => within_deadline(sync::ready(&socket, pid)).await,
        Err(status) => Err(status),
    };
    match ready {
        Ok(made) => Ok((adopt(reaper, made, pid, exit)?, socket)),
        Err(status) => {
            clone::kill(pid);
            ended(&exit).await;
            Err(status)
        }
    }
}

/// Waits for a process that was killed, but not for ever: the kernel may keep one that uses a file
/// system or a device which does not answer.
async fn ended(exit: &Exit) {
    if tokio::time::timeout(KILL_TIMEOUT, exit.wait()).await.is_err() {
        crate::warn!("a process that did not come up has been killed, and is still there");
    }
}

/// Forks into the container's cgroup. One that has controllers for cgroups below it takes no process
/// (systemd and Docker in a container do that to theirs): an exec goes to where its init is then.
fn clone_into(job: &Job<'_>, cgroup: BorrowedFd<'_>) -> std::io::Result<i32> {
    let flags = job.clone_flags();
    match (clone::clone_into(flags, cgroup), job) {
        (Err(error), Job::Exec { init_cgroup, .. })
            if error.kind() == std::io::ErrorKind::ResourceBusy =>
        {
            clone::clone_into(flags, init_cgroup()?.as_fd())
        }
        (made, _) => made,
    }
}

/// Makes the process that becomes the program known: the child, or its sibling.
fn adopt(reaper: &Reaper, made: Made, pid: i32, exit: Rc<Exit>) -> Result<Launched> {
    let (pid, exit) = match made.sibling {
        None => (pid, exit),
        Some(sibling) => {
            let pid = clone::living_process(sibling.as_fd());
            let pid =
                pid.context(|| "looking for the new process".to_owned())?.ok_or_else(|| {
                    Status::internal("the new process ended before its program began")
                })?;
            // It has not been reaped since: the reaper has no turn before this ends.
            (pid, reaper.claim(pid))
        }
    };
    let terminal = made.terminal.map(Pollable::new).transpose().context(|| "tty".to_owned())?;
    Ok(Launched { pid, exit, terminal, proc: made.proc })
}

/// Maps the users of a container that has its own, and lets its child go on.
async fn prepare_users(job: &Job<'_>, io: &ProcessIo, pid: i32, socket: &Pollable) -> Result<()> {
    let Job::Init { spec, .. } = job else { return Ok(()) };
    if !users::has_namespace(spec) {
        return Ok(());
    }
    within_deadline(sync::needs_users(socket, pid)).await?;
    users::map(pid, spec)?;
    if let (ProcessIo::Pipes(ends), Some(process)) = (io, &spec.process) {
        users::give_streams(ends, process, spec);
    }
    sync::tell(socket).await.context(|| "telling the child of its users".to_owned())
}

async fn within_deadline<T>(step: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::time::timeout(STEP_TIMEOUT, step).await.unwrap_or_else(|_| {
        Err(Status::new(Code::DeadlineExceeded, "the new process did not come up in time"))
    })
}

/// Stops or continues every process of the container.
pub async fn freeze(cgroup: &Cgroup, frozen: bool) -> Result<()> {
    let value = if frozen { "1" } else { "0" };
    cgroup.write("cgroup.freeze", value).context(|| "freezing".to_owned())?;
    cgroup.wait_event("frozen", u64::from(frozen), STEP_TIMEOUT).await
}

/// Kills what is left and removes the cgroup.
pub async fn delete(cgroup: &Cgroup, init_pid: Option<i32>) -> Result<()> {
    if let Some(pid) = init_pid {
        clone::kill(pid);
    }
    if !cgroup.path.exists() {
        return Ok(());
    }
    if cgroup.kill().is_ok() {
        cgroup.wait_event("populated", 0, KILL_TIMEOUT).await?;
    }
    cgroup.remove().context(|| format!("removing {}", cgroup.path.display()))
}
