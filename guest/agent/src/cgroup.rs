//! One container's cgroup (version 2): statistics, killing, OOM counts.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};

use crate::io::Pollable;
use crate::status::{Code, Context, Result, Status};

/// Where version 2 is mounted: alone, or beside version 1 on a host that has both.
fn mount_point() -> &'static str {
    const ALONE: &str = crate::boot::CGROUP_ROOT;
    const BESIDE: &str = "/sys/fs/cgroup/unified";
    if Path::new(BESIDE).exists() { BESIDE } else { ALONE }
}

/// All containers' cgroups are below this one, so that no id can meet a file of the root cgroup.
pub const PARENT: &str = "/kata";

pub struct Cgroup {
    /// As the OCI spec names it.
    pub name: String,
    pub path: PathBuf,
}

impl Cgroup {
    pub fn of_container(id: &str) -> Self {
        let name = format!("{PARENT}/{id}");
        let path = PathBuf::from(format!("{}{name}", mount_point()));
        Self { name, path }
    }

    /// Makes it and opens its directory.
    pub fn create(&self) -> io::Result<OwnedFd> {
        fs::create_dir(&self.path)?;
        Ok(File::open(&self.path)?.into())
    }

    /// Opens the directory of the one that a process is in: this one, or one that the container has
    /// made below it. `lists` is the process's `/proc/<pid>/cgroup`.
    pub fn open_member(&self, lists: &str) -> io::Result<OwnedFd> {
        let below = below(&self.name, lists).ok_or_else(|| {
            io::Error::other(format!("the container's init has left {}", self.path.display()))
        })?;
        Ok(File::open(self.path.join(below))?.into())
    }

    pub fn write(&self, file: &str, value: &str) -> io::Result<()> {
        fs::write(self.path.join(file), value)
    }

    /// Waits for a line of `cgroup.events` to have a value.
    pub async fn wait_event(&self, key: &str, value: u64, timeout: Duration) -> Result<()> {
        let reached = || {
            // A cgroup that is gone has no processes and nothing frozen.
            let text = self.read("cgroup.events");
            text.is_none_or(|text| field(&text, key) == Some(value))
        };
        if reached() {
            return Ok(());
        }
        let what = || format!("events of cgroup {}", self.path.display());
        let inotify =
            Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK).context(what)?;
        inotify
            .add_watch(&self.path.join("cgroup.events"), AddWatchFlags::IN_MODIFY)
            .context(what)?;
        let changes = Pollable::new(inotify.as_fd().try_clone_to_owned().context(what)?);
        let changes = changes.context(what)?;
        let wait = async {
            let mut buffer = [0; 512];
            while !reached() {
                changes.read(&mut buffer).await?;
            }
            io::Result::Ok(())
        };
        match tokio::time::timeout(timeout, wait).await {
            Ok(result) => result.context(what),
            Err(_) => {
                let text = format!("{} did not become {key} {value}", self.path.display());
                Err(Status::new(Code::DeadlineExceeded, text))
            }
        }
    }

    /// Removes it and those that its processes have made below it; none may have a process left.
    pub fn remove(&self) -> io::Result<()> {
        remove_tree(&self.path)
    }

    pub fn read(&self, file: &str) -> Option<String> {
        fs::read_to_string(self.path.join(file)).ok()
    }

    /// Kills every process in it, at once and with no race against forks.
    pub fn kill(&self) -> io::Result<()> {
        fs::write(self.path.join("cgroup.kill"), "1")
    }

    /// Nothing in it runs, not even a process that joins it.
    pub fn is_frozen(&self) -> bool {
        self.number("cgroup.freeze") == Some(1)
    }

    /// How often the OOM killer has hit it; 0 if it is gone.
    pub fn oom_kills(&self) -> u64 {
        self.read("memory.events").and_then(|text| field(&text, "oom_kill")).unwrap_or(0)
    }

    pub fn events_file(&self) -> PathBuf {
        self.path.join("memory.events")
    }

    /// A file with one number; "max" is no limit.
    pub fn number(&self, file: &str) -> Option<u64> {
        let text = self.read(file)?;
        match text.trim() {
            "max" => Some(u64::MAX),
            digits => digits.parse().ok(),
        }
    }
}

fn remove_tree(path: &Path) -> io::Result<()> {
    match fs::remove_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => return other,
    }
    for entry in fs::read_dir(path)?.flatten() {
        if entry.file_type()?.is_dir() {
            remove_tree(&entry.path())?;
        }
    }
    fs::remove_dir(path)
}

/// The path of a process's cgroup (version 2) below the one with this name; none if it is elsewhere.
fn below<'a>(name: &str, lists: &'a str) -> Option<&'a str> {
    let path = lists.lines().find_map(|line| line.strip_prefix("0::"))?;
    let rest = path.strip_prefix(name)?;
    let below = if rest.is_empty() { rest } else { rest.strip_prefix('/')? };
    Path::new(below).components().all(|part| matches!(part, Component::Normal(_))).then_some(below)
}

/// The value of a `key value` line.
pub fn field(text: &str, key: &str) -> Option<u64> {
    text.lines().find_map(|line| {
        let (name, value) = line.split_once(' ')?;
        if name == key { value.trim().parse().ok() } else { None }
    })
}

/// Makes the parent of all containers' cgroups.
pub fn prepare_parent() -> io::Result<()> {
    let path = format!("{}{PARENT}", mount_point());
    if !Path::new(&path).exists() {
        fs::create_dir(&path)?;
    }
    crate::boot::enable_controllers(&path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cgroup_of_a_process_is_found_only_below_its_container_s() {
        assert_eq!(below("/kata/c1", "12:cpu:/x\n0::/kata/c1/init.scope\n"), Some("init.scope"));
        assert_eq!(below("/kata/c1", "0::/kata/c1\n"), Some(""));
        assert_eq!(below("/kata/c1", "0::/kata/c1/a/b\n"), Some("a/b"));
        for elsewhere in
            ["0::/kata/c10\n", "0::/\n", "0::/kata/c1/../c2\n", "0::/kata/c1//etc\n", ""]
        {
            assert_eq!(below("/kata/c1", elsewhere), None, "{elsewhere}");
        }
    }
}
