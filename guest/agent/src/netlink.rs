//! rtnetlink: requests, replies, attributes. Knows the wire, not what an interface is for.
//!
//! The kernel answers route requests before send returns, so the socket is blocking and no event
//! loop is involved. Source: netlink(7), rtnetlink(7).

use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, socket,
};

const HEADER_BYTES: usize = 16;
const RECEIVE_BYTES: usize = 32 * 1024;

pub struct Netlink {
    socket: OwnedFd,
    sequence: u32,
    buffer: Vec<u8>,
}

/// A message of a dump: what follows the netlink header.
pub struct Message {
    pub body: Vec<u8>,
}

/// The body of a request: a fixed structure, then attributes.
pub struct Body(Vec<u8>);

impl Body {
    pub fn new(fixed: &[u8]) -> Self {
        let mut bytes = fixed.to_vec();
        bytes.resize(align(bytes.len()), 0);
        Self(bytes)
    }

    pub fn attribute(mut self, kind: u16, value: &[u8]) -> Self {
        let length = u16::try_from(4 + value.len()).unwrap_or(u16::MAX);
        self.0.extend_from_slice(&length.to_ne_bytes());
        self.0.extend_from_slice(&kind.to_ne_bytes());
        self.0.extend_from_slice(value);
        self.0.resize(align(self.0.len()), 0);
        self
    }

    pub fn attribute_if(self, kind: u16, value: Option<&[u8]>) -> Self {
        match value {
            Some(value) => self.attribute(kind, value),
            None => self,
        }
    }
}

impl Netlink {
    pub fn open() -> nix::Result<Self> {
        let socket = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkRoute,
        )?;
        Ok(Self { socket, sequence: 0, buffer: vec![0; RECEIVE_BYTES] })
    }

    /// Asks for a change and waits for the kernel's yes or no.
    pub fn change(&mut self, kind: u16, flags: i32, body: &Body) -> nix::Result<()> {
        self.send(kind, flags | libc::NLM_F_ACK, body)?;
        self.receive(|_| {})
    }

    /// Asks for all objects of a kind.
    pub fn dump(&mut self, kind: u16, body: &Body) -> nix::Result<Vec<Message>> {
        self.send(kind, libc::NLM_F_DUMP, body)?;
        let mut messages = Vec::new();
        self.receive(|message| messages.push(message))?;
        Ok(messages)
    }

    fn send(&mut self, kind: u16, flags: i32, body: &Body) -> nix::Result<()> {
        self.sequence += 1;
        let length = HEADER_BYTES + body.0.len();
        let mut bytes = Vec::with_capacity(length);
        bytes.extend_from_slice(&u32::try_from(length).unwrap_or(u32::MAX).to_ne_bytes());
        bytes.extend_from_slice(&kind.to_ne_bytes());
        let flags = u16::try_from(flags | libc::NLM_F_REQUEST).unwrap_or(0);
        bytes.extend_from_slice(&flags.to_ne_bytes());
        bytes.extend_from_slice(&self.sequence.to_ne_bytes());
        bytes.extend_from_slice(&[0; 4]);
        bytes.extend_from_slice(&body.0);
        let kernel = NetlinkAddr::new(0, 0);
        sendto(self.socket.as_raw_fd(), &bytes, &kernel, MsgFlags::empty())?;
        Ok(())
    }

    /// Reads until the answer to the last request is complete.
    fn receive(&mut self, mut take: impl FnMut(Message)) -> nix::Result<()> {
        loop {
            let count = recv(self.socket.as_raw_fd(), &mut self.buffer, MsgFlags::empty())?;
            let mut rest = &self.buffer[..count];
            while rest.len() >= HEADER_BYTES {
                let length = (word(rest, 0) as usize).clamp(HEADER_BYTES, rest.len());
                let kind = half(rest, 4);
                let body = &rest[HEADER_BYTES..length];
                if word(rest, 8) == self.sequence {
                    match i32::from(kind) {
                        libc::NLMSG_DONE => return Ok(()),
                        libc::NLMSG_ERROR => return outcome(body),
                        _ => take(Message { body: body.to_vec() }),
                    }
                }
                rest = &rest[align(length).min(rest.len())..];
            }
        }
    }
}

fn outcome(body: &[u8]) -> nix::Result<()> {
    match word(body, 0).cast_signed() {
        0 => Ok(()),
        negative => Err(Errno::from_raw(negative.wrapping_neg())),
    }
}

impl Message {
    /// The attributes after a fixed structure of that many bytes.
    pub fn attributes(&self, fixed_bytes: usize) -> Vec<(u16, &[u8])> {
        let mut found = Vec::new();
        let mut rest = self.body.get(align(fixed_bytes)..).unwrap_or(&[]);
        while rest.len() >= 4 {
            let length = (half(rest, 0) as usize).clamp(4, rest.len());
            // The upper bits of the type are flags ("nested", "network order").
            found.push((half(rest, 2) & 0x3fff, &rest[4..length]));
            rest = &rest[align(length).min(rest.len())..];
        }
        found
    }
}

const fn align(length: usize) -> usize {
    (length + 3) & !3
}

/// A 32-bit number in the kernel's order; 0 if it is not there.
pub fn word(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).map_or(0, |part| u32::from_ne_bytes([part[0], part[1], part[2], part[3]]))
}

fn half(bytes: &[u8], at: usize) -> u16 {
    bytes.get(at..at + 2).map_or(0, |part| u16::from_ne_bytes([part[0], part[1]]))
}

/// Text up to its NUL.
pub fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_that_were_written_are_read_back() {
        let Body(body) = Body::new(&[1, 2, 3]).attribute(7, b"abcde").attribute(9, &[]);
        let message = Message { body };
        assert_eq!(message.attributes(3), [(7, b"abcde".as_slice()), (9, b"".as_slice())]);
    }

    #[test]
    fn attribute_that_claims_too_much_ends_at_the_message() {
        let message = Message { body: vec![200, 0, 7, 0, 1, 2] };
        assert_eq!(message.attributes(0), [(7, [1, 2].as_slice())]);
    }
}
