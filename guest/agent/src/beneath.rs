//! Paths that a container may have a hand in: opened and made without following a link.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, open, openat2};
use nix::sys::stat::{Mode, mkdirat};

/// What the agent, the host and containers have in common lies here.
pub const SHARED_STATE: &str = "/run/kata-containers";

/// A descriptor that names the file at an absolute path, no part of which is a link.
///
/// A file system that the kernel mounts by itself there (virtio-fs announces the host's mounts) is
/// mounted, and the descriptor names its root.
pub fn open_plain(path: &Path) -> io::Result<OwnedFd> {
    let root = root()?;
    let relative = path.strip_prefix("/").unwrap_or(path);
    // Only a directory's open mounts what is to appear there by itself.
    match openat2(&root, relative, how(OFlag::O_PATH | OFlag::O_DIRECTORY)) {
        Err(Errno::ENOTDIR) => Ok(openat2(&root, relative, how(OFlag::O_PATH))?),
        other => Ok(other?),
    }
}

/// A descriptor that names a directory below another, no part of the way being a link.
pub fn open_below(top: &OwnedFd, relative: &Path) -> io::Result<OwnedFd> {
    let relative = if relative.as_os_str().is_empty() { Path::new(".") } else { relative };
    Ok(openat2(top, relative, how(OFlag::O_PATH | OFlag::O_DIRECTORY))?)
}

/// Makes what is missing of an absolute path; also says whether its last part was missing.
pub fn make_directories(path: &Path) -> io::Result<(OwnedFd, bool)> {
    let mut directory = root()?;
    let mut is_new = false;
    for part in path.components() {
        let name = match part {
            Component::RootDir => continue,
            Component::Normal(name) => name,
            _ => return Err(io::Error::from(io::ErrorKind::InvalidInput)),
        };
        (directory, is_new) = enter(&directory, name)?;
    }
    Ok((directory, is_new))
}

/// The path by which system calls without a descriptor of their own reach an open file.
pub fn by_descriptor(file: &impl AsFd) -> PathBuf {
    format!("/proc/self/fd/{}", file.as_fd().as_raw_fd()).into()
}

fn enter(directory: &OwnedFd, name: &OsStr) -> io::Result<(OwnedFd, bool)> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY;
    match openat2(directory, name, how(flags)) {
        Err(Errno::ENOENT) => {
            let made = match mkdirat(directory, name, Mode::from_bits_truncate(0o755)) {
                Ok(()) => true,
                Err(Errno::EEXIST) => false,
                Err(error) => return Err(error.into()),
            };
            Ok((openat2(directory, name, how(flags))?, made))
        }
        other => Ok((other?, false)),
    }
}

fn root() -> io::Result<OwnedFd> {
    Ok(open("/", OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())?)
}

fn how(flags: OFlag) -> OpenHow {
    OpenHow::new().flags(flags | OFlag::O_CLOEXEC).resolve(
        ResolveFlag::RESOLVE_BENEATH
            | ResolveFlag::RESOLVE_NO_SYMLINKS
            | ResolveFlag::RESOLVE_NO_MAGICLINKS,
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    #[test]
    fn links_are_neither_followed_nor_made_into() {
        let top = std::env::temp_dir().join(format!("kata-agent-{}-beneath", std::process::id()));
        let top = top.canonicalize().unwrap_or(top);
        let _ = fs::remove_dir_all(&top);
        let (_, is_new) = make_directories(&top.join("a/b")).unwrap();
        assert!(is_new && top.join("a/b").is_dir());
        assert!(!make_directories(&top.join("a/b")).unwrap().1);
        symlink("/", top.join("link")).unwrap();
        for path in ["link", "link/tmp"] {
            assert!(open_plain(&top.join(path)).is_err(), "{path}");
            assert!(make_directories(&top.join(path)).is_err(), "{path}");
        }
        fs::write(top.join("file"), "").unwrap();
        assert!(open_plain(&top.join("file")).is_ok());
        assert!(make_directories(&top.join("file")).is_err());
        fs::remove_dir_all(&top).unwrap();
    }
}
