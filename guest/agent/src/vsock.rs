//! AF_VSOCK and unix stream sockets: listening, and the one dial to the host.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::PathBuf;

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrLike, SockaddrStorage, UnixAddr, VsockAddr,
    accept4, bind, connect, getpeername, getsockopt, listen, socket, sockopt,
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

/// Waits for the next connection of the host's; nobody inside of the guest is let in by vsock.
pub async fn accept(listener: &Pollable) -> io::Result<Pollable> {
    loop {
        let accepted = listener.when_readable(accept_now).await?;
        if comes_from_host(&accepted)? {
            return Pollable::new(accepted);
        }
        crate::warn!("refused a connection from inside of the guest");
    }
}

fn accept_now(listener: &OwnedFd) -> nix::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = accept4(listener.as_raw_fd(), flags)?;
    // SAFETY: accept4 has just returned this descriptor, so nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A unix socket is guarded by its file's mode.
fn comes_from_host(socket: &OwnedFd) -> nix::Result<bool> {
    let peer: SockaddrStorage = getpeername(socket.as_raw_fd())?;
    Ok(peer.as_vsock_addr().is_none_or(|peer| peer.cid() == libc::VMADDR_CID_HOST))
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
