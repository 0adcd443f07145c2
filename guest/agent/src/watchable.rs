//! Directories that a host changes under us (configmaps, secrets), copied so that the container
//! sees the change as one.
//!
//! virtio-fs carries no inotify events to the guest, so the source is looked at again and again: at
//! kubelet's one link that each update replaces, where there is one, otherwise at every file.
//! Source: kata agent protocol, `watchable-bind`; Kubernetes pkg/volume/util/atomic_writer.go.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;

use tokio::task::AbortHandle;
use tokio::time::Instant;

use crate::pb::grpc::Storage;
use crate::status::{Context, Result};
use crate::storage::mount_storage;
use crate::warn;

/// A tree that is larger at first is bound as it is: changes are seen, but have no events.
const AT_FIRST: Limits = Limits { entries: 128, bytes: 2 << 20 };
/// One that has grown this large is followed no further.
const LATER: Limits = Limits { entries: 4096, bytes: 14 << 20 };
const TMPFS_OPTIONS: [&str; 3] = ["mode=0755", "size=32m", "nr_inodes=16384"];
/// Longer than the second for which virtio-fs answers from what it remembers.
const INTERVAL: Duration = Duration::from_millis(1100);
/// The link that leads to the present content of kubelet's volumes.
const DATA_LINK: &str = "..data";

#[derive(Clone, Copy)]
struct Limits {
    entries: usize,
    bytes: u64,
}

/// What a path was when it was last copied.
#[derive(Clone, PartialEq)]
struct Seen {
    modified: (i64, i64),
    bytes: u64,
    inode: u64,
}

type Tree = BTreeMap<PathBuf, Seen>;

/// Copies once and keeps copying; a tree that is too large is bound as it is.
pub fn start(storage: &Storage) -> Result<AbortHandle> {
    let source = PathBuf::from(&storage.source);
    let target = PathBuf::from(&storage.mount_point);
    let tree = scan(&source, AT_FIRST).context(|| format!("reading {}", source.display()))?;
    let Some(tree) = tree else {
        let plain = Storage { driver: "bind".to_owned(), ..storage.clone() };
        mount_storage(&plain, &storage.source)?;
        return Ok(tokio::task::spawn_local(async {}).abort_handle());
    };
    if source.is_file() {
        if let Some(parent) = target.parent() {
            fs::create_dir_all(parent).context(|| format!("making {}", parent.display()))?;
        }
    } else {
        let tmpfs = Storage {
            driver: "ephemeral".to_owned(),
            fstype: "tmpfs".to_owned(),
            options: TMPFS_OPTIONS.map(str::to_owned).to_vec(),
            ..storage.clone()
        };
        mount_storage(&tmpfs, "tmpfs")?;
    }
    copy(&source, &target, &Tree::new(), &tree)
        .context(|| format!("copying {}", source.display()))?;
    Ok(tokio::task::spawn_local(follow(source, target, tree)).abort_handle())
}

async fn follow(source: PathBuf, target: PathBuf, mut last: Tree) {
    // A change between the first copy and now is found by the first look.
    let mut link = None;
    loop {
        tokio::time::sleep_until(next_look()).await;
        let seen = fs::read_link(source.join(DATA_LINK)).ok();
        if seen.is_some() && seen == link {
            continue;
        }
        match scan(&source, LATER) {
            Ok(Some(now)) if now != last => match copy(&source, &target, &last, &now) {
                Ok(()) => last = now,
                Err(error) => {
                    // Perhaps changed meanwhile: all of it is looked at again.
                    warn!("copying {}: {error}", source.display());
                    continue;
                }
            },
            Ok(Some(_)) => {}
            Ok(None) => warn!("{} is too large to be followed", source.display()),
            Err(error) => {
                warn!("reading {}: {error}", source.display());
                continue;
            }
        }
        link = seen;
    }
}

/// All trees are looked at together, so that an idle guest wakes up once.
fn next_look() -> Instant {
    static FIRST: OnceLock<Instant> = OnceLock::new();
    let first = *FIRST.get_or_init(Instant::now);
    let turns = first.elapsed().as_millis() / INTERVAL.as_millis() + 1;
    first + INTERVAL * u32::try_from(turns).unwrap_or(u32::MAX)
}

/// Everything below the source by relative path; none if it exceeds the limits.
fn scan(source: &Path, limits: Limits) -> io::Result<Option<Tree>> {
    let mut tree = Tree::new();
    let mut pending = vec![PathBuf::new()];
    let mut bytes = 0;
    while let Some(relative) = pending.pop() {
        let path = join(source, &relative);
        let status = fs::symlink_metadata(&path)?;
        if status.is_dir() {
            for entry in fs::read_dir(&path)? {
                pending.push(relative.join(entry?.file_name()));
            }
        } else {
            bytes += status.len();
        }
        if tree.len() + pending.len() > limits.entries || bytes > limits.bytes {
            return Ok(None);
        }
        let modified = (status.mtime(), status.mtime_nsec());
        let seen = Seen { modified, bytes: status.len(), inode: status.ino() };
        tree.insert(relative, seen);
    }
    Ok(Some(tree))
}

fn join(base: &Path, relative: &Path) -> PathBuf {
    if relative.as_os_str().is_empty() { base.to_owned() } else { base.join(relative) }
}

/// A name in the same directory that a rename can replace the real one from.
fn beside(path: &Path) -> PathBuf {
    let mut name = std::ffi::OsString::from(".kata-new-");
    name.push(path.file_name().unwrap_or_default());
    path.with_file_name(name)
}

/// Brings the target from one state of the source to the next: new first, links then, old last,
/// so that a configmap's `..data` link never points at nothing.
fn copy(source: &Path, target: &Path, last: &Tree, now: &Tree) -> io::Result<()> {
    let changed = || now.iter().filter(|(path, seen)| last.get(*path) != Some(seen));
    let mut links = Vec::new();
    for (relative, _) in changed() {
        let (from, to) = (join(source, relative), join(target, relative));
        let status = fs::symlink_metadata(&from)?;
        if status.is_dir() {
            fs::create_dir_all(&to)?;
            chown(&to, Some(status.uid()), Some(status.gid()))?;
            fs::set_permissions(&to, fs::Permissions::from_mode(status.mode() & 0o7777))?;
        } else if status.is_symlink() {
            links.push((fs::read_link(&from)?, to));
        } else if status.is_file() {
            let temporary = beside(&to);
            fs::copy(&from, &temporary)?;
            chown(&temporary, Some(status.uid()), Some(status.gid()))?;
            fs::set_permissions(&temporary, fs::Permissions::from_mode(status.mode() & 0o7777))?;
            fs::rename(&temporary, &to)?;
        }
    }
    for (points_to, to) in links {
        let temporary = beside(&to);
        let _ = fs::remove_file(&temporary);
        symlink(points_to, &temporary)?;
        fs::rename(&temporary, &to)?;
    }
    for relative in last.keys().filter(|path| !now.contains_key(*path)).rev() {
        let path = join(target, relative);
        let is_directory = fs::symlink_metadata(&path).is_ok_and(|status| status.is_dir());
        let removed = if is_directory { fs::remove_dir(&path) } else { fs::remove_file(&path) };
        if let Err(error) = removed
            && error.kind() != io::ErrorKind::NotFound
        {
            return Err(error);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scratch(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("kata-agent-{}-{name}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).unwrap();
        path
    }

    #[test]
    fn change_of_a_configmap_arrives_whole() {
        let (source, target) = (scratch("source"), scratch("target"));
        fs::create_dir(source.join("..data_1")).unwrap();
        fs::write(source.join("..data_1/key"), "one").unwrap();
        symlink("..data_1", source.join("..data")).unwrap();
        symlink("..data/key", source.join("key")).unwrap();
        let first = scan(&source, AT_FIRST).unwrap().unwrap();
        copy(&source, &target, &Tree::new(), &first).unwrap();
        assert_eq!(fs::read_to_string(target.join("key")).unwrap(), "one");

        fs::create_dir(source.join("..data_2")).unwrap();
        fs::write(source.join("..data_2/key"), "two").unwrap();
        symlink("..data_2", source.join("..tmp")).unwrap();
        fs::rename(source.join("..tmp"), source.join("..data")).unwrap();
        fs::remove_dir_all(source.join("..data_1")).unwrap();
        let second = scan(&source, AT_FIRST).unwrap().unwrap();
        copy(&source, &target, &first, &second).unwrap();
        assert_eq!(fs::read_to_string(target.join("key")).unwrap(), "two");
        assert!(!target.join("..data_1").exists());
        fs::remove_dir_all(source).unwrap();
        fs::remove_dir_all(target).unwrap();
    }

    #[test]
    fn tree_beyond_the_limits_is_not_followed() {
        let source = scratch("large");
        for number in 0..=AT_FIRST.entries {
            fs::write(source.join(number.to_string()), "").unwrap();
        }
        assert!(scan(&source, AT_FIRST).unwrap().is_none());
        assert!(scan(&source, LATER).unwrap().is_some());
        fs::remove_dir_all(source).unwrap();
    }
}
