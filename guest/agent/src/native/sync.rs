//! The conversation between the agent and a child on its way to its program.
//!
//! A SEQPACKET pair that closes on exec: `R` ready (with the tty's master), `G` go, `E…` an error
//! text; the end of the connection means that the program has been executed.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::cmsg_space;
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg,
    sendmsg, socketpair,
};

use crate::io::Pollable;
use crate::status::{Context, Result, Status};

const READY: u8 = b'R';
const GO: u8 = b'G';
const ERROR: u8 = b'E';
const MAX_TEXT_BYTES: usize = 1024;

/// The agent's end and the child's.
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let flags = SockFlag::SOCK_CLOEXEC;
    Ok(socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)?)
}

/// Waits for the child to be ready; its terminal comes with that.
pub async fn ready(socket: &Pollable) -> Result<Option<OwnedFd>> {
    let (text, fd) = receive(socket).await?;
    match text.split_first() {
        Some((&READY, _)) => Ok(fd),
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

async fn receive(socket: &Pollable) -> Result<(Vec<u8>, Option<OwnedFd>)> {
    let received = socket.when_readable(|fd| receive_now(fd.as_raw_fd())).await;
    match received {
        // A child that was killed before it had read everything.
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok((Vec::new(), None)),
        other => other.context(|| "hearing from the new process".to_owned()),
    }
}

fn receive_now(socket: RawFd) -> nix::Result<(Vec<u8>, Option<OwnedFd>)> {
    let mut text = vec![0; MAX_TEXT_BYTES];
    let mut parts = [IoSliceMut::new(&mut text)];
    let mut space = cmsg_space!([RawFd; 1]);
    let message = recvmsg::<()>(socket, &mut parts, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)?;
    let length = message.bytes;
    let mut fd = None;
    for part in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(fds) = part {
            // SAFETY: the kernel has just made these descriptors for us, so nobody else owns them.
            fd = fds.first().map(|fd| unsafe { OwnedFd::from_raw_fd(*fd) });
        }
    }
    text.truncate(length);
    Ok((text, fd))
}

/// The child's side: blocking, in a process that has nothing else to do.
pub mod from_child {
    use super::*;

    pub fn ready(socket: BorrowedFd<'_>, terminal: Option<BorrowedFd<'_>>) -> nix::Result<()> {
        let fds: Vec<RawFd> = terminal.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&fds)];
        let control = if fds.is_empty() { &rights[..0] } else { &rights[..] };
        let parts = [IoSlice::new(&[READY])];
        sendmsg::<()>(socket.as_raw_fd(), &parts, control, MsgFlags::empty(), None)?;
        Ok(())
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
