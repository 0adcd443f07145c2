//! Files that the host puts into the shared tree without a shared filesystem, piece by piece.
//!
//! Containers can write below the tree, so every step is relative to a directory descriptor and no
//! link on the way is followed.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{Read, Seek};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Component, Path};

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, openat, openat2, renameat};
use nix::sys::stat::{Mode, SFlag, fchmod, mkdirat};
use nix::unistd::{Gid, Uid, UnlinkatFlags, fchown, fchownat, symlinkat, unlinkat};

use crate::pb::grpc::CopyFileRequest;
use crate::status::{Context, Result, Status};

/// Source: kata agent protocol, CopyFile.path.
pub const SHARED_ROOT: &str = "/run/kata-containers/shared/containers";
const DIRECTORY: OFlag = OFlag::O_DIRECTORY.union(OFlag::O_NOFOLLOW).union(OFlag::O_CLOEXEC);
/// A file that is not complete yet has this before its name.
const PARTIAL: &str = ".kata-copy-";

/// Stores one piece; the file gets its name when the piece that ends it is there.
pub fn copy(request: &CopyFileRequest) -> Result<()> {
    let relative = Path::new(&request.path)
        .strip_prefix(SHARED_ROOT)
        .map_err(|_| Status::invalid(format!("{:?} is not below {SHARED_ROOT}", request.path)))?;
    let names: Vec<&OsStr> = relative
        .components()
        .map(|part| match part {
            Component::Normal(name) => Ok(name),
            _ => Err(Status::invalid(format!("{:?} is not a plain path", request.path))),
        })
        .collect::<Result<_>>()?;
    let Some((name, parents)) = names.split_last() else {
        return Err(Status::invalid("the path names no file"));
    };
    let what = || format!("copying {}", request.path);
    std::fs::create_dir_all(SHARED_ROOT).context(what)?;
    let directory = parent(request, parents).context(what)?;
    let kind = SFlag::from_bits_truncate(request.file_mode) & SFlag::S_IFMT;
    match kind {
        SFlag::S_IFDIR => make_directory(request, directory.as_fd(), name).context(what),
        SFlag::S_IFLNK => make_link(request, directory.as_fd(), name).context(what),
        // A mount of a single file holds on to the very file, so a new one would not be seen.
        _ => write_piece(request, directory.as_fd(), name, parents.is_empty()),
    }
}

fn parent(request: &CopyFileRequest, parents: &[&OsStr]) -> nix::Result<OwnedFd> {
    let mut directory = nix::fcntl::open(SHARED_ROOT, DIRECTORY, Mode::empty())?;
    for name in parents {
        directory = enter(request, directory.as_fd(), name, request.dir_mode)?;
    }
    Ok(directory)
}

/// Opens a directory, making it if it is missing.
fn enter(
    request: &CopyFileRequest,
    parent: BorrowedFd<'_>,
    name: &OsStr,
    mode: u32,
) -> nix::Result<OwnedFd> {
    let mode = Mode::from_bits_truncate(mode & 0o7777);
    match mkdirat(parent, name, Mode::from_bits_truncate(0o700)) {
        Ok(()) => {
            let made = openat(parent, name, DIRECTORY, Mode::empty())?;
            own(request, made.as_fd())?;
            fchmod(&made, mode)?;
            Ok(made)
        }
        Err(Errno::EEXIST) => openat(parent, name, DIRECTORY, Mode::empty()),
        Err(error) => Err(error),
    }
}

fn own(request: &CopyFileRequest, file: BorrowedFd<'_>) -> nix::Result<()> {
    fchown(file, id(request.uid).map(Uid::from_raw), id(request.gid).map(Gid::from_raw))
}

/// A negative id leaves the owner as it is, as in chown(2).
fn id(value: i32) -> Option<u32> {
    u32::try_from(value).ok()
}

fn make_directory(
    request: &CopyFileRequest,
    parent: BorrowedFd<'_>,
    name: &OsStr,
) -> nix::Result<()> {
    let directory = enter(request, parent, name, request.file_mode)?;
    own(request, directory.as_fd())?;
    fchmod(&directory, Mode::from_bits_truncate(request.file_mode & 0o7777))
}

fn make_link(request: &CopyFileRequest, parent: BorrowedFd<'_>, name: &OsStr) -> nix::Result<()> {
    let temporary = partial(name);
    let _ = unlinkat(parent, temporary.as_os_str(), UnlinkatFlags::NoRemoveDir);
    symlinkat(OsStr::from_bytes(&request.data), parent, temporary.as_os_str())?;
    let (uid, gid) = (id(request.uid).map(Uid::from_raw), id(request.gid).map(Gid::from_raw));
    fchownat(parent, temporary.as_os_str(), uid, gid, AtFlags::AT_SYMLINK_NOFOLLOW)?;
    renameat(parent, temporary.as_os_str(), parent, name)
}

fn partial(name: &OsStr) -> std::ffi::OsString {
    let mut partial = std::ffi::OsString::from(PARTIAL);
    partial.push(name);
    partial
}

fn write_piece(
    request: &CopyFileRequest,
    parent: BorrowedFd<'_>,
    name: &OsStr,
    keeps_file: bool,
) -> Result<()> {
    let what = || format!("copying {}", request.path);
    let offset = u64::try_from(request.offset).context(|| format!("offset {}", request.offset))?;
    let size =
        u64::try_from(request.file_size).context(|| format!("size {}", request.file_size))?;
    let end = offset.saturating_add(request.data.len() as u64);
    if end > size {
        return Err(Status::invalid(format!("piece ends at {end} of a file of {size} bytes")));
    }
    let temporary = partial(name);
    let mut flags = OFlag::O_CREAT | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    if offset == 0 {
        // A leftover of a copy that broke off must not show through.
        let _ = unlinkat(parent, temporary.as_os_str(), UnlinkatFlags::NoRemoveDir);
        flags |= OFlag::O_EXCL;
    }
    flags |= OFlag::O_RDWR;
    let file = openat(parent, temporary.as_os_str(), flags, Mode::from_bits_truncate(0o600))
        .context(what)?;
    let file = File::from(file);
    if !file.metadata().context(what)?.is_file() {
        return Err(Status::invalid(format!("{} is not a regular file", request.path)));
    }
    file.write_all_at(&request.data, offset).context(what)?;
    if end == size {
        own(request, file.as_fd()).context(what)?;
        fchmod(&file, Mode::from_bits_truncate(request.file_mode & 0o7777)).context(what)?;
        if keeps_file && fill_present(request, parent, name, &file).context(what)? {
            let flags = UnlinkatFlags::NoRemoveDir;
            return unlinkat(parent, temporary.as_os_str(), flags).context(what);
        }
        renameat(parent, temporary.as_os_str(), parent, name).context(what)?;
    }
    Ok(())
}

/// Gives a regular file that is there the content of `complete`; false if there is none.
fn fill_present(
    request: &CopyFileRequest,
    parent: BorrowedFd<'_>,
    name: &OsStr,
    complete: &File,
) -> std::io::Result<bool> {
    let flags = OFlag::O_WRONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    let Ok(present) = openat(parent, name, flags, Mode::empty()) else { return Ok(false) };
    let mut present = File::from(present);
    if !present.metadata()?.is_file() {
        return Ok(false);
    }
    let mut complete = complete;
    complete.rewind()?;
    std::io::copy(&mut complete, &mut present)?;
    present.set_len(complete.stream_position()?)?;
    own(request, present.as_fd())?;
    fchmod(&present, Mode::from_bits_truncate(request.file_mode & 0o7777))?;
    Ok(true)
}

/// Reads the start of a regular file of a container's root, whose links stay inside of that root.
pub fn read_below(root: &Path, inside: &Path, most: u64) -> Result<Vec<u8>> {
    let what = || format!("reading {} of {}", inside.display(), root.display());
    let root_fd = nix::fcntl::open(root, DIRECTORY, Mode::empty()).context(what)?;
    let how = OpenHow::new()
        .flags(OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    let file = match openat2(root_fd.as_fd(), inside, how) {
        Err(Errno::ENOENT) => return Ok(Vec::new()),
        other => File::from(other.context(what)?),
    };
    if !file.metadata().context(what)?.is_file() {
        return Err(Status::invalid(format!("{} is not a regular file", inside.display())));
    }
    let mut data = Vec::new();
    file.take(most).read_to_end(&mut data).context(what)?;
    Ok(data)
}
