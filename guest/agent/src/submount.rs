//! The host's mounts below the shared directory, of which the guest's kernel makes file systems.
//!
//! virtio-fs announces them. The kernel mounts each by itself where a mount namespace first meets it,
//! and shuts it down with its last mount. It doesn't wait there for reads that are under way, of a
//! process that was killed or has read less than was read ahead: "Busy inodes after unmount of
//! virtiofs" is a kernel BUG with Debian's configuration, and the process that was last, mostly a
//! container's first one, hangs in its exit for ever. So the agent is the first to meet them and the
//! last to let go, when they are quiet. Source: Linux 6.1 fs/fuse/file.c `fuse_file_put`, called by
//! `fuse_readpages_end`; fs/super.c `generic_shutdown_super`.

use std::os::fd::OwnedFd;
use std::path::Path;

use nix::mount::{MntFlags, umount2};
use nix::sys::statfs::fstatfs;

use crate::beneath;
use crate::status::{Context, Result};

/// The host's files. Source: kata agent protocol, the `virtio-fs` storage's mount point.
pub const SHARE: &str = "/run/kata-containers/shared/containers/";

/// The daemon answers in order, so that with the first answer every read before it has ended and its
/// file's release been sent, which has ended with the second. The kernel sends 12 such requests at a
/// time, and the rest as these end. Source: fs/fuse/inode.c, FUSE_DEFAULT_MAX_BACKGROUND.
const ROUND_TRIPS: usize = 4;

/// What is mounted at a path of the share, held by the agent.
pub struct Submount {
    path: String,
    top: OwnedFd,
}

impl Submount {
    /// Mounts it in the agent's mount namespace, of which containers get copies; none if the path
    /// lies elsewhere.
    pub fn meet(path: &str) -> Result<Option<Self>> {
        if !path.starts_with(SHARE) {
            return Ok(None);
        }
        let top = beneath::open_plain(Path::new(path)).context(|| format!("opening {path}"))?;
        Ok(Some(Self { path: path.to_owned(), top }))
    }
}

impl Drop for Submount {
    /// When all processes that used it have ended.
    fn drop(&mut self) {
        settle(&self.top);
        unmount(&self.path);
    }
}

/// Waits for what is under way on the file system of an open file.
pub fn settle(file: &OwnedFd) {
    for _ in 0..ROUND_TRIPS {
        // Never answered from a cache. What failed can't be waited for.
        if let Err(error) = fstatfs(file) {
            crate::warn!("waiting for a shared file system: {error}");
            return;
        }
    }
}

/// Lets the kernel's own mount at a path of the share go: while the guest has it the host can't.
pub fn unmount(path: &str) {
    // Nothing is mounted there if it was a file, or no mount of the host's.
    let _ = umount2(path, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW);
}
