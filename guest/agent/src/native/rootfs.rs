//! The container's root: mounts, devices, hidden paths, pivot_root.
//!
//! The root's content is the image's and the container's, so each path below it is resolved with
//! RESOLVE_IN_ROOT from a descriptor of the root, and mounted on by descriptor. It all happens
//! before the pivot, while sources and the agent's own /proc can be seen.

use std::fs;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::path::{Component, Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat, openat2, readlinkat};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::{Mode, mkdirat};
use nix::unistd::{chdir, fchdir, pivot_root};

use super::devices;
use super::tree::{Sources, Tree, set_below};
use crate::mount_options::{self, MountOptions};
use crate::pb::grpc::{Linux, Mount, Spec};
use crate::status::{Context, Result, Status};

/// As many links as the kernel follows in one path.
const MAX_LINKS: usize = 40;

/// Options that mean something to other runtimes and nothing to the kernel.
const NOT_FOR_THE_KERNEL: [&str; 3] = ["tmpcopyup", "copy", "nocopy"];

/// Builds the root in the new mount namespace and makes it `/`.
pub fn enter(spec: &Spec, sources: Sources) -> Result<()> {
    let root = spec.root.as_ref().ok_or_else(|| Status::invalid("the spec has no root"))?;
    let default = Linux::default();
    let linux = spec.linux.as_ref().unwrap_or(&default);
    // Nothing made here may reach the agent's mounts, and pivot_root takes no shared ones; what the
    // spec asks for is set when the root is the container's.
    change("/", MsFlags::MS_SLAVE | MsFlags::MS_REC).context(|| "propagation of /".to_owned())?;
    let what = || format!("root filesystem {}", root.path);
    // The container's root is put over the agent's, so that it has a parent as pivot_root wants it.
    let over = nix::fcntl::open("/", OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty());
    let over = over.context(what)?;
    let directory = sources.root.place(over.as_fd()).context(what)?;
    let root_fd = directory.as_fd();
    for (mount, source) in spec.mounts.iter().zip(sources.binds) {
        mount_one(root_fd, mount, source).map_err(|status| {
            Status::new(status.code, format!("mount on {}: {status}", mount.destination))
        })?;
    }
    let own_dev = !spec.mounts.iter().any(|mount| mount.destination == "/dev" && is_bind(mount));
    if own_dev {
        devices::populate(root_fd, &linux.devices)?;
    }
    for path in &linux.readonly_paths {
        make_readonly(root_fd, path).context(|| format!("making {path} read-only"))?;
    }
    for path in &linux.masked_paths {
        mask(root_fd, path).context(|| format!("hiding {path}"))?;
    }
    let directory = spec.process.as_ref().map_or("/", |process| process.cwd.as_str());
    if root.readonly {
        // Now or never. Where it can't be made the program's directory is missing, which is told.
        let _ = ensure(root_fd, Path::new(directory), true);
    }
    pivot(root_fd).context(|| "pivot_root".to_owned())?;
    let propagation = propagation(&linux.rootfs_propagation)?;
    change("/", propagation).context(|| "rootfsPropagation".to_owned())?;
    if root.readonly {
        let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
        mount(None::<&str>, "/", None::<&str>, flags | kept_flags("/"), None::<&str>)
            .context(|| "making the root read-only".to_owned())?;
    }
    Ok(())
}

/// Of the root alone: what is mounted below has been given its own, and what will be takes the
/// root's. Source: OCI runtime-spec config-linux.md "Rootfs Mount Propagation"; runc for the names
/// with r.
fn propagation(name: &str) -> Result<MsFlags> {
    match name.strip_prefix('r').unwrap_or(name) {
        "shared" => Ok(MsFlags::MS_SHARED),
        "private" => Ok(MsFlags::MS_PRIVATE),
        "unbindable" => Ok(MsFlags::MS_UNBINDABLE),
        "slave" | "" => Ok(MsFlags::MS_SLAVE),
        _ => Err(Status::invalid(format!("rootfsPropagation {name:?}"))),
    }
}

fn change(target: &str, flags: MsFlags) -> nix::Result<()> {
    mount(None::<&str>, target, None::<&str>, flags, None::<&str>)
}

fn by_descriptor(fd: &OwnedFd) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

/// Opens a path of the container as its own processes would see it.
pub fn open_in(root: BorrowedFd<'_>, path: &Path, flags: OFlag) -> nix::Result<OwnedFd> {
    let path = path.strip_prefix("/").unwrap_or(path);
    let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
    let how = OpenHow::new()
        .flags(flags | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    openat2(root, path, how)
}

/// Opens a mount point, making what is missing of it.
pub fn ensure(root: BorrowedFd<'_>, path: &Path, is_directory: bool) -> nix::Result<OwnedFd> {
    match open_in(root, path, OFlag::O_PATH) {
        Err(Errno::ENOENT) => make_place(root, &normal(path), is_directory, MAX_LINKS),
        other => other,
    }
}

/// The path without `.` and `..`, as a root that can't be left has it.
fn normal(path: &Path) -> PathBuf {
    let mut plain = PathBuf::new();
    for part in path.components() {
        match part {
            Component::Normal(name) => plain.push(name),
            Component::ParentDir => {
                plain.pop();
            }
            _ => {}
        }
    }
    plain
}

fn make_place(
    root: BorrowedFd<'_>,
    path: &Path,
    is_directory: bool,
    links_left: usize,
) -> nix::Result<OwnedFd> {
    let mut walked = PathBuf::new();
    let mut parent = open_in(root, Path::new("."), OFlag::O_PATH)?;
    let mut parts = path.components().peekable();
    while let Some(part) = parts.next() {
        walked.push(part);
        let name = part.as_os_str();
        let as_directory = parts.peek().is_some() || is_directory;
        let made = match open_in(root, &walked, OFlag::O_PATH) {
            Err(Errno::ENOENT) if as_directory => {
                mkdirat(&parent, name, Mode::from_bits_truncate(0o755))
            }
            Err(Errno::ENOENT) => {
                let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_CLOEXEC;
                openat(&parent, name, flags, Mode::from_bits_truncate(0o644)).map(drop)
            }
            Err(error) => return Err(error),
            Ok(_) => Ok(()),
        };
        // Not found, and yet there: a link to something that is missing. That is made instead.
        if made == Err(Errno::EEXIST) && links_left > 0 {
            let link = readlinkat(&parent, name)?;
            let base = walked.parent().unwrap_or(Path::new(""));
            let rest: PathBuf = parts.collect();
            let path = normal(&base.join(Path::new(&link)).join(rest));
            return make_place(root, &path, is_directory, links_left - 1);
        }
        made?;
        parent = open_in(root, &walked, OFlag::O_PATH)?;
    }
    Ok(parent)
}

/// Whether a mount shows something that is there already.
pub fn is_bind(mount: &Mount) -> bool {
    mount.r#type == "bind" || mount.options.iter().any(|o| o == "bind" || o == "rbind")
}

fn mount_one(root: BorrowedFd<'_>, wanted: &Mount, source: Option<Tree>) -> Result<()> {
    let options: Vec<String> = wanted
        .options
        .iter()
        .filter(|option| !NOT_FOR_THE_KERNEL.contains(&option.as_str()))
        .cloned()
        .collect();
    let options = mount_options::parse(&options);
    let destination = Path::new(&wanted.destination);
    let is_directory = source.as_ref().is_none_or(|source| source.is_directory);
    let place = ensure(root, destination, is_directory).context(|| "mount point".to_owned())?;
    let Some(source) = source else {
        mount_filesystem(wanted, &options, &place)?;
        // What was opened before is now below the mount.
        let top = open_in(root, destination, OFlag::O_PATH).context(|| "mount point".to_owned())?;
        return set_propagation(&top, options.flags.propagation);
    };
    let top = source.place(place.as_fd()).context(|| format!("binding {}", wanted.source))?;
    let rest = options.flags.mount - MsFlags::MS_BIND - MsFlags::MS_REC;
    if !rest.is_empty() {
        let target = by_descriptor(&top);
        let again = rest | MsFlags::MS_BIND | MsFlags::MS_REMOUNT | kept_flags(&target);
        change(&target, again).context(|| "setting the options of the bind".to_owned())?;
    }
    set_below(&top, &options.below).context(|| "setting the recursive options".to_owned())?;
    let default = MsFlags::MS_SLAVE | MsFlags::MS_REC;
    let asked = options.flags.propagation;
    set_propagation(&top, if asked.is_empty() { default } else { asked })
}

fn set_propagation(top: &OwnedFd, propagation: MsFlags) -> Result<()> {
    if propagation.is_empty() {
        return Ok(());
    }
    change(&by_descriptor(top), propagation).context(|| "propagation".to_owned())
}

fn mount_filesystem(wanted: &Mount, options: &MountOptions, place: &OwnedFd) -> Result<()> {
    let fstype = if wanted.r#type == "cgroup" { "cgroup2" } else { wanted.r#type.as_str() };
    let data = if fstype == "cgroup2" { "" } else { options.data.as_str() };
    let flags = options.flags.mount - MsFlags::MS_REC;
    let target = by_descriptor(place);
    let mounted =
        mount(Some(wanted.source.as_str()), target.as_str(), Some(fstype), flags, Some(data));
    match (mounted, fstype) {
        // In a user namespace: the network and the message queues are the sandbox's, and so are
        // their filesystems. The guest's /sys serves; queues work without theirs being mounted.
        (Err(Errno::EPERM), "sysfs") => {
            let sys = Tree::open("/sys", true).context(|| "/sys".to_owned())?;
            let top = sys.place(place.as_fd()).context(|| "binding /sys".to_owned())?;
            let target = by_descriptor(&top);
            let again = flags | MsFlags::MS_BIND | MsFlags::MS_REMOUNT | kept_flags(&target);
            change(&target, again).context(|| "/sys".to_owned())
        }
        (Err(Errno::EPERM), "mqueue") => Ok(()),
        // The guest's own cgroup2 is there already, with that /sys; the container's goes over it.
        (Err(Errno::EBUSY), "cgroup2") => {
            let tree = Tree::filesystem(fstype).context(|| "making cgroup2".to_owned())?;
            let top = tree.place(place.as_fd()).context(|| "mounting cgroup2".to_owned())?;
            let again = flags | MsFlags::MS_BIND | MsFlags::MS_REMOUNT;
            change(&by_descriptor(&top), again).context(|| "cgroup2".to_owned())
        }
        (mounted, _) => mounted.context(|| format!("mounting {fstype}")),
    }
}

/// Flags of the mount at a path, which a remount would otherwise take away.
fn kept_flags(path: &str) -> MsFlags {
    use nix::sys::statvfs::{FsFlags, statvfs};
    let Ok(status) = statvfs(path) else { return MsFlags::empty() };
    let present = status.flags();
    [
        (FsFlags::ST_NOSUID, MsFlags::MS_NOSUID),
        (FsFlags::ST_NODEV, MsFlags::MS_NODEV),
        (FsFlags::ST_NOEXEC, MsFlags::MS_NOEXEC),
        (FsFlags::ST_NOATIME, MsFlags::MS_NOATIME),
        (FsFlags::ST_NODIRATIME, MsFlags::MS_NODIRATIME),
        (FsFlags::ST_RELATIME, MsFlags::MS_RELATIME),
        (FsFlags::ST_RDONLY, MsFlags::MS_RDONLY),
    ]
    .into_iter()
    .filter(|(flag, _)| present.contains(*flag))
    .fold(MsFlags::empty(), |all, (_, flag)| all | flag)
}

/// Kernel settings act on the namespaces of whoever writes them, so the agent's /proc will do.
pub fn set_sysctls(spec: &Spec) -> Result<()> {
    let Some(linux) = &spec.linux else { return Ok(()) };
    for (name, value) in &linux.sysctl {
        let path = name.replace('.', "/");
        let plain = Path::new(&path).components().all(|part| matches!(part, Component::Normal(_)));
        if !plain {
            return Err(Status::invalid(format!("sysctl {name:?}")));
        }
        fs::write(format!("/proc/sys/{path}"), value)
            .context(|| format!("setting sysctl {name} to {value:?}"))?;
    }
    Ok(())
}

fn make_readonly(root: BorrowedFd<'_>, path: &str) -> nix::Result<()> {
    let path = Path::new(path);
    let place = match open_in(root, path, OFlag::O_PATH) {
        Err(Errno::ENOENT | Errno::ENOTDIR) => return Ok(()),
        other => other?,
    };
    let target = by_descriptor(&place);
    let bind = MsFlags::MS_BIND | MsFlags::MS_REC;
    mount(Some(target.as_str()), target.as_str(), None::<&str>, bind, None::<&str>)?;
    let top = open_in(root, path, OFlag::O_PATH)?;
    let target = by_descriptor(&top);
    let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
    change(&target, flags | kept_flags(&target))
}

fn mask(root: BorrowedFd<'_>, path: &str) -> std::io::Result<()> {
    let place = match open_in(root, Path::new(path), OFlag::O_PATH) {
        Err(Errno::ENOENT | Errno::ENOTDIR) => return Ok(()),
        other => other?,
    };
    let target = by_descriptor(&place);
    let kind = fs::metadata(&target)?.file_type();
    if kind.is_dir() {
        let flags =
            MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
        mount(Some("tmpfs"), target.as_str(), Some("tmpfs"), flags, Some("size=0,nr_inodes=2"))?;
    } else if kind.is_file() || kind.is_char_device() || kind.is_block_device() {
        mount(Some("/dev/null"), target.as_str(), None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
    }
    Ok(())
}

/// Both roots at one place; the old one, on top, is then let go.
/// Source: pivot_root(2), `pivot_root(".", ".")`.
fn pivot(root: BorrowedFd<'_>) -> nix::Result<()> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let old = nix::fcntl::open("/", flags, Mode::empty())?;
    fchdir(root)?;
    pivot_root(".", ".")?;
    fchdir(&old)?;
    // Nothing of this may reach the mounts that the agent has.
    change(".", MsFlags::MS_SLAVE | MsFlags::MS_REC)?;
    umount2(".", MntFlags::MNT_DETACH)?;
    chdir("/")
}
