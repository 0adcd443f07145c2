//! Streams of one process: pipes or a terminal, with the agent's ends non-blocking.
//!
//! Nothing is buffered here: a pipe that nobody reads stays full, and the process behind it blocks.

use std::cell::{Cell, RefCell};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::rc::Rc;
use std::time::Duration;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::unistd::{self, pipe2};
use tokio::time::Instant;

use crate::io::Pollable;
use crate::reaper::Exit;
use crate::status::{Code, Context, Result, Status};

/// Largest piece of one read; shims ask for 32 KiB.
const MAX_READ_BYTES: usize = 1 << 20;
/// A buffer is not smaller, whatever is said to be waiting.
const LEAST_BUFFER_BYTES: usize = 4096;
/// How long output is waited for after its process has ended while others hold the stream open.
/// Source: kata agent protocol, "EOF": drains up to 500 ms.
const DRAIN: Duration = Duration::from_millis(500);

/// One output of a process.
pub struct Output {
    source: Rc<Pollable>,
    exit: Rc<Exit>,
    ended: Cell<bool>,
    /// What may still be delivered when the drain time is over.
    left_after_drain: Cell<Option<usize>>,
}

impl Output {
    pub fn new(source: Rc<Pollable>, exit: Rc<Exit>) -> Self {
        Self { source, exit, ended: Cell::new(false), left_after_drain: Cell::new(None) }
    }

    /// Reads the next piece; empty is the end, and stays the end.
    pub async fn read(&self, wanted: usize) -> Result<Vec<u8>> {
        if self.ended.get() {
            return Ok(Vec::new());
        }
        let wanted = wanted.clamp(1, MAX_READ_BYTES);
        let result = tokio::select! {
            biased;
            result = self.read_available(wanted) => result,
            () = self.drain_is_over() => self.read_left_over(wanted),
        };
        let data = match result {
            Ok(data) => data,
            // A terminal whose last slave has been closed.
            Err(error) if error.raw_os_error() == Some(libc::EIO) => Vec::new(),
            Err(error) => return Err(Status::internal(format!("reading output: {error}"))),
        };
        if data.is_empty() {
            self.ended.set(true);
        }
        Ok(data)
    }

    /// Waits first and then makes a buffer of what is there: readers that wait hold no memory.
    async fn read_available(&self, wanted: usize) -> io::Result<Vec<u8>> {
        self.source
            .when_readable(|fd| {
                let mut data = vec![0; bytes_waiting(fd).max(LEAST_BUFFER_BYTES).min(wanted)];
                let count = unistd::read(fd, &mut data)?;
                data.truncate(count);
                Ok(data)
            })
            .await
    }

    async fn drain_is_over(&self) {
        let (_, at) = self.exit.wait().await;
        tokio::time::sleep_until(Instant::from_std(at) + DRAIN).await;
    }

    fn read_left_over(&self, wanted: usize) -> io::Result<Vec<u8>> {
        let left = self.left_after_drain.get().unwrap_or_else(|| bytes_waiting(&*self.source));
        let mut data = vec![0; left.min(wanted)];
        if data.is_empty() {
            return Ok(data);
        }
        match self.source.read_now(&mut data) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => data.clear(),
            Err(error) => return Err(error),
            Ok(count) => {
                self.left_after_drain.set(Some(left - count));
                data.truncate(count);
            }
        }
        Ok(data)
    }

    pub fn has_ended(&self) -> bool {
        self.ended.get()
    }
}

nix::ioctl_read_bad!(fionread, libc::FIONREAD, libc::c_int);
nix::ioctl_write_ptr_bad!(tiocswinsz, libc::TIOCSWINSZ, libc::winsize);

/// How much a read would find; 0 also where nobody can tell.
fn bytes_waiting(source: &impl AsRawFd) -> usize {
    let mut count = 0;
    // SAFETY: FIONREAD writes one int to the pointer, which is valid for the call.
    let result = unsafe { fionread(source.as_raw_fd(), &raw mut count) };
    if result.is_ok() { usize::try_from(count).unwrap_or(0) } else { 0 }
}

/// The agent's ends.
pub struct Stdio {
    stdin: RefCell<Option<Rc<Pollable>>>,
    pub stdout: Option<Output>,
    pub stderr: Option<Output>,
    terminal: Option<Rc<Pollable>>,
}

impl Stdio {
    pub fn terminal(master: Pollable, exit: &Rc<Exit>) -> Self {
        let master = Rc::new(master);
        Self {
            stdin: RefCell::new(Some(master.clone())),
            stdout: Some(Output::new(master.clone(), exit.clone())),
            stderr: None,
            terminal: Some(master),
        }
    }

    pub fn pipes(pipes: Pipes, exit: &Rc<Exit>) -> Self {
        Self {
            stdin: RefCell::new(Some(Rc::new(pipes.stdin))),
            stdout: Some(Output::new(Rc::new(pipes.stdout), exit.clone())),
            stderr: Some(Output::new(Rc::new(pipes.stderr), exit.clone())),
            terminal: None,
        }
    }

    /// Writes some of the data and says how much; waits while the process doesn't read.
    pub async fn write(&self, data: &[u8]) -> Result<usize> {
        let stdin = self.stdin.borrow().clone();
        let stdin = stdin.ok_or_else(|| {
            Status::new(Code::FailedPrecondition, "stdin of the process is closed")
        })?;
        stdin.write(data).await.context(|| "writing to stdin".to_owned())
    }

    /// Ends the input. A terminal has no end of input of its own, so it stays open.
    pub fn close_stdin(&self) {
        if self.terminal.is_none() {
            self.stdin.borrow_mut().take();
        }
    }

    pub fn resize(&self, rows: u16, columns: u16) -> Result<()> {
        let terminal = self
            .terminal
            .as_ref()
            .ok_or_else(|| Status::new(Code::Unavailable, "the process has no tty"))?;
        let size = libc::winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        // SAFETY: TIOCSWINSZ reads one winsize from the pointer, which is valid for the call.
        unsafe { tiocswinsz(terminal.as_raw_fd(), &raw const size) }
            .context(|| "resizing the tty".to_owned())?;
        Ok(())
    }

    /// True when no more output will come.
    pub fn is_drained(&self) -> bool {
        [&self.stdout, &self.stderr].into_iter().flatten().all(Output::has_ended)
    }
}

/// The agent's ends of three pipes.
pub struct Pipes {
    stdin: Pollable,
    stdout: Pollable,
    stderr: Pollable,
}

/// The process's ends of three pipes; to be closed once the process has them.
pub struct ProcessEnds {
    pub stdin: OwnedFd,
    pub stdout: OwnedFd,
    pub stderr: OwnedFd,
}

/// Makes the pipes of a process without a terminal. Every end is close-on-exec.
pub fn make_pipes(pipe_bytes: i32) -> Result<(Pipes, ProcessEnds)> {
    let pair = || -> nix::Result<(OwnedFd, OwnedFd)> {
        let (read, write) = pipe2(OFlag::O_CLOEXEC)?;
        if pipe_bytes > 0 {
            fcntl(&write, FcntlArg::F_SETPIPE_SZ(pipe_bytes))?;
        }
        Ok((read, write))
    };
    let make = || -> io::Result<(Pipes, ProcessEnds)> {
        let (stdin, our_stdin) = pair()?;
        let (our_stdout, stdout) = pair()?;
        let (our_stderr, stderr) = pair()?;
        let pipes = Pipes {
            stdin: Pollable::new(our_stdin)?,
            stdout: Pollable::new(our_stdout)?,
            stderr: Pollable::new(our_stderr)?,
        };
        Ok((pipes, ProcessEnds { stdin, stdout, stderr }))
    };
    make().context(|| "making the pipes of a process".to_owned())
}
