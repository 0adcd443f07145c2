//! Connections of the host's to the pod's loopback: what `kubectl port-forward` needs.
//!
//! On the host a pod's loopback is in its network namespace; here it is the machine's own. The
//! host's shim takes connections there and passes each on by vsock: two bytes with the TCP port, big
//! endian, then, after our answer of one byte (0: connected), the bytes of both directions.

use std::cell::Cell;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsRawFd, OwnedFd};
use std::rc::Rc;

use nix::sys::socket;
use tokio::net::TcpStream;

use crate::io::Pollable;
use crate::vsock::{self, Address};
use crate::{ACCEPT_PAUSE, warn};

/// Each takes two descriptors and two buffers; a browser opens six.
const MAX_CONNECTIONS: usize = 64;
const CHUNK_BYTES: usize = 16 << 10;
const CONNECTED: u8 = 0;
const REFUSED: u8 = 1;

/// Serves for ever; without a listener it says so and returns.
pub async fn serve(port: u32) {
    let address = Address::Vsock { cid: libc::VMADDR_CID_ANY, port };
    let listener = match vsock::listen_on(&address) {
        Ok(listener) => listener,
        Err(error) => {
            return warn!("port forwarding is off: listening on vsock port {port}: {error}");
        }
    };
    let open = Rc::new(Cell::new(0));
    loop {
        match vsock::accept(&listener).await {
            Ok(host) if open.get() < MAX_CONNECTIONS => {
                let open = open.clone();
                open.set(open.get() + 1);
                tokio::task::spawn_local(async move {
                    // The connection's end is the answer to whatever went wrong with it.
                    let _ = forward(&host).await;
                    open.set(open.get() - 1);
                });
            }
            Ok(_) => warn!("more than {MAX_CONNECTIONS} forwarded connections: one is refused"),
            Err(error) => {
                warn!("accepting a forwarded connection: {error}");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn forward(host: &Pollable) -> io::Result<()> {
    let mut header = [0; 2];
    read_exactly(host, &mut header).await?;
    let Ok(pod) = connect(u16::from_be_bytes(header)).await else {
        return host.write_all(&[REFUSED]).await;
    };
    host.write_all(&[CONNECTED]).await?;
    tokio::try_join!(copy(host, &pod), copy(&pod, host)).map(|_| ())
}

/// "localhost" is either address; a server may listen on one of them only.
async fn connect(port: u16) -> io::Result<Pollable> {
    let ipv4 = TcpStream::connect(SocketAddr::from((Ipv4Addr::LOCALHOST, port))).await;
    let stream = match ipv4 {
        Ok(stream) => stream,
        Err(_) => TcpStream::connect(SocketAddr::from((Ipv6Addr::LOCALHOST, port))).await?,
    };
    Pollable::new(OwnedFd::from(stream.into_std()?))
}

async fn read_exactly(from: &Pollable, mut buffer: &mut [u8]) -> io::Result<()> {
    while !buffer.is_empty() {
        let count = from.read(buffer).await?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        buffer = &mut buffer[count..];
    }
    Ok(())
}

/// Passes bytes on until their end, and the end, too.
async fn copy(from: &Pollable, to: &Pollable) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK_BYTES];
    loop {
        let count = from.read(&mut buffer).await?;
        if count == 0 {
            break;
        }
        to.write_all(&buffer[..count]).await?;
    }
    socket::shutdown(to.as_raw_fd(), socket::Shutdown::Write)?;
    Ok(())
}
