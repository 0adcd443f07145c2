//! One container's cgroup (version 2): statistics, killing, OOM counts.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::boot::CGROUP_ROOT;

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
        let path = PathBuf::from(format!("{CGROUP_ROOT}{name}"));
        Self { name, path }
    }

    pub fn read(&self, file: &str) -> Option<String> {
        fs::read_to_string(self.path.join(file)).ok()
    }

    /// Kills every process in it, at once and with no race against forks.
    pub fn kill(&self) -> io::Result<()> {
        fs::write(self.path.join("cgroup.kill"), "1")
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

/// The value of a `key value` line.
pub fn field(text: &str, key: &str) -> Option<u64> {
    text.lines().find_map(|line| {
        let (name, value) = line.split_once(' ')?;
        if name == key { value.trim().parse().ok() } else { None }
    })
}

/// Makes the parent of all containers' cgroups.
pub fn prepare_parent() -> io::Result<()> {
    let path = format!("{CGROUP_ROOT}{PARENT}");
    if !Path::new(&path).exists() {
        fs::create_dir(&path)?;
    }
    crate::boot::enable_controllers(&path)
}
