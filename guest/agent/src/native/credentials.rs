//! Finds the program, takes on its user, capabilities and limits, and executes it.
//!
//! Runs inside of the container's root. Source: OCI runtime-spec config.md "POSIX process";
//! capabilities(7) for the order of the steps.

use std::ffi::CString;
use std::fs;
use std::io::Read;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};

use nix::errno::Errno;
use nix::sys::prctl::{set_keepcaps, set_no_new_privs};
use nix::unistd::{
    AccessFlags, Gid, Uid, chdir, eaccess, execve, fchown, getcwd, setgroups, setresgid, setresuid,
};

use super::capabilities::{Masks, SYS_ADMIN};
use super::seccomp::Filter;
use crate::pb::grpc::Process;
use crate::status::{Context, Result, Status};

const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Of /etc/passwd: some ten thousand users.
const MAX_USERS_BYTES: u64 = 1 << 20;

/// Everything that execve needs, found while errors can still be told at creation.
pub struct Program<'a> {
    process: &'a Process,
    path: CString,
    arguments: Vec<CString>,
    environment: Vec<CString>,
    capabilities: Masks,
}

impl<'a> Program<'a> {
    pub fn find(process: &'a Process) -> Result<Self> {
        let name = process.args.first().ok_or_else(|| Status::invalid("no program to execute"))?;
        let path = look_up(process, name)?;
        let text = |value: &String| {
            CString::new(value.as_str()).context(|| "a string of the process".to_owned())
        };
        let mut environment: Vec<CString> = process.env.iter().map(text).collect::<Result<_>>()?;
        if !process.env.iter().any(|entry| entry.starts_with("HOME=")) {
            let home = format!("HOME={}", home(process.user.as_ref().map_or(0, |user| user.uid)));
            environment.push(text(&home)?);
        }
        Ok(Self {
            process,
            path: CString::new(path).context(|| "program".to_owned())?,
            arguments: process.args.iter().map(text).collect::<Result<_>>()?,
            environment,
            capabilities: Masks::from(&process.capabilities.clone().unwrap_or_default())?,
        })
    }

    /// Takes on everything of the program's that can be had before its execution: its directory,
    /// user and capabilities. What a filter takes to be loaded stays until `confine`.
    pub fn prepare(&self, filter: Option<&Filter>) -> Result<()> {
        let process = self.process;
        give_streams(process);
        let entered = enter_directory(&process.cwd);
        let more = self.kept_for(filter);
        become_user(process, &self.capabilities, more)?;
        if entered.is_err() {
            // A file system that does not serve the agent's root may serve the user.
            go_into(&process.cwd).or(entered)?;
        }
        if process.no_new_privileges {
            set_no_new_privs().context(|| "no_new_privs".to_owned())?;
        }
        Ok(())
    }

    /// Without no_new_privs only a privileged process may load a filter.
    pub fn needs_capability_to_confine(&self) -> bool {
        !self.process.no_new_privileges
    }

    fn kept_for(&self, filter: Option<&Filter>) -> u64 {
        if filter.is_some() && self.needs_capability_to_confine() { SYS_ADMIN } else { 0 }
    }

    /// Loads the filter, which must allow all that follows, and gives up what that took.
    pub fn confine(&self, filter: Option<&Filter>) -> Result<()> {
        if let Some(filter) = filter {
            filter.enforce()?;
        }
        if self.kept_for(filter) != 0 {
            self.capabilities.set(0)?;
        }
        Ok(())
    }

    /// Becomes the program; returns only an error.
    pub fn execute(self) -> Result<()> {
        let Err(error) = execve(&self.path, &self.arguments, &self.environment);
        Err(Status::internal(format!("exec {:?}: {}", self.path, error.desc())))
    }
}

/// The program's path, by PATH if the name has no slash.
fn look_up(process: &Process, name: &str) -> Result<String> {
    let directory = if process.cwd.is_empty() { "/" } else { process.cwd.as_str() };
    if name.contains('/') {
        let path =
            if name.starts_with('/') { name.to_owned() } else { format!("{directory}/{name}") };
        return match check_program(&path) {
            Ok(()) => Ok(path),
            Err(error) => Err(Status::not_found(format!("exec: {name:?}: {}", reason(error)))),
        };
    }
    let path = process.env.iter().rev().find_map(|entry| entry.strip_prefix("PATH="));
    let mut last = Errno::ENOENT;
    for place in path.unwrap_or(DEFAULT_PATH).split(':') {
        let place = if place.is_empty() { directory } else { place };
        let candidate = format!("{place}/{name}");
        match check_program(&candidate) {
            Ok(()) => return Ok(candidate),
            Err(Errno::EACCES) => last = Errno::EACCES,
            Err(_) => {}
        }
    }
    let why = if last == Errno::EACCES {
        "permission denied"
    } else {
        "executable file not found in $PATH"
    };
    Err(Status::not_found(format!("exec: {name:?}: {why}")))
}

fn reason(error: Errno) -> &'static str {
    match error {
        Errno::ENOENT => "no such file or directory",
        Errno::EACCES => "permission denied",
        other => other.desc(),
    }
}

fn check_program(path: &str) -> nix::Result<()> {
    let status = nix::sys::stat::stat(path)?;
    if status.st_mode & libc::S_IFMT != libc::S_IFREG {
        return Err(Errno::EACCES);
    }
    // The agent may execute anything that has an x bit for somebody.
    eaccess(path, AccessFlags::X_OK)
}

/// The user's home by the container's own passwd; "/" for a user it does not know.
fn home(uid: u32) -> String {
    // Without one that can be read the user is not known either.
    let text = read_users("/etc/passwd").unwrap_or_default();
    let found = text.lines().find_map(|line| {
        let fields: Vec<&str> = line.split(':').collect();
        (fields.get(2)?.parse() == Ok(uid)).then(|| fields.get(5).map(ToString::to_string))?
    });
    found.filter(|home| !home.is_empty()).unwrap_or_else(|| "/".to_owned())
}

/// The start of a file of the image, which may have put anything there: a FIFO must not make this
/// wait, nor a device fill the memory.
fn read_users(path: &str) -> std::io::Result<String> {
    let file = fs::OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    if !file.metadata()?.is_file() {
        return Ok(String::new());
    }
    let mut text = Vec::new();
    file.take(MAX_USERS_BYTES).read_to_end(&mut text)?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}

/// A program that runs as somebody else may open /dev/stdout, which is one of these.
fn give_streams(process: &Process) {
    let uid = process.user.as_ref().map_or(0, |user| user.uid);
    for stream in [0, 1, 2] {
        // SAFETY: 0, 1 and 2 stay open until the program replaces this process.
        let stream = unsafe { std::os::fd::BorrowedFd::borrow_raw(stream) };
        // A stream that can't be given away, such as /dev/null, serves as it is.
        let _ = fchown(stream, Some(Uid::from_raw(uid)), None);
    }
}

fn become_user(process: &Process, capabilities: &Masks, more: u64) -> Result<()> {
    let user = process.user.clone().unwrap_or_default();
    capabilities.bound()?;
    let groups: Vec<Gid> = user.additional_gids.iter().map(|gid| Gid::from_raw(*gid)).collect();
    let (uid, gid) = (Uid::from_raw(user.uid), Gid::from_raw(user.gid));
    set_keepcaps(true).context(|| "keepcaps".to_owned())?;
    setgroups(&groups).context(|| "setting groups".to_owned())?;
    setresgid(gid, gid, gid).context(|| format!("becoming group {gid}"))?;
    setresuid(uid, uid, uid).context(|| format!("becoming user {uid}"))?;
    set_keepcaps(false).context(|| "keepcaps".to_owned())?;
    capabilities.apply(more)
}

/// Makes the directory if there is none, and enters it: as root, because the user may be allowed
/// neither, and yet be allowed to work there.
fn enter_directory(cwd: &str) -> Result<()> {
    if !cwd.is_empty() && chdir(cwd) == Err(Errno::ENOENT) {
        let what = || format!("working directory {cwd}");
        fs::DirBuilder::new().recursive(true).mode(0o755).create(cwd).context(what)?;
    }
    go_into(cwd)
}

fn go_into(cwd: &str) -> Result<()> {
    let cwd = if cwd.is_empty() { "/" } else { cwd };
    let what = || format!("working directory {cwd}");
    chdir(cwd).context(what)?;
    // A directory outside of the root has no path.
    let path = getcwd().context(what)?;
    if path.is_absolute() { Ok(()) } else { Err(Status::invalid(format!("{cwd} is outside"))) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_are_read_from_a_file_and_never_waited_for() {
        let path = format!("/tmp/users-fifo-{}", std::process::id());
        nix::unistd::mkfifo(path.as_str(), nix::sys::stat::Mode::S_IRWXU).unwrap();
        let fifo = read_users(&path);
        fs::remove_file(&path).unwrap();
        assert_eq!(fifo.unwrap(), "");
        assert_eq!(read_users("/dev/zero").unwrap(), "");
        assert!(read_users("/etc/passwd").unwrap().starts_with("root:"));
    }

    #[test]
    fn program_is_found_by_path_or_refused_with_a_reason() {
        let process = |name: &str| Process {
            args: vec![name.to_owned()],
            env: vec!["PATH=/nowhere:/bin:/usr/bin".to_owned()],
            ..Process::default()
        };
        assert!(look_up(&process("sh"), "sh").unwrap().ends_with("/sh"));
        let missing = look_up(&process("x"), "no-such-program").unwrap_err();
        assert!(missing.message.contains("executable file not found in $PATH"));
        let absolute = look_up(&process("x"), "/etc/passwd").unwrap_err();
        assert!(absolute.message.contains("permission denied"), "{absolute}");
    }
}
