//! The conversation between the agent and a child on its way to its program.
//!
//! A SEQPACKET pair that closes on exec: `U` has a user namespace, `R…` ready, `G` go, `E…` an error
//! text; the end of the connection means that the program has been executed. Behind `R` comes a
//! letter for each descriptor that goes with the message.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::cmsg_space;
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg,
    sendmsg, socketpair,
};

use crate::io::Pollable;
use crate::status::{Context, Result, Status};

const USERS: u8 = b'U';
const READY: u8 = b'R';
const GO: u8 = b'G';
const ERROR: u8 = b'E';
const MAX_TEXT_BYTES: usize = 1024;
const TERMINAL: u8 = b't';
const PROC: u8 = b'p';
const PIDFD: u8 = b'f';
/// One of each letter.
const MAX_DESCRIPTORS: usize = 3;

/// What a child has made that the agent needs.
#[derive(Default)]
pub struct Made {
    /// The master of its terminal.
    pub terminal: Option<OwnedFd>,
    /// A procfs of its pid namespace, mounted nowhere.
    pub proc: Option<OwnedFd>,
    /// The process that will be the program, if it is another one.
    pub sibling: Option<OwnedFd>,
}

/// The agent's end and the child's.
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let flags = SockFlag::SOCK_CLOEXEC;
    Ok(socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)?)
}

/// Waits for the child to be ready.
pub async fn ready(socket: &Pollable) -> Result<Made> {
    let (text, fds) = receive(socket).await?;
    match text.split_first() {
        Some((&READY, letters)) => {
            made(letters, fds).ok_or_else(|| Status::internal("the new process is not understood"))
        }
        other => Err(failure(other)),
    }
}

fn made(letters: &[u8], fds: Vec<OwnedFd>) -> Option<Made> {
    let mut made = Made::default();
    if letters.len() != fds.len() {
        return None;
    }
    for (letter, fd) in letters.iter().zip(fds) {
        match *letter {
            TERMINAL => made.terminal = Some(fd),
            PROC => made.proc = Some(fd),
            PIDFD => made.sibling = Some(fd),
            _ => return None,
        }
    }
    Some(made)
}

/// Waits for the child to be in its user namespace.
pub async fn needs_users(socket: &Pollable) -> Result<()> {
    let (text, _) = receive(socket).await?;
    match text.split_first() {
        Some((&USERS, _)) => Ok(()),
        other => Err(failure(other)),
    }
}

pub async fn tell(socket: &Pollable) -> io::Result<()> {
    socket.write_all(&[GO]).await
}

/// Waits until the child has become its program.
pub async fn executed(socket: &Pollable) -> Result<()> {
    let (text, _) = receive(socket).await?;
    if text.is_empty() { Ok(()) } else { Err(failure(text.split_first())) }
}

fn failure(message: Option<(&u8, &[u8])>) -> Status {
    match message {
        Some((&ERROR, text)) => Status::internal(String::from_utf8_lossy(text)),
        Some(_) => Status::internal("the new process spoke out of turn"),
        None => Status::internal("the new process ended before its program began"),
    }
}

async fn receive(socket: &Pollable) -> Result<(Vec<u8>, Vec<OwnedFd>)> {
    let received = socket.when_readable(|fd| receive_now(fd.as_raw_fd())).await;
    match received {
        // A child that was killed before it had read everything.
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(Default::default()),
        other => other.context(|| "hearing from the new process".to_owned()),
    }
}

fn receive_now(socket: RawFd) -> nix::Result<(Vec<u8>, Vec<OwnedFd>)> {
    let mut text = vec![0; MAX_TEXT_BYTES];
    let mut parts = [IoSliceMut::new(&mut text)];
    let mut space = cmsg_space!([RawFd; MAX_DESCRIPTORS]);
    let message = recvmsg::<()>(socket, &mut parts, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)?;
    let length = message.bytes;
    let mut fds = Vec::new();
    for part in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(received) = part {
            // SAFETY: the kernel has just made these descriptors for us, so nobody else owns them.
            fds.extend(received.iter().map(|fd| unsafe { OwnedFd::from_raw_fd(*fd) }));
        }
    }
    text.truncate(length);
    Ok((text, fds))
}

/// The child's side: blocking, in a process that has nothing else to do.
pub mod from_child {
    use super::*;

    pub fn ready(socket: BorrowedFd<'_>, made: &Made) -> nix::Result<()> {
        let mut text = vec![READY];
        let mut fds = Vec::new();
        for (letter, fd) in [
            (TERMINAL, made.terminal.as_ref()),
            (PROC, made.proc.as_ref()),
            (PIDFD, made.sibling.as_ref()),
        ] {
            if let Some(fd) = fd {
                text.push(letter);
                fds.push(fd.as_raw_fd());
            }
        }
        let rights = [ControlMessage::ScmRights(&fds)];
        let control = if fds.is_empty() { &rights[..0] } else { &rights[..] };
        let parts = [IoSlice::new(&text)];
        sendmsg::<()>(socket.as_raw_fd(), &parts, control, MsgFlags::empty(), None)?;
        Ok(())
    }

    /// Tells that there is a user namespace, and waits for its users.
    pub fn get_users(socket: BorrowedFd<'_>) -> nix::Result<bool> {
        nix::unistd::write(socket, &[USERS])?;
        wait_for_go(socket)
    }

    /// Waits for the go; an agent that is gone means not to go.
    pub fn wait_for_go(socket: BorrowedFd<'_>) -> nix::Result<bool> {
        let mut byte = [0];
        Ok(nix::unistd::read(socket, &mut byte)? == 1 && byte[0] == GO)
    }

    pub fn fail(socket: BorrowedFd<'_>, text: &str) {
        let mut message = vec![ERROR];
        message.extend(text.bytes().take(MAX_TEXT_BYTES - 1));
        // An agent that does not listen any more can't be told.
        let _ = nix::unistd::write(socket, &message);
    }
}
