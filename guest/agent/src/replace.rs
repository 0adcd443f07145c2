//! Puts files, links and directories into a directory that a container may write to as well: each
//! appears whole, and nothing that the container puts in the way keeps it from appearing.

use std::ffi::{OsStr, OsString};
use std::fs::{File, Metadata, Permissions};
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt, fchown};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{OFlag, RenameFlags, openat, renameat, renameat2};
use nix::sys::stat::{Mode, mkdirat};
use nix::unistd::{UnlinkatFlags, symlinkat, unlinkat};

/// Against somebody who makes and removes what is in the way.
const ATTEMPTS: u32 = 8;

/// Puts a file of this content there, with the owner and mode of another.
pub fn file(
    mut from: impl Read,
    parent: &OwnedFd,
    name: &OsStr,
    like: &Metadata,
) -> io::Result<()> {
    let temporary = temporary_name()?;
    let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_CLOEXEC;
    let made = openat(parent, temporary.as_os_str(), flags, Mode::from_bits_truncate(0o600))?;
    let mut made = File::from(made);
    let filled = io::copy(&mut from, &mut made).and_then(|_| own(&made, like));
    place(filled, parent, &temporary, name)
}

pub fn link(points_to: &Path, parent: &OwnedFd, name: &OsStr) -> io::Result<()> {
    let temporary = temporary_name()?;
    symlinkat(points_to, parent, temporary.as_os_str())?;
    place(Ok(()), parent, &temporary, name)
}

/// Makes the directory, or takes the one that is there.
pub fn directory(parent: &OwnedFd, name: &OsStr, like: &Metadata) -> io::Result<()> {
    if let Ok(present) = open_directory(parent, name) {
        return own(&present, like);
    }
    let temporary = temporary_name()?;
    mkdirat(parent, temporary.as_os_str(), Mode::from_bits_truncate(0o700))?;
    let made = open_directory(parent, &temporary).and_then(|made| own(&made, like));
    place(made, parent, &temporary, name)
}

/// Removes a name, or an empty directory; what is not there is no error.
pub fn discard(parent: &OwnedFd, name: &OsStr) -> io::Result<()> {
    let mut gone = unlinkat(parent, name, UnlinkatFlags::NoRemoveDir);
    if gone == Err(Errno::EISDIR) {
        gone = unlinkat(parent, name, UnlinkatFlags::RemoveDir);
    }
    match gone {
        Ok(()) | Err(Errno::ENOENT) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn open_directory(parent: &OwnedFd, name: &OsStr) -> io::Result<File> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    Ok(File::from(openat(parent, name, flags, Mode::empty())?))
}

fn own(file: &File, like: &Metadata) -> io::Result<()> {
    fchown(file, Some(like.uid()), Some(like.gid()))?;
    file.set_permissions(Permissions::from_mode(like.mode() & 0o7777))
}

/// Gives what has been made its name, or removes it if it came to nothing.
fn place(
    made: io::Result<()>,
    parent: &OwnedFd,
    temporary: &OsStr,
    name: &OsStr,
) -> io::Result<()> {
    let placed = made.and_then(|()| Ok(rename_over(parent, temporary, name)?));
    // After an exchange, what was in the way. A full directory of the container's stays.
    let _ = discard(parent, temporary);
    placed
}

/// A rename, also over a directory, which the two then exchange their names for.
fn rename_over(parent: &OwnedFd, from: &OsStr, to: &OsStr) -> nix::Result<()> {
    let mut done = Ok(());
    for _ in 0..ATTEMPTS {
        done = renameat(parent, from, parent, to);
        if !matches!(done, Err(Errno::EISDIR | Errno::ENOTDIR | Errno::ENOTEMPTY | Errno::EEXIST)) {
            return done;
        }
        done = renameat2(parent, from, parent, to, RenameFlags::RENAME_EXCHANGE);
        if done != Err(Errno::ENOENT) {
            return done;
        }
    }
    done
}

/// Nobody can guess it, and so not be there first.
fn temporary_name() -> io::Result<OsString> {
    let mut random = [0; 8];
    File::open("/dev/urandom")?.read_exact(&mut random)?;
    Ok(format!(".kata-new-{:016x}", u64::from_ne_bytes(random)).into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::beneath::make_directories;
    use std::fs;
    use std::os::unix::fs::symlink;

    #[test]
    fn what_is_in_the_way_is_replaced_and_nothing_is_followed() {
        let top = std::env::temp_dir().canonicalize().unwrap();
        let top = top.join(format!("kata-agent-{}-replace", std::process::id()));
        let _ = fs::remove_dir_all(&top);
        let (held, _) = make_directories(&top).unwrap();
        let like = fs::metadata(&top).unwrap();
        for name in ["file", "link", "directory"] {
            for obstacle in 0..4 {
                let path = top.join(name);
                let _ = fs::remove_dir_all(&path).or_else(|_| fs::remove_file(&path));
                match obstacle {
                    0 => fs::create_dir_all(path.join("full")).unwrap(),
                    1 => symlink("/etc", &path).unwrap(),
                    2 => fs::write(&path, "other").unwrap(),
                    _ => {}
                }
                let key = OsStr::new(name);
                match name {
                    "file" => file(b"text".as_slice(), &held, key, &like).unwrap(),
                    "link" => link(Path::new("there"), &held, key).unwrap(),
                    _ => directory(&held, key, &like).unwrap(),
                }
                let kind = fs::symlink_metadata(&path).unwrap();
                match name {
                    "file" => assert_eq!(fs::read_to_string(&path).unwrap(), "text"),
                    "link" => assert_eq!(fs::read_link(&path).unwrap(), Path::new("there")),
                    _ => assert!(kind.is_dir(), "{obstacle}"),
                }
            }
        }
        let names = fs::read_dir(&top).unwrap().map(|entry| entry.unwrap().file_name());
        let left = names.filter(|name| name.to_string_lossy().starts_with(".kata-new-"));
        assert_eq!(left.count(), 2, "the two full directories");
        fs::remove_dir_all(top).unwrap();
    }
}
