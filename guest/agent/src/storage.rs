//! Storages: what a request asks the agent to mount before a container or sandbox can use it.
//!
//! A mount point that several containers name is mounted once and counted. What lives as long as
//! the pod (`ephemeral`, `local`, or marked shared) stays until the sandbox ends.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Component, Path};

use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::agent::Agent;
use crate::pb::grpc::Storage;
use crate::status::{Context, Result, Status};
use crate::submount::{self, SHARE};
use crate::{beneath, block, fs_group, hugepages, mount_options, overlay, warn, watchable};

/// Handlers that `GetGuestDetails` names. Source: kata agent protocol, storage drivers.
pub const HANDLERS: [&str; 10] = [
    "bind",
    "blk",
    "ephemeral",
    "local",
    "mmioblk",
    "nvdimm",
    "overlayfs",
    "scsi",
    "virtio-fs",
    "watchable-bind",
];

/// One mount point in use.
pub struct Mounted {
    users: usize,
    /// Stays until the sandbox ends.
    for_sandbox: bool,
    is_mount: bool,
    /// Where in the share it comes from: looked at, the kernel has mounted the host's mount there.
    shared_source: Option<String>,
    watcher: Option<tokio::task::AbortHandle>,
}

impl Agent {
    /// Mounts what is not mounted yet; `added` gets the mount points even if a later one fails.
    pub async fn add_storages(&self, storages: &[Storage], added: &mut Vec<String>) -> Result<()> {
        for storage in storages {
            let target = storage.mount_point.clone();
            check_target(&target)?;
            // Another request may be at the same one; what is found or made here is counted at once.
            let _turn = self.mounting.take(&target).await;
            let present = self.mounted.borrow_mut().get_mut(&target).map(|mounted| {
                mounted.users += 1;
            });
            if present.is_none() {
                let mounted = self
                    .add_storage(storage)
                    .await
                    .map_err(|status| Status::new(status.code, describe(storage, &status)))?;
                self.mounted.borrow_mut().insert(target.clone(), mounted);
            }
            added.push(target);
        }
        Ok(())
    }

    async fn add_storage(&self, storage: &Storage) -> Result<Mounted> {
        let mut mounted = Mounted {
            users: 1,
            for_sandbox: storage.shared,
            is_mount: true,
            shared_source: storage.source.starts_with(SHARE).then(|| storage.source.clone()),
            watcher: None,
        };
        match storage.driver.as_str() {
            "virtio-fs" | "bind" | "nvdimm" => mount_storage(storage, &storage.source)?,
            "blk" | "scsi" | "mmioblk" => {
                let device = block::find(storage, self.config.hotplug_timeout).await?;
                mount_storage(storage, &device)?;
            }
            "ephemeral" => {
                mounted.for_sandbox = true;
                ephemeral(storage)?;
            }
            "local" => {
                mounted.for_sandbox = true;
                mounted.is_mount = false;
                local(storage)?;
            }
            "overlayfs" => overlay::mount_overlay(storage)?,
            "watchable-bind" => mounted.watcher = Some(watchable::start(storage).await?),
            other => {
                return Err(Status::unimplemented(format!(
                    "storage driver {other:?}; this agent has {}",
                    HANDLERS.join(", ")
                )));
            }
        }
        if let Some(group) = &storage.fs_group {
            fs_group::apply(Path::new(&storage.mount_point), group)?;
        }
        Ok(mounted)
    }

    /// Gives up one use each; the last user's going unmounts.
    pub fn release_storages(&self, targets: &[String]) {
        let mut mounted = self.mounted.borrow_mut();
        for target in targets.iter().rev() {
            let Some(entry) = mounted.get_mut(target) else { continue };
            entry.users -= 1;
            let keep = entry.users > 0 || (entry.for_sandbox && !self.ending.get());
            if keep {
                entry.users = entry.users.max(usize::from(entry.for_sandbox));
                continue;
            }
            if let Some(entry) = mounted.remove(target) {
                entry.undo(target);
            }
        }
    }
}

impl Mounted {
    fn undo(self, target: &str) {
        if let Some(watcher) = self.watcher {
            watcher.abort();
        }
        if !self.is_mount {
            return;
        }
        if self.shared_source.is_some()
            && let Ok(top) = beneath::open_plain(Path::new(target))
        {
            submount::settle(&top);
        }
        if let Err(error) = umount2(target, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            warn!("unmounting {target}: {error}");
        }
        if let Some(source) = self.shared_source {
            submount::unmount(&source);
        }
        // A mount point inside the shared tree belongs to the host.
        let _ = fs::remove_dir(target);
    }
}

fn describe(storage: &Storage, status: &Status) -> String {
    format!("storage {} {} at {}: {status}", storage.driver, storage.source, storage.mount_point)
}

/// Hosts choose mount points, but never over the agent's own machine.
fn check_target(target: &str) -> Result<()> {
    let path = Path::new(target);
    let plain =
        path.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
    let allowed = ["/run/kata-containers", "/run/sandbox-storage", "/mnt"];
    if path.is_absolute() && plain && allowed.iter().any(|base| path.starts_with(base)) {
        return Ok(());
    }
    Err(Status::invalid(format!("mount point {target:?} is not below {}", allowed.join(" or "))))
}

/// Mounts `source` as the storage describes, making the mount point if it is missing.
pub fn mount_storage(storage: &Storage, source: &str) -> Result<()> {
    let target = Path::new(&storage.mount_point);
    let options = mount_options::parse(&storage.options);
    let is_bind = options.flags.mount.contains(MsFlags::MS_BIND) || storage.driver == "bind";
    // What is bound may lie in a volume that a container writes to: no link of its leads elsewhere.
    let held = if is_bind && source.starts_with(beneath::SHARED_STATE) {
        Some(beneath::open_plain(Path::new(source)).context(|| format!("opening {source}"))?)
    } else {
        None
    };
    let from = held.as_ref().map_or_else(|| source.into(), beneath::by_descriptor);
    make_target(target, is_bind && from.is_file())?;
    let flags = if is_bind { options.flags.mount | MsFlags::MS_BIND } else { options.flags.mount };
    let fstype = (!is_bind).then_some(storage.fstype.as_str());
    mount(Some(&from), target, fstype, flags, Some(options.data.as_str()))
        .context(|| format!("mounting {source}"))?;
    // The kernel ignores everything but "recursive" in the first call of a bind.
    let rest = flags - MsFlags::MS_BIND - MsFlags::MS_REC;
    if is_bind && !rest.is_empty() {
        let again = rest | MsFlags::MS_BIND | MsFlags::MS_REMOUNT;
        mount(None::<&str>, target, None::<&str>, again, None::<&str>)
            .context(|| format!("remounting {source}"))?;
    }
    if !options.flags.propagation.is_empty() {
        mount(None::<&str>, target, None::<&str>, options.flags.propagation, None::<&str>)
            .context(|| "setting propagation".to_owned())?;
    }
    Ok(())
}

fn make_target(target: &Path, as_file: bool) -> Result<()> {
    let make = || {
        if !as_file {
            return fs::create_dir_all(target);
        }
        if let Some(parent) = target.parent() {
            fs::create_dir_all(parent)?;
        }
        fs::File::options().append(true).create(true).open(target).map(|_| ())
    };
    make().context(|| format!("making the mount point {}", target.display()))
}

/// The value of a `key=value` option, and the options without it.
fn take_option(options: &[String], key: &str) -> (Option<String>, Vec<String>) {
    let mut value = None;
    let mut rest = Vec::new();
    for option in options.iter().flat_map(|option| option.split(',')) {
        match option.split_once('=') {
            Some((name, found)) if name == key => value = Some(found.to_owned()),
            _ => rest.push(option.to_owned()),
        }
    }
    (value, rest)
}

/// Memory-backed: a tmpfs, or huge pages that are set aside first.
fn ephemeral(storage: &Storage) -> Result<()> {
    let (group, options) = take_option(&storage.options, "fsgid");
    let storage = Storage { options, ..storage.clone() };
    if storage.fstype == "hugetlbfs" {
        hugepages::reserve(&storage.options)?;
    }
    mount_storage(&storage, &storage.source)?;
    set_group(Path::new(&storage.mount_point), group.as_deref())
}

/// A directory of the guest, or of the shared tree.
fn local(storage: &Storage) -> Result<()> {
    let (group, options) = take_option(&storage.options, "fsgid");
    let (mode, _) = take_option(&options, "mode");
    let path = &storage.mount_point;
    let made = beneath::make_directories(Path::new(path));
    let (directory, is_new) = made.context(|| format!("making {path}"))?;
    if !is_new {
        return Ok(()); // its owner and mode are its users' by now
    }
    let held = beneath::by_descriptor(&directory);
    if let Some(mode) = mode {
        let mode = u32::from_str_radix(&mode, 8).context(|| format!("mode {mode:?}"))?;
        fs::set_permissions(&held, Permissions::from_mode(mode & 0o7777))
            .context(|| format!("mode of {path}"))?;
    }
    set_group(&held, group.as_deref()).context(|| path.clone())
}

fn set_group(path: &Path, group: Option<&str>) -> Result<()> {
    let Some(group) = group else { return Ok(()) };
    let gid: u32 = group.parse().context(|| format!("fsgid {group:?}"))?;
    let set = || {
        chown(path, None, Some(gid))?;
        let mode = fs::metadata(path)?.permissions().mode();
        fs::set_permissions(path, Permissions::from_mode(mode | 0o2000))
    };
    set().context(|| format!("giving {} to group {gid}", path.display()))
}
