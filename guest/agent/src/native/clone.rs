//! The forks themselves: clone3 into a cgroup, and into a pid namespace that others live in.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, setns};

/// Source: clone(2), struct clone_args of version 2 (CLONE_INTO_CGROUP, Linux 5.7).
#[repr(C)]
#[derive(Default)]
struct CloneArguments {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
const CLONE_PIDFD: libc::c_int = 0x1000;

/// Forks; 0 in the child. The child is born inside of the cgroup, so it can't outrun its limits.
pub fn clone_into(flags: CloneFlags, cgroup: BorrowedFd<'_>) -> io::Result<i32> {
    let mut arguments = CloneArguments {
        flags: u64::from(flags.bits().cast_unsigned()) | CLONE_INTO_CGROUP,
        exit_signal: u64::from(libc::SIGCHLD.cast_unsigned()),
        cgroup: u64::from(cgroup.as_raw_fd().cast_unsigned()),
        ..CloneArguments::default()
    };
    // SAFETY: without CLONE_VM and a stack of its own this is fork: the child goes on with a copy of
    // this memory. The agent has one thread, so no lock can be held by a thread that is not copied.
    let pid = unsafe {
        libc::syscall(libc::SYS_clone3, &raw mut arguments, std::mem::size_of::<CloneArguments>())
    };
    let pid = Errno::result(pid)?;
    i32::try_from(pid).map_err(io::Error::other)
}

/// How the child forks its sibling.
pub const SIBLING_FLAGS: libc::c_int = libc::CLONE_PARENT | CLONE_PIDFD;

/// Forks a child of this process's own parent, in the cgroup and the namespaces that this process is
/// in, and in the pid namespace that it has entered for its children. Returns the child's pidfd;
/// none in the child, which has a copy of this memory: who meets the child can write to its memory,
/// and must not write to that of a process outside of its pid namespace.
///
/// By `clone`, which seccomp profiles allow; they can't look into the arguments of `clone3`.
pub fn sibling() -> io::Result<Option<OwnedFd>> {
    let mut pidfd: libc::c_int = -1;
    // SAFETY: without CLONE_VM and a stack of its own this is fork, as above; the kernel stores the
    // descriptor in the parent's memory, which lives on.
    let flags = libc::c_long::from(SIBLING_FLAGS);
    let pid =
        unsafe { libc::syscall(libc::SYS_clone, flags, 0_usize, &raw mut pidfd, 0_usize, 0_usize) };
    if Errno::result(pid)? == 0 {
        return Ok(None);
    }
    // SAFETY: the kernel has just made this descriptor for us, so nobody else owns it.
    Ok(Some(unsafe { OwnedFd::from_raw_fd(pidfd) }))
}

/// The process of a pidfd; none if it has ended, reaped or not.
pub fn living_process(pidfd: BorrowedFd<'_>) -> io::Result<Option<i32>> {
    let mut ended = [PollFd::new(pidfd, PollFlags::POLLIN)];
    if poll(&mut ended, PollTimeout::ZERO)? > 0 {
        return Ok(None);
    }
    let text = fs::read_to_string(format!("/proc/self/fdinfo/{}", pidfd.as_raw_fd()))?;
    let pid = text.lines().find_map(|line| line.strip_prefix("Pid:"));
    Ok(pid.and_then(|pid| pid.trim().parse().ok()).filter(|pid| *pid > 0))
}

/// Runs `make` so that its child is born in these namespaces. The agent steps back out of them; in
/// the child that fails, because namespaces above its own can't be entered, nor need it be.
pub fn in_namespaces<T>(
    wanted: &[(&str, CloneFlags)],
    make: impl FnOnce() -> io::Result<T>,
) -> io::Result<T> {
    let Some(((path, kind), rest)) = wanted.split_first() else { return make() };
    let name = if kind.contains(CloneFlags::CLONE_NEWIPC) { "ipc" } else { "uts" };
    let own = File::open(format!("/proc/self/ns/{name}"))?;
    let target = File::open(path)?;
    setns(target.as_fd(), *kind)?;
    let made = in_namespaces(rest, make);
    let _ = setns(own.as_fd(), *kind);
    made
}

pub fn open_pidfd(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_open takes two numbers.
    let fd = Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })?;
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the kernel has just made this descriptor for us, so nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Kills a child that has not been reaped; one that has ended is left alone by the kernel.
pub fn kill(pid: i32) {
    // SAFETY: kill takes two numbers and touches no memory.
    unsafe { libc::kill(pid, libc::SIGKILL) };
}
