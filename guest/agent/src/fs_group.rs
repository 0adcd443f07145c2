//! Gives a volume to a group, as Kubernetes' fsGroup asks.
//!
//! The tree may belong to a container that runs, so the walk never follows a link and stays on its
//! file descriptors.

use std::os::fd::AsFd;
use std::path::Path;

use nix::dir::Dir;
use nix::fcntl::{AtFlags, OFlag};
use nix::sys::stat::{FchmodatFlags, Mode, SFlag, fchmodat, fstat, fstatat};
use nix::unistd::{Gid, fchownat};

use crate::pb::grpc::FsGroup;
use crate::pb::types::FsGroupChangePolicy;
use crate::status::{Context, Result, Status};

const MAX_DEPTH: usize = 64;
const READ_WRITE: Mode = Mode::from_bits_truncate(0o660);
const DIRECTORY: Mode = Mode::from_bits_truncate(0o2110);
const OPEN: OFlag = OFlag::O_DIRECTORY.union(OFlag::O_NOFOLLOW).union(OFlag::O_CLOEXEC);

pub fn apply(root: &Path, group: &FsGroup) -> Result<()> {
    let gid = Gid::from_raw(group.group_id);
    let what = || format!("giving {} to group {gid}", root.display());
    let mut top = Dir::open(root, OPEN, Mode::empty()).context(what)?;
    let status = fstat(&top).context(what)?;
    let on_mismatch = FsGroupChangePolicy::OnRootMismatch as i32;
    if group.group_change_policy == on_mismatch && status.st_gid == group.group_id {
        return Ok(());
    }
    walk(&mut top, gid, MAX_DEPTH).context(what)?;
    own(top.as_fd(), c".", gid).context(what)
}

fn walk(directory: &mut Dir, gid: Gid, depth: usize) -> Result<(), Status> {
    if depth == 0 {
        return Err(Status::internal("the directory tree is too deep"));
    }
    let names: Vec<_> = directory
        .iter()
        .filter_map(|entry| entry.ok().map(|entry| entry.file_name().to_owned()))
        .filter(|name| name.as_c_str() != c"." && name.as_c_str() != c"..")
        .collect();
    for name in names {
        let what = || name.to_string_lossy().into_owned();
        let status = fstatat(directory.as_fd(), name.as_c_str(), AtFlags::AT_SYMLINK_NOFOLLOW)
            .context(what)?;
        let kind = SFlag::from_bits_truncate(status.st_mode) & SFlag::S_IFMT;
        if kind == SFlag::S_IFDIR {
            let mut child = Dir::openat(directory.as_fd(), name.as_c_str(), OPEN, Mode::empty())
                .context(what)?;
            walk(&mut child, gid, depth - 1)?;
        }
        own(directory.as_fd(), &name, gid).context(what)?;
    }
    Ok(())
}

fn own(directory: std::os::fd::BorrowedFd<'_>, name: &std::ffi::CStr, gid: Gid) -> nix::Result<()> {
    let status = fstatat(directory, name, AtFlags::AT_SYMLINK_NOFOLLOW)?;
    fchownat(directory, name, None, Some(gid), AtFlags::AT_SYMLINK_NOFOLLOW)?;
    let kind = SFlag::from_bits_truncate(status.st_mode) & SFlag::S_IFMT;
    let mode = Mode::from_bits_truncate(status.st_mode);
    let wanted = match kind {
        SFlag::S_IFDIR => mode | READ_WRITE | DIRECTORY,
        SFlag::S_IFREG => mode | READ_WRITE,
        // Links have no mode; devices, sockets and FIFOs keep theirs.
        _ => return Ok(()),
    };
    // A name that has become a link since is refused where the kernel can (fchmodat2), and changes
    // nothing but a file of the same volume otherwise.
    match fchmodat(directory, name, wanted, FchmodatFlags::NoFollowSymlink) {
        Err(nix::errno::Errno::EOPNOTSUPP) => {
            fchmodat(directory, name, wanted, FchmodatFlags::FollowSymlink)
        }
        other => other,
    }
}
