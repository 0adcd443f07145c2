//! A container's user namespace: what only the agent can do for a child that is not root any more.

use std::fmt::Write;
use std::fs;
use std::os::fd::AsFd;

use nix::errno::Errno;
use nix::unistd::{Gid, Uid, fchown};

use crate::pb::grpc::{LinuxIdMapping, PosixRlimit, Process, Spec};
use crate::status::{Context, Result, Status};
use crate::stdio::ProcessEnds;

/// Source: asm-generic/resource.h, by number.
const LIMITS: [&str; 16] = [
    "CPU",
    "FSIZE",
    "DATA",
    "STACK",
    "CORE",
    "RSS",
    "NPROC",
    "NOFILE",
    "MEMLOCK",
    "AS",
    "LOCKS",
    "SIGPENDING",
    "MSGQUEUE",
    "NICE",
    "RTPRIO",
    "RTTIME",
];

/// Whether the container's users are not the guest's.
pub fn has_namespace(spec: &Spec) -> bool {
    let linux = spec.linux.as_ref();
    linux.is_some_and(|linux| linux.namespaces.iter().any(|ns| ns.r#type == "user"))
}

/// Tells the kernel which users of the guest those of the namespace are.
pub fn map(pid: i32, spec: &Spec) -> Result<()> {
    let linux = spec.linux.as_ref().ok_or_else(|| Status::invalid("no id mappings"))?;
    for (file, mappings) in [("uid_map", &linux.uid_mappings), ("gid_map", &linux.gid_mappings)] {
        if mappings.is_empty() {
            return Err(Status::invalid("a user namespace without id mappings"));
        }
        let mut text = String::new();
        for mapping in mappings {
            let (inside, outside) = (mapping.container_id, mapping.host_id);
            let _ = writeln!(text, "{inside} {outside} {}", mapping.size);
        }
        fs::write(format!("/proc/{pid}/{file}"), text).context(|| format!("writing {file}"))?;
    }
    Ok(())
}

/// The guest's id of a user of the namespace.
fn outside(id: u32, mappings: &[LinuxIdMapping]) -> Option<u32> {
    mappings.iter().find_map(|mapping| {
        let offset = id.checked_sub(mapping.container_id)?;
        (offset < mapping.size).then(|| mapping.host_id.checked_add(offset))?
    })
}

/// A program that runs as somebody else may open /dev/stdout, which is one of these.
pub fn give_streams(ends: &ProcessEnds, process: &Process, spec: &Spec) {
    let user = process.user.clone().unwrap_or_default();
    let default = crate::pb::grpc::Linux::default();
    let linux = spec.linux.as_ref().unwrap_or(&default);
    let uid = outside(user.uid, &linux.uid_mappings).map(Uid::from_raw);
    let gid = outside(user.gid, &linux.gid_mappings).map(Gid::from_raw);
    for end in [&ends.stdin, &ends.stdout, &ends.stderr] {
        // Without this they serve as they are, except for being opened by their names.
        let _ = fchown(end.as_fd(), uid, gid);
    }
}

/// Sets the limits of a process that waits to start; in a user namespace it could not raise them.
pub fn set_limits(pid: i32, limits: &[PosixRlimit]) -> Result<()> {
    for limit in limits {
        let name = limit.r#type.strip_prefix("RLIMIT_").unwrap_or(&limit.r#type);
        let number = LIMITS.iter().position(|known| *known == name);
        let number = number.ok_or_else(|| Status::invalid(format!("limit {:?}", limit.r#type)))?;
        let resource = u32::try_from(number).context(|| limit.r#type.clone())?;
        let value = libc::rlimit { rlim_cur: limit.soft, rlim_max: limit.hard };
        // SAFETY: prlimit reads one structure from the pointer, which is valid for the call, and
        // writes none.
        let result =
            unsafe { libc::prlimit(pid, resource, &raw const value, std::ptr::null_mut()) };
        Errno::result(result).context(|| format!("setting {}", limit.r#type))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_mapped_by_the_range_they_are_in() {
        let mapping = |container_id, host_id, size| LinuxIdMapping { container_id, host_id, size };
        let mappings = [mapping(0, 100_000, 10), mapping(1000, 5000, 1)];
        for (inside, expected) in
            [(0, Some(100_000)), (9, Some(100_009)), (10, None), (1000, Some(5000)), (999, None)]
        {
            assert_eq!(outside(inside, &mappings), expected, "{inside}");
        }
    }
}
