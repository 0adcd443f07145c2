//! Directories that a host changes under us (configmaps, secrets), copied so that the container
//! sees the change as one.
//!
//! virtio-fs carries no inotify events to the guest, so the source is looked at again and again: at
//! kubelet's one link that each update replaces, where there is one, otherwise at every file.
//! Source: kata agent protocol, `watchable-bind`; Kubernetes pkg/volume/util/atomic_writer.go.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;

use nix::mount::{MntFlags, umount2};
use tokio::task::AbortHandle;
use tokio::time::Instant;

use crate::pb::grpc::Storage;
use crate::status::{Context, Result};
use crate::storage::mount_storage;
use crate::{beneath, replace, warn};

/// A tree that is larger at first is bound as it is: changes are seen, but have no events.
const AT_FIRST: Limits = Limits { entries: 128, bytes: 2 << 20 };
/// One that has grown this large is followed no further.
const LATER: Limits = Limits { entries: 4096, bytes: 14 << 20 };
const TMPFS_OPTIONS: [&str; 3] = ["mode=0755", "size=32m", "nr_inodes=16384"];
/// Longer than the second for which virtio-fs answers from what it remembers.
const INTERVAL: Duration = Duration::from_millis(1100);
const FIRST_TURNS: u32 = 3;
/// Half a minute between two looks at a tree that can't be copied.
const MAX_PAUSE_DOUBLINGS: u32 = 5;
/// The link that leads to the present content of kubelet's volumes.
const DATA_LINK: &str = "..data";

#[derive(Clone, Copy)]
struct Limits {
    entries: usize,
    bytes: u64,
}

/// What a path was when it was last copied.
#[derive(Clone, Default, PartialEq)]
struct Seen {
    modified: (i64, i64),
    bytes: u64,
    inode: u64,
    points_to: Option<PathBuf>,
}

type Tree = BTreeMap<PathBuf, Seen>;

/// Copies once and keeps copying; a file, or a tree that is too large, is bound as it is.
pub async fn start(storage: &Storage) -> Result<AbortHandle> {
    let source = PathBuf::from(&storage.source);
    let what = || format!("copying {}", source.display());
    let is_directory = fs::metadata(&source).context(what)?.is_dir();
    // What can't be read now, perhaps because it changes, is tried again below.
    if !is_directory || matches!(scan(&source, AT_FIRST), Ok(None)) {
        let plain = Storage { driver: "bind".to_owned(), ..storage.clone() };
        mount_storage(&plain, &storage.source)?;
        return Ok(tokio::task::spawn_local(async {}).abort_handle());
    }
    let tmpfs = Storage {
        driver: "ephemeral".to_owned(),
        fstype: "tmpfs".to_owned(),
        options: TMPFS_OPTIONS.map(str::to_owned).to_vec(),
        ..storage.clone()
    };
    mount_storage(&tmpfs, "tmpfs")?;
    let (top, _) = beneath::make_directories(Path::new(&storage.mount_point)).context(what)?;
    let copied = first_copy(&source, top).await.inspect_err(|_| {
        let _ = umount2(storage.mount_point.as_str(), MntFlags::MNT_DETACH);
    });
    let copied = copied.context(what)?;
    Ok(tokio::task::spawn_local(follow(source, copied)).abort_handle())
}

/// An update between the look and the copy makes files vanish: then both are done again.
async fn first_copy(source: &Path, target: OwnedFd) -> io::Result<Copied> {
    let mut copied = Copied { target, tree: Tree::new(), leaving: Vec::new() };
    let mut turns = 0;
    loop {
        turns += 1;
        let tree = scan(source, LATER);
        let done = tree.and_then(|tree| {
            copied.bring(source, tree.ok_or_else(|| io::Error::other("too large"))?)
        });
        match done {
            Ok(()) => return Ok(copied),
            Err(error) if turns == FIRST_TURNS => return Err(error),
            Err(_) => tokio::time::sleep(INTERVAL).await,
        }
    }
}

async fn follow(source: PathBuf, mut copied: Copied) {
    // A change between the first copy and now is found by the first look.
    let mut link = None;
    let mut trouble = Trouble::default();
    loop {
        tokio::time::sleep_until(next_look(trouble.pause())).await;
        copied.sweep();
        let seen = fs::read_link(source.join(DATA_LINK)).ok();
        if seen.is_some() && seen == link {
            continue;
        }
        let done = match scan(&source, LATER) {
            Ok(Some(now)) if now != copied.tree => copied.bring(&source, now),
            Ok(Some(_)) => Ok(()),
            Ok(None) => Err(io::Error::other("too large to be followed")),
            Err(error) => Err(error),
        };
        match done {
            Ok(()) => (link, trouble) = (seen, Trouble::default()),
            // Changed meanwhile: all of it is looked at again.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => trouble.happened(&source, &error),
        }
    }
}

/// What goes wrong again and again is told once, and tried less and less often.
#[derive(Default)]
struct Trouble {
    times: u32,
    text: String,
}

impl Trouble {
    /// How many looks to leave out.
    fn pause(&self) -> u128 {
        (1 << self.times.min(MAX_PAUSE_DOUBLINGS)) - 1
    }

    fn happened(&mut self, source: &Path, error: &io::Error) {
        let text = format!("copying {}: {error}", source.display());
        self.times += 1;
        if text != self.text {
            warn!("{text}");
            self.text = text;
        }
    }
}

/// All trees are looked at together, so that an idle guest wakes up once.
fn next_look(pause: u128) -> Instant {
    static FIRST: OnceLock<Instant> = OnceLock::new();
    let first = *FIRST.get_or_init(Instant::now);
    let turns = first.elapsed().as_millis() / INTERVAL.as_millis() + 1 + pause;
    first + INTERVAL * u32::try_from(turns).unwrap_or(u32::MAX)
}

/// Everything below the source by relative path; none if it exceeds the limits. Fails while kubelet
/// is at an update: then its link still leads, or is remembered to lead, to what is gone.
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
        let points_to = if status.is_symlink() { Some(fs::read_link(&path)?) } else { None };
        let seen = Seen { modified, bytes: status.len(), inode: status.ino(), points_to };
        tree.insert(relative, seen);
    }
    match data_directory(&tree) {
        Some(directory) if !tree.contains_key(directory) => Err(io::ErrorKind::NotFound.into()),
        _ => Ok(Some(tree)),
    }
}

fn join(base: &Path, relative: &Path) -> PathBuf {
    if relative.as_os_str().is_empty() { base.to_owned() } else { base.join(relative) }
}

/// What containers see of a tree.
struct Copied {
    target: OwnedFd,
    tree: Tree,
    /// What an update has left without a link to it, in the order of its removal. A program may be
    /// on its way there, so it goes at the next look.
    leaving: Vec<PathBuf>,
}

impl Copied {
    /// Brings the copy to another state of the source: new first, links then, old last, so that a
    /// configmap's `..data` link never points at nothing.
    fn bring(&mut self, source: &Path, now: Tree) -> io::Result<()> {
        if let Err(error) = copy(source, &self.target, &self.tree, &now) {
            // Perhaps there, perhaps not what it was: replaced or removed later. The link says what
            // containers still use.
            let unsure = now.into_keys().filter(|path| path != Path::new(DATA_LINK));
            self.tree.extend(unsure.map(|path| (path, Seen::default())));
            return Err(error);
        }
        let data = data_directory(&self.tree).map(Path::to_owned);
        for path in self.tree.keys().filter(|path| !now.contains_key(*path)).rev() {
            if data.as_ref().is_some_and(|data| path.starts_with(data)) {
                self.leaving.push(path.clone());
            } else if let Err(error) = remove(&self.target, path) {
                // A container has put something in there: no reason to keep the others waiting.
                warn!("removing {}: {error}", path.display());
            }
        }
        self.tree = now;
        Ok(())
    }

    fn sweep(&mut self) {
        for path in std::mem::take(&mut self.leaving) {
            if self.tree.contains_key(&path) {
                continue;
            }
            if let Err(error) = remove(&self.target, &path) {
                warn!("removing {}: {error}", path.display());
            }
        }
    }
}

fn data_directory(tree: &Tree) -> Option<&Path> {
    tree.get(Path::new(DATA_LINK)).and_then(|link| link.points_to.as_deref())
}

/// Copies what is new or changed.
///
/// A container that may mount can write to the target: nothing there is followed, no link that it
/// made is written through, and what it puts in the way is replaced.
fn copy(source: &Path, target: &OwnedFd, last: &Tree, now: &Tree) -> io::Result<()> {
    let mut links = Vec::new();
    for (relative, seen) in now.iter().filter(|(path, seen)| last.get(*path) != Some(seen)) {
        let from = join(source, relative);
        let status = fs::symlink_metadata(&from)?;
        let (parent, name) = place(target, relative)?;
        if let Some(points_to) = &seen.points_to {
            links.push((points_to, parent, name));
        } else if status.is_dir() {
            replace::directory(&parent, &name, &status)?;
        } else if status.is_file() {
            let content = fs::File::open(&from)?.take(LATER.bytes);
            replace::file(content, &parent, &name, &status)?;
        }
    }
    for (points_to, parent, name) in links {
        replace::link(points_to, &parent, &name)?;
    }
    Ok(())
}

fn remove(target: &OwnedFd, relative: &Path) -> io::Result<()> {
    match place(target, relative) {
        Ok((parent, name)) => replace::discard(&parent, &name),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

/// The directory that a path of the tree lies in, and its name there.
fn place(top: &OwnedFd, relative: &Path) -> io::Result<(OwnedFd, OsString)> {
    let parent = relative.parent().unwrap_or(Path::new(""));
    let name = relative.file_name().unwrap_or(OsStr::new("."));
    Ok((beneath::open_below(top, parent)?, name.to_owned()))
}

#[cfg(test)]
#[path = "watchable_tests.rs"]
mod tests;
