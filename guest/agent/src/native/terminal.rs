//! A pseudo terminal inside of the container, as the standard streams of its process.

use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::stat::Mode;
use nix::unistd::{Uid, dup2_stderr, dup2_stdin, dup2_stdout, fchown};

use super::tree::Tree;
use crate::pb::grpc::Process;
use crate::status::{Context, Result};

/// Makes the terminal, puts it on 0, 1 and 2, and returns its master.
pub fn open(process: &Process, is_init: bool) -> Result<OwnedFd> {
    let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
    let master = self::master(flags).context(|| "opening /dev/pts/ptmx".to_owned())?;
    let slave = slave(&master, flags).context(|| "opening the tty".to_owned())?;
    let uid = process.user.as_ref().map_or(0, |user| user.uid);
    fchown(&slave, Some(Uid::from_raw(uid)), None).context(|| "owner of the tty".to_owned())?;
    if is_init {
        // Programs that open /dev/console find the terminal there. An image without the place for
        // it goes without.
        let _ = bind_console(&slave);
    }
    if let Some(size) = &process.console_size {
        resize(&master, size.height, size.width);
    }
    dup2_stdin(&slave).context(|| "stdin".to_owned())?;
    dup2_stdout(&slave).context(|| "stdout".to_owned())?;
    dup2_stderr(&slave).context(|| "stderr".to_owned())?;
    Ok(master)
}

/// Makes the terminal on the standard input the controlling one of this session.
pub fn take_control() -> Result<()> {
    // SAFETY: TIOCSCTTY takes a number; 0 is the standard input, which stays open.
    let result = unsafe { libc::ioctl(0, libc::TIOCSCTTY, 0) };
    Errno::result(result).context(|| "controlling tty".to_owned())?;
    Ok(())
}

fn master(flags: OFlag) -> nix::Result<OwnedFd> {
    let master = nix::fcntl::open("/dev/pts/ptmx", flags, Mode::empty())?;
    let unlocked: libc::c_int = 0;
    // SAFETY: TIOCSPTLCK reads one int from the pointer, which is valid for the call.
    Errno::result(unsafe {
        libc::ioctl(master.as_raw_fd(), libc::TIOCSPTLCK, &raw const unlocked)
    })?;
    Ok(master)
}

/// The slave by way of its master: no path of the container's is involved.
fn slave(master: &OwnedFd, flags: OFlag) -> nix::Result<OwnedFd> {
    // SAFETY: TIOCGPTPEER takes open flags and returns a descriptor.
    let fd = unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCGPTPEER, flags.bits()) };
    let fd = Errno::result(fd)?;
    // SAFETY: the kernel has just made this descriptor for us, so nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// By descriptors: /proc does not always know this process.
fn bind_console(slave: &OwnedFd) -> std::io::Result<()> {
    // The image may have put a FIFO there, which must not make this wait.
    let only = OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
    let flags = OFlag::O_CREAT | OFlag::O_CLOEXEC | OFlag::O_RDONLY | only;
    drop(nix::fcntl::open("/dev/console", flags, Mode::from_bits_truncate(0o600))?);
    let flags = OFlag::O_PATH | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW;
    let place = nix::fcntl::open("/dev/console", flags, Mode::empty())?;
    Tree::of(slave.as_fd())?.place(place.as_fd())?;
    Ok(())
}

fn resize(master: &OwnedFd, rows: u32, columns: u32) {
    let narrow = |value: u32| u16::try_from(value).unwrap_or(u16::MAX);
    let size =
        libc::winsize { ws_row: narrow(rows), ws_col: narrow(columns), ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCSWINSZ reads one winsize from the pointer, which is valid for the call.
    unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) };
}
