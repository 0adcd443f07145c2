//! Finds the program, takes on its user, capabilities and limits, and executes it.
//!
//! Runs inside of the container's root. Source: OCI runtime-spec config.md "POSIX process";
//! capabilities(7) for the order of the steps.

use std::ffi::CString;
use std::fs;
use std::os::unix::fs::DirBuilderExt;

use nix::errno::Errno;
use nix::sys::prctl::{set_keepcaps, set_no_new_privs};
use nix::unistd::{
    AccessFlags, Gid, Uid, chdir, eaccess, execve, fchown, getcwd, setgroups, setresgid, setresuid,
};

use super::seccomp::Filter;
use crate::pb::grpc::{LinuxCapabilities, Process};
use crate::status::{Context, Result, Status};

/// Source: linux/capability.h, by number.
const CAPABILITIES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];
/// Source: linux/capability.h, _LINUX_CAPABILITY_VERSION_3.
const CAPABILITY_VERSION: u32 = 0x2008_0522;
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Everything that execve needs, found while errors can still be told at creation.
pub struct Program<'a> {
    process: &'a Process,
    path: CString,
    arguments: Vec<CString>,
    environment: Vec<CString>,
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
        })
    }

    /// Becomes the program; returns only an error.
    pub fn execute(self, filter: Option<&Filter>) -> Result<()> {
        let process = self.process;
        give_streams(process);
        // Without no_new_privs only a privileged process may load a filter, so it comes first and
        // must allow the steps that follow; with it, the filter comes last.
        let (early, late) = if process.no_new_privileges { (None, filter) } else { (filter, None) };
        if let Some(filter) = early {
            filter.enforce()?;
        }
        become_user(process)?;
        enter_directory(&process.cwd)?;
        if process.no_new_privileges {
            set_no_new_privs().context(|| "no_new_privs".to_owned())?;
        }
        if let Some(filter) = late {
            filter.enforce()?;
        }
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
    let text = fs::read_to_string("/etc/passwd").unwrap_or_default();
    let found = text.lines().find_map(|line| {
        let fields: Vec<&str> = line.split(':').collect();
        (fields.get(2)?.parse() == Ok(uid)).then(|| fields.get(5).map(ToString::to_string))?
    });
    found.filter(|home| !home.is_empty()).unwrap_or_else(|| "/".to_owned())
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

fn become_user(process: &Process) -> Result<()> {
    let user = process.user.clone().unwrap_or_default();
    let sets = process.capabilities.clone().unwrap_or_default();
    let masks = Masks::from(&sets)?;
    for number in 0..=last_capability() {
        if masks.bounding & (1 << number) == 0 {
            // SAFETY: PR_CAPBSET_DROP takes numbers.
            let result = unsafe { libc::prctl(libc::PR_CAPBSET_DROP, number, 0, 0, 0) };
            Errno::result(result).context(|| format!("dropping capability {number}"))?;
        }
    }
    let groups: Vec<Gid> = user.additional_gids.iter().map(|gid| Gid::from_raw(*gid)).collect();
    let (uid, gid) = (Uid::from_raw(user.uid), Gid::from_raw(user.gid));
    set_keepcaps(true).context(|| "keepcaps".to_owned())?;
    setgroups(&groups).context(|| "setting groups".to_owned())?;
    setresgid(gid, gid, gid).context(|| format!("becoming group {gid}"))?;
    setresuid(uid, uid, uid).context(|| format!("becoming user {uid}"))?;
    set_keepcaps(false).context(|| "keepcaps".to_owned())?;
    masks.apply()
}

/// Bits of the five sets.
struct Masks {
    bounding: u64,
    effective: u64,
    permitted: u64,
    inheritable: u64,
    ambient: u64,
}

impl Masks {
    fn from(sets: &LinuxCapabilities) -> Result<Self> {
        Ok(Self {
            bounding: mask(&sets.bounding)?,
            effective: mask(&sets.effective)?,
            permitted: mask(&sets.permitted)?,
            inheritable: mask(&sets.inheritable)?,
            ambient: mask(&sets.ambient)?,
        })
    }

    fn apply(&self) -> Result<()> {
        let header = [CAPABILITY_VERSION, 0];
        let low = |mask: u64| u32::try_from(mask & 0xffff_ffff).unwrap_or(0);
        let high = |mask: u64| u32::try_from(mask >> 32).unwrap_or(0);
        let data = [
            low(self.effective),
            low(self.permitted),
            low(self.inheritable),
            high(self.effective),
            high(self.permitted),
            high(self.inheritable),
        ];
        // SAFETY: capset reads a header of two words and two triples of words; both are valid for
        // the call. Source: capset(2), version 3.
        let result = unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), data.as_ptr()) };
        Errno::result(result).context(|| "setting capabilities".to_owned())?;
        for number in (0..64).filter(|number| self.ambient & (1 << number) != 0) {
            // SAFETY: PR_CAP_AMBIENT takes numbers.
            let result = unsafe {
                libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_RAISE, number, 0, 0)
            };
            Errno::result(result).context(|| format!("ambient capability {number}"))?;
        }
        Ok(())
    }
}

fn mask(names: &[String]) -> Result<u64> {
    let last = last_capability();
    names.iter().try_fold(0, |mask, name| {
        let short = name.strip_prefix("CAP_").unwrap_or(name);
        let number = CAPABILITIES.iter().position(|known| known.eq_ignore_ascii_case(short));
        let number = number.ok_or_else(|| Status::invalid(format!("capability {name:?}")))?;
        // One that this kernel does not know can't be given.
        Ok(if number <= last { mask | 1 << number } else { mask })
    })
}

/// The kernel's last capability.
fn last_capability() -> usize {
    let known = |number: &usize| {
        // SAFETY: PR_CAPBSET_READ takes a number and fails for one that does not exist.
        unsafe { libc::prctl(libc::PR_CAPBSET_READ, *number, 0, 0, 0) >= 0 }
    };
    (0..64).take_while(known).last().unwrap_or(0)
}

fn enter_directory(cwd: &str) -> Result<()> {
    let cwd = if cwd.is_empty() { "/" } else { cwd };
    let what = || format!("working directory {cwd}");
    if let Err(Errno::ENOENT) = chdir(cwd) {
        fs::DirBuilder::new().recursive(true).mode(0o755).create(cwd).context(what)?;
    }
    chdir(cwd).context(what)?;
    // A directory outside of the root has no path.
    let path = getcwd().context(what)?;
    if path.is_absolute() { Ok(()) } else { Err(Status::invalid(format!("{cwd} is outside"))) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_are_numbered_as_the_kernel_numbers_them() {
        assert_eq!(mask(&["CAP_CHOWN".into(), "CAP_KILL".into()]).unwrap(), 1 | 1 << 5);
        assert_eq!(mask(&["CAP_SYS_ADMIN".into()]).unwrap(), 1 << 21);
        assert!(mask(&["CAP_NO_SUCH".into()]).is_err());
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
