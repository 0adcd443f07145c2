//! Mounts held by a descriptor before they have a place: bind sources and the root.
//!
//! They are opened first, while the process can still pass every directory on the way to them, and
//! put in place by descriptor, so that no path of the container's decides where.
//! Source: open_tree(2), move_mount(2).

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::sys::stat::fstat;

use super::rootfs::is_bind;
use crate::mount_options::Below;
use crate::pb::grpc::Spec;
use crate::status::{Context, Result, Status};

/// A copy of the mounts at a path, that nobody else can see.
pub struct Tree {
    fd: OwnedFd,
    pub is_directory: bool,
}

impl Tree {
    pub fn open(path: &str, recursive: bool) -> io::Result<Self> {
        let flags = if recursive { libc::AT_RECURSIVE.cast_unsigned() } else { 0 };
        Self::copy(libc::AT_FDCWD, &CString::new(path)?, flags)
    }

    /// The mount of an open file, with that file as its root.
    pub fn of(fd: BorrowedFd<'_>) -> io::Result<Self> {
        Self::copy(fd.as_raw_fd(), c"", libc::AT_EMPTY_PATH.cast_unsigned())
    }

    fn copy(directory: RawFd, name: &CStr, flags: libc::c_uint) -> io::Result<Self> {
        let flags = flags | libc::OPEN_TREE_CLONE | libc::O_CLOEXEC.cast_unsigned();
        // SAFETY: open_tree reads a NUL-terminated string that lives for the call.
        let fd = unsafe { libc::syscall(libc::SYS_open_tree, directory, name.as_ptr(), flags) };
        let fd = owned(fd)?;
        let kind = fstat(&fd)?.st_mode & libc::S_IFMT;
        Ok(Self { fd, is_directory: kind == libc::S_IFDIR })
    }

    /// A filesystem without options that has no place yet. Source: fsopen(2), fsmount(2).
    pub fn filesystem(fstype: &str) -> io::Result<Self> {
        const CREATE: libc::c_uint = 6; // FSCONFIG_CMD_CREATE
        const CLOSE_ON_EXEC: libc::c_uint = 1; // FSOPEN_CLOEXEC, FSMOUNT_CLOEXEC
        let name = CString::new(fstype)?;
        let none = std::ptr::null::<libc::c_char>();
        // SAFETY: fsopen reads a NUL-terminated string that lives for the call.
        let context = unsafe { libc::syscall(libc::SYS_fsopen, name.as_ptr(), CLOSE_ON_EXEC) };
        let context = owned(context)?;
        let fd = context.as_raw_fd();
        // SAFETY: this command of fsconfig takes no key and no value.
        let made = unsafe { libc::syscall(libc::SYS_fsconfig, fd, CREATE, none, none, 0) };
        Errno::result(made)?;
        // SAFETY: fsmount takes a descriptor and numbers.
        let fd = owned(unsafe { libc::syscall(libc::SYS_fsmount, fd, CLOSE_ON_EXEC, 0) })?;
        Ok(Self { fd, is_directory: true })
    }

    /// The descriptor that holds it, for somebody else to place.
    pub fn into_fd(self) -> OwnedFd {
        self.fd
    }

    /// Mounts it on an open file or directory; its descriptor then is the top of that place.
    pub fn place(self, target: BorrowedFd<'_>) -> nix::Result<OwnedFd> {
        place(self.fd.as_fd(), target)?;
        Ok(self.fd)
    }
}

/// Mounts what a descriptor holds on an open file or directory.
pub fn place(tree: BorrowedFd<'_>, target: BorrowedFd<'_>) -> nix::Result<()> {
    let flags = libc::MOVE_MOUNT_F_EMPTY_PATH | libc::MOVE_MOUNT_T_EMPTY_PATH;
    let (from, to) = (tree.as_raw_fd(), target.as_raw_fd());
    let here = c"".as_ptr();
    // SAFETY: move_mount reads two empty strings and takes two descriptors.
    let result = unsafe { libc::syscall(libc::SYS_move_mount, from, here, to, here, flags) };
    Errno::result(result).map(drop)
}

/// Sets attributes of a mount and of all below it. Source: mount_setattr(2).
pub fn set_below(top: &OwnedFd, below: &Below) -> nix::Result<()> {
    if *below == Below::default() {
        return Ok(());
    }
    let attributes: [u64; 4] = [below.set, below.clear, 0, 0];
    let flags = libc::AT_EMPTY_PATH | libc::AT_RECURSIVE;
    // SAFETY: mount_setattr reads an empty string and a struct mount_attr, which is four u64.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            top.as_raw_fd(),
            c"".as_ptr(),
            flags,
            attributes.as_ptr(),
            size_of_val(&attributes),
        )
    };
    Errno::result(result).map(drop)
}

/// The descriptor that a system call has returned.
fn owned(result: libc::c_long) -> io::Result<OwnedFd> {
    let fd = i32::try_from(Errno::result(result)?).map_err(io::Error::other)?;
    // SAFETY: the kernel has just made this descriptor for the caller, so nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The trees that a spec names.
pub struct Sources {
    pub root: Tree,
    /// One for each mount of the spec; none if it is to be made anew.
    pub binds: Vec<Option<Tree>>,
}

impl Sources {
    /// `proc` is where a procfs of the container's pid namespace is mounted, if that is another's.
    pub fn open(spec: &Spec, proc: Option<&str>) -> Result<Self> {
        let root = spec.root.as_ref().ok_or_else(|| Status::invalid("the spec has no root"))?;
        let binds = spec.mounts.iter().map(|mount| {
            let (source, recursive) = match proc {
                _ if is_bind(mount) => {
                    let recursive = mount.options.iter().any(|option| option == "rbind");
                    (mount.source.as_str(), recursive)
                }
                Some(proc) if mount.r#type == "proc" => (proc, false),
                _ => return Ok(None),
            };
            let tree = Tree::open(source, recursive);
            tree.map(Some).context(|| format!("mount on {}: source {source}", mount.destination))
        });
        Ok(Self {
            root: Tree::open(&root.path, true)
                .context(|| format!("root filesystem {}", root.path))?,
            binds: binds.collect::<Result<_>>()?,
        })
    }
}
