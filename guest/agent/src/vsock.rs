//! AF_VSOCK and unix stream sockets: listening, and the one dial to the host.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::PathBuf;

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrLike, UnixAddr, VsockAddr, accept4, bind,
    connect, getsockopt, listen, socket, sockopt,
};

use crate::io::Pollable;

/// Where the agent serves. The forms are those of upstream's `agent.server_addr`.
#[derive(Clone, Debug, PartialEq)]
pub enum Address {
    Vsock { cid: u32, port: u32 },
    Unix(PathBuf),
}

impl Address {
    /// Reads `vsock://CID:PORT` (-1 is any CID), `unix://PATH` or `unix:PATH`.
    pub fn parse(text: &str) -> Option<Self> {
        if let Some(rest) = text.strip_prefix("vsock://") {
            let (cid, port) = rest.split_once(':')?;
            let cid = if cid == "-1" { libc::VMADDR_CID_ANY } else { cid.parse().ok()? };
            return Some(Self::Vsock { cid, port: port.parse().ok()? });
        }
        let path = text.strip_prefix("unix://").or_else(|| text.strip_prefix("unix:"))?;
        Some(Self::Unix(PathBuf::from(path)))
    }
}

/// Binds and listens; a stale unix socket file is replaced.
pub fn listen_on(address: &Address) -> io::Result<Pollable> {
    match address {
        Address::Vsock { cid, port } => {
            listening(AddressFamily::Vsock, &VsockAddr::new(*cid, *port))
        }
        Address::Unix(path) => {
            if let Err(error) = fs::remove_file(path)
                && error.kind() != io::ErrorKind::NotFound
            {
                return Err(error);
            }
            listening(AddressFamily::Unix, &UnixAddr::new(path)?)
        }
    }
}

fn listening(family: AddressFamily, address: &dyn SockaddrLike) -> io::Result<Pollable> {
    let socket = stream_socket(family)?;
    bind(socket.as_raw_fd(), address)?;
    listen(&socket, Backlog::new(128)?)?;
    Pollable::new(socket)
}

fn stream_socket(family: AddressFamily) -> nix::Result<OwnedFd> {
    socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK, None)
}

/// Waits for the next connection.
pub async fn accept(listener: &Pollable) -> io::Result<Pollable> {
    let accepted = listener
        .when_readable(|fd| {
            accept4(fd.as_raw_fd(), SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK)
        })
        .await?;
    // SAFETY: accept4 has just returned this descriptor, so nobody else owns it.
    Pollable::new(unsafe { OwnedFd::from_raw_fd(accepted) })
}

/// Connects to a port of the host (CID 2).
pub async fn dial_host(port: u32) -> io::Result<Pollable> {
    let socket = stream_socket(AddressFamily::Vsock)?;
    let address = VsockAddr::new(libc::VMADDR_CID_HOST, port);
    let pending = match connect(socket.as_raw_fd(), &address) {
        Ok(()) => false,
        Err(Errno::EINPROGRESS | Errno::EAGAIN) => true,
        Err(error) => return Err(error.into()),
    };
    let socket = Pollable::new(socket)?;
    if pending {
        socket.writable().await?;
        let error = getsockopt(&socket, sockopt::SocketError)?;
        if error != 0 {
            return Err(io::Error::from_raw_os_error(error));
        }
    }
    Ok(socket)
}
