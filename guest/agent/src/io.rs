//! Non-blocking descriptors under the event loop: pipes, sockets, terminals, inotify.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::unistd;
use tokio::io::unix::AsyncFd;

/// An owned descriptor that the event loop watches. Closing is dropping.
pub struct Pollable(AsyncFd<OwnedFd>);

impl Pollable {
    /// Takes a descriptor that epoll can watch and makes it non-blocking.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        let flags = OFlag::from_bits_retain(fcntl(&fd, FcntlArg::F_GETFL)?);
        fcntl(&fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        // SAFETY: the OwnedFd is moved in, so it stays open and the same for as long as the AsyncFd.
        Ok(Self(unsafe { AsyncFd::register(fd) }?))
    }

    /// Reads once; 0 is the end. Cancellable without loss.
    pub async fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        self.when_readable(|fd| unistd::read(fd, buffer)).await
    }

    /// Runs a non-blocking operation until it answers something other than EAGAIN.
    pub async fn when_readable<T>(
        &self,
        mut operation: impl FnMut(&OwnedFd) -> nix::Result<T>,
    ) -> io::Result<T> {
        loop {
            let mut ready = self.0.readable().await?;
            let attempt = ready.try_io(|fd| retry_interrupted(|| operation(fd.get_ref())));
            if let Ok(result) = attempt {
                return result;
            }
        }
    }

    /// Writes once, waiting for room; the count may be short.
    pub async fn write(&self, data: &[u8]) -> io::Result<usize> {
        loop {
            let mut ready = self.0.writable().await?;
            let attempt =
                ready.try_io(|fd| retry_interrupted(|| unistd::write(fd.get_ref(), data)));
            if let Ok(result) = attempt {
                return result;
            }
        }
    }

    pub async fn write_all(&self, mut data: &[u8]) -> io::Result<()> {
        while !data.is_empty() {
            let written = self.write(data).await?;
            data = &data[written..];
        }
        Ok(())
    }

    /// Resolves when the descriptor can be written to, or has failed.
    pub async fn writable(&self) -> io::Result<()> {
        self.0.writable().await.map(|_| ())
    }

    /// Reads what is there now, without waiting; `WouldBlock` if nothing is.
    pub fn read_now(&self, buffer: &mut [u8]) -> io::Result<usize> {
        retry_interrupted(|| unistd::read(self.0.get_ref(), buffer))
    }
}

impl AsRawFd for Pollable {
    fn as_raw_fd(&self) -> RawFd {
        self.0.get_ref().as_raw_fd()
    }
}

impl AsFd for Pollable {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.get_ref().as_fd()
    }
}

fn retry_interrupted<T>(mut operation: impl FnMut() -> nix::Result<T>) -> io::Result<T> {
    loop {
        match operation() {
            Err(Errno::EINTR) => {}
            other => return other.map_err(io::Error::from),
        }
    }
}
