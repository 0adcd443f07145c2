//! The conversation between the agent and a child on its way to its program.
//!
//! A SEQPACKET pair that closes on exec: `U` has a user namespace, `R…` ready, `G` go, `E…` an error
//! text; the end of the connection means that the program has been executed. Behind `R` comes a
//! letter for each descriptor that goes with the message.
//!
//! The sibling has the same end as the child, and a hostile neighbour may make it speak. What the
//! agent acts on, `U` and `R`, is taken from the child alone: the kernel says who has sent a message,
//! and nobody in another pid namespace can name a process outside of it.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::cmsg_space;
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType,
    UnixCredentials, recvmsg, sendmsg, setsockopt, socketpair, sockopt,
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
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)?;
    setsockopt(&ours, sockopt::PassCred, &true)?;
    Ok((ours, theirs))
}

/// What has been heard, and from whom.
#[derive(Default)]
struct Message {
    text: Vec<u8>,
    fds: Vec<OwnedFd>,
    sender: Option<i32>,
}

/// Waits for the child to be ready.
pub async fn ready(socket: &Pollable, child: i32) -> Result<Made> {
    let Message { text, fds, sender } = receive(socket).await?;
    match text.split_first() {
        Some((&READY, letters)) if sender == Some(child) => {
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
pub async fn needs_users(socket: &Pollable, child: i32) -> Result<()> {
    let Message { text, sender, .. } = receive(socket).await?;
    match text.split_first() {
        Some((&USERS, _)) if sender == Some(child) => Ok(()),
        other => Err(failure(other)),
    }
}

pub async fn tell(socket: &Pollable) -> io::Result<()> {
    socket.write_all(&[GO]).await
}

/// Waits until the child has become its program.
pub async fn executed(socket: &Pollable) -> Result<()> {
    let text = receive(socket).await?.text;
    if text.is_empty() { Ok(()) } else { Err(failure(text.split_first())) }
}

fn failure(message: Option<(&u8, &[u8])>) -> Status {
    match message {
        Some((&ERROR, text)) => Status::internal(String::from_utf8_lossy(text)),
        Some(_) => Status::internal("the new process spoke out of turn"),
        None => Status::internal("the new process ended before its program began"),
    }
}

async fn receive(socket: &Pollable) -> Result<Message> {
    let received = socket.when_readable(|fd| receive_now(fd.as_raw_fd())).await;
    match received {
        // A child that was killed before it had read everything.
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(Default::default()),
        other => other.context(|| "hearing from the new process".to_owned()),
    }
}

fn receive_now(socket: RawFd) -> nix::Result<Message> {
    let mut text = vec![0; MAX_TEXT_BYTES];
    let mut parts = [IoSliceMut::new(&mut text)];
    let mut space = cmsg_space!([RawFd; MAX_DESCRIPTORS], UnixCredentials);
    let message = recvmsg::<()>(socket, &mut parts, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)?;
    let length = message.bytes;
    let (mut fds, mut sender) = (Vec::new(), None);
    for part in message.cmsgs()? {
        match part {
            ControlMessageOwned::ScmRights(received) => {
                // SAFETY: the kernel has just made these descriptors for us, so nobody else owns
                // them.
                fds.extend(received.iter().map(|fd| unsafe { OwnedFd::from_raw_fd(*fd) }));
            }
            ControlMessageOwned::ScmCredentials(credentials) => sender = Some(credentials.pid()),
            _ => {}
        }
    }
    text.truncate(length);
    Ok(Message { text, fds, sender })
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[tokio::test(flavor = "current_thread")]
    async fn only_the_childs_own_word_counts() {
        let (ours, theirs) = pair().unwrap();
        let ours = Pollable::new(ours).unwrap();
        let own = std::process::id().cast_signed();
        for (child, believed) in [(own, true), (own + 1, false)] {
            from_child::ready(theirs.as_fd(), &Made::default()).unwrap();
            assert_eq!(ready(&ours, child).await.is_ok(), believed, "{child}");
            nix::unistd::write(&theirs, &[USERS]).unwrap();
            assert_eq!(needs_users(&ours, child).await.is_ok(), believed, "{child}");
        }
        from_child::fail(theirs.as_fd(), "no such program");
        assert_eq!(ready(&ours, own + 1).await.err().unwrap().message, "no such program");
    }
}
