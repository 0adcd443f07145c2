//! Containers made by the agent itself: one fork a container or exec, no program of a runtime.
//!
//! crun costs 100-200 ms a verb in an emulated guest, most of it for starting the program; this
//! costs a fork. What is not done here (user namespaces, hooks) is left to crun by [`supports`].
//!
//! ```text
//! agent                         child
//! cgroup, clone ──────────────> namespaces, mounts, devices, pivot_root, program lookup
//! create answers <──── ready ── (tty master goes with it)
//! start ────────────── go ────> credentials, execve
//! start answers  <──── EOF ──── or an error text
//! ```

mod child;
mod clone;
mod credentials;
mod devices;
pub mod limits;
mod rootfs;
mod seccomp;
mod sync;
mod syscalls;
mod terminal;

use std::cell::RefCell;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use crate::cgroup::Cgroup;
use crate::io::Pollable;
use crate::pb::grpc::{LinuxSeccomp, Process, Spec};
use crate::reaper::Reaper;
use crate::runtime::{Launched, ProcessIo};
use crate::status::{Code, Context, Result, Status};

use self::child::{Job, Standard};

/// From the fork to the program; an emulated guest on a loaded host needs a second.
const STEP_TIMEOUT: Duration = Duration::from_secs(60);
/// From the kill of a cgroup's processes to its being empty.
const KILL_TIMEOUT: Duration = Duration::from_secs(30);

/// A container that has not been told to go yet holds its end of the conversation.
#[derive(Default)]
pub struct Waiting(RefCell<Option<Pollable>>);

/// Whether this runtime can make the container; otherwise crun must.
pub fn supports(spec: &Spec) -> bool {
    let hooks = spec.hooks.as_ref().is_none_or(|hooks| {
        hooks.prestart.is_empty()
            && hooks.create_runtime.is_empty()
            && hooks.create_container.is_empty()
            && hooks.start_container.is_empty()
            && hooks.poststart.is_empty()
            && hooks.poststop.is_empty()
    });
    let linux = spec.linux.as_ref();
    let no_user_namespace =
        linux.is_none_or(|linux| !linux.namespaces.iter().any(|ns| ns.r#type == "user"));
    hooks && no_user_namespace
}

/// Makes the container, stopped before its program.
pub async fn create(
    reaper: &Reaper,
    spec: &Spec,
    cgroup: &Cgroup,
    io: ProcessIo,
) -> Result<(Launched, Waiting)> {
    let directory = cgroup.create().context(|| format!("cgroup {}", cgroup.path.display()))?;
    let resources = spec.linux.as_ref().and_then(|linux| linux.resources.as_ref());
    if let Some(resources) = resources {
        limits::apply(cgroup, resources)?;
    }
    devices::restrict(directory.as_fd(), resources)?;
    let (launched, socket) = launch(reaper, Job::Init(spec), io, Some(directory), None).await?;
    Ok((launched, Waiting(RefCell::new(Some(socket)))))
}

/// Makes the device filter that most containers share, while nobody waits for it.
pub fn warm_up() {
    let resources = crate::spec::default_resources();
    if let Err(status) = devices::prepare(&resources) {
        crate::warn!("{status}");
    }
}

/// Lets the program begin; an answer means that it has been executed.
pub async fn start(waiting: &Waiting) -> Result<()> {
    let socket = waiting.0.borrow_mut().take();
    let socket = socket.ok_or_else(|| Status::internal("the container is not waiting to start"))?;
    sync::tell(&socket).await.context(|| "telling the container to start".to_owned())?;
    within_deadline(sync::executed(&socket)).await
}

/// Runs a process in the namespaces of the container whose init has this pid.
pub async fn exec(
    reaper: &Reaper,
    process: &Process,
    seccomp: Option<&LinuxSeccomp>,
    init_pid: i32,
    cgroup: &Cgroup,
    io: ProcessIo,
) -> Result<Launched> {
    let target = clone::open_pidfd(init_pid)
        .context(|| "the container's init has ended; its namespaces can't be joined".to_owned())?;
    let directory = File::open(&cgroup.path).ok().map(OwnedFd::from);
    let job = Job::Exec { process, seccomp, target: target.as_fd() };
    let (launched, socket) = launch(reaper, job, io, directory, Some(init_pid)).await?;
    sync::tell(&socket).await.context(|| "telling the process to start".to_owned())?;
    let executed = within_deadline(sync::executed(&socket)).await;
    if executed.is_err() {
        launched.exit.wait().await;
    }
    executed.map(|()| launched)
}

async fn launch(
    reaper: &Reaper,
    job: Job<'_>,
    io: ProcessIo,
    cgroup: Option<OwnedFd>,
    pid_namespace_of: Option<i32>,
) -> Result<(Launched, Pollable)> {
    let (ours, theirs) = sync::pair().context(|| "socket pair".to_owned())?;
    let standard = match &io {
        ProcessIo::Pipes(ends) => Standard::Pipes(ends),
        ProcessIo::Terminal => Standard::Terminal,
    };
    let flags = job.clone_flags();
    let namespace = job.pid_namespace(pid_namespace_of);
    let cloned = clone::in_namespace(namespace.as_deref(), || {
        clone::clone_into(flags, cgroup.as_ref().map(AsFd::as_fd))
    });
    let pid = match cloned.context(|| "making a process".to_owned())? {
        0 => child::run(&job, &standard, theirs),
        pid => pid,
    };
    drop(theirs);
    drop(io);
    let exit = reaper.claim(pid);
    let socket = Pollable::new(ours).context(|| "socket pair".to_owned())?;
    match within_deadline(sync::ready(&socket)).await {
        Ok(master) => {
            let terminal = master.map(Pollable::new).transpose();
            let terminal = terminal.context(|| "tty".to_owned())?;
            Ok((Launched { pid, exit, terminal }, socket))
        }
        Err(status) => {
            clone::kill(pid);
            exit.wait().await;
            Err(status)
        }
    }
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
