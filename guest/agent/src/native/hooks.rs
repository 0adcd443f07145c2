//! Hooks of the spec that run in the guest: `startContainer`, inside of the container.
//!
//! All others belong to the host's side of the container, where shims run them. Source: OCI
//! runtime-spec config.md "POSIX-platform Hooks".

use std::io::Write;
use std::os::fd::AsFd;
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::clone;
use crate::json::Object;
use crate::pb::grpc::{Hook, Hooks};
use crate::status::{Code, Context, Result, Status};

/// Refuses hooks that could only run at the wrong place.
pub fn check(hooks: &Hooks) -> Result<()> {
    for (name, hooks) in [
        ("prestart", &hooks.prestart),
        ("createRuntime", &hooks.create_runtime),
        ("createContainer", &hooks.create_container),
        ("poststart", &hooks.poststart),
        ("poststop", &hooks.poststop),
    ] {
        if !hooks.is_empty() {
            let text = format!("hook {name}: only startContainer hooks run in the guest");
            return Err(Status::unimplemented(text));
        }
    }
    Ok(())
}

/// What a hook reads: the state of the container. Source: OCI runtime-spec runtime.md "State".
pub fn state(id: &str, bundle: &str) -> String {
    let mut state = Object::new();
    state.string("ociVersion", "1.0.2").string("id", id).string("status", "created");
    // Where the hook runs, the container's init is process 1 of its pid namespace.
    state.integer("pid", 1).string("bundle", bundle);
    state.finish()
}

/// Runs hooks one after the other; the first that fails keeps the container from starting.
pub fn run(hooks: &[Hook], state: &str) -> Result<()> {
    hooks.iter().try_for_each(|hook| {
        run_one(hook, state)
            .map_err(|status| Status::new(status.code, format!("hook {}: {status}", hook.path)))
    })
}

fn run_one(hook: &Hook, state: &str) -> Result<()> {
    let mut command = Command::new(&hook.path);
    // The first argument is the program's own name.
    command.args(hook.args.iter().skip(1)).env_clear();
    command.envs(hook.env.iter().filter_map(|entry| entry.split_once('=')));
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = command.spawn().context(|| "starting it".to_owned())?;
    if let Some(mut stdin) = child.stdin.take() {
        // A hook that does not read its state does not need it.
        let _ = stdin.write_all(state.as_bytes());
    }
    let timeout = u64::try_from(hook.timeout).ok().filter(|seconds| *seconds > 0);
    if let Some(timeout) = timeout.map(Duration::from_secs) {
        let pid = child.id().cast_signed();
        let ended = clone::open_pidfd(pid).context(|| "waiting for it".to_owned())?;
        if !wait_readable(&ended, timeout).context(|| "waiting for it".to_owned())? {
            clone::kill(pid);
            let text = format!("not done after {} s", timeout.as_secs());
            return Err(Status::new(Code::DeadlineExceeded, text));
        }
    }
    let status = child.wait().context(|| "waiting for it".to_owned())?;
    if status.success() { Ok(()) } else { Err(Status::internal(status.to_string())) }
}

fn wait_readable(fd: &impl AsFd, timeout: Duration) -> nix::Result<bool> {
    let timeout = PollTimeout::try_from(timeout).unwrap_or(PollTimeout::MAX);
    let mut fds = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
    loop {
        match poll(&mut fds, timeout) {
            Err(Errno::EINTR) => {}
            other => return other.map(|count| count > 0),
        }
    }
}
