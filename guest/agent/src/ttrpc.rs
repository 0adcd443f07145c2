//! ttrpc's server side: frames, one task a request, replies in the order they become ready.
//!
//! Knows nothing of the services behind [`Service`]. Source: ttrpc PROTOCOL.md "Message Frame".

use std::cell::Cell;
use std::io;
use std::rc::Rc;
use std::time::Duration;

use prost::Message;
use tokio::sync::Mutex;
use tokio::task::{JoinSet, spawn_local};

use crate::io::Pollable;
use crate::pb::{RpcStatus, TtrpcRequest, TtrpcResponse};
use crate::status::{Code, Result, Status};
use crate::warn;

const HEADER_BYTES: usize = 10;
/// Source: ttrpc PROTOCOL.md, "Data length": 4 MiB.
const MAX_DATA_BYTES: usize = 4 << 20;
const TYPE_REQUEST: u8 = 1;
const TYPE_RESPONSE: u8 = 2;
/// More requests in flight than any shim has streams; beyond it the answer is `ResourceExhausted`.
const MAX_IN_FLIGHT: usize = 1024;
/// A frame that has begun must be whole within this time, or the connection is closed.
const FRAME_TIMEOUT: Duration = Duration::from_secs(10);
const READ_CHUNK_BYTES: usize = 8192;

/// What a connection serves.
pub trait Service {
    /// Answers one call with the encoded reply.
    fn call(self: Rc<Self>, request: TtrpcRequest) -> impl Future<Output = Result<Vec<u8>>>;

    /// True for calls that only wait, and so end with their connection; the others run to their end.
    fn ends_with_connection(method: &str) -> bool;
}

struct Connection {
    socket: Pollable,
    /// Held for one whole frame.
    writing: Mutex<()>,
    in_flight: Cell<usize>,
}

#[derive(Debug, PartialEq)]
struct Header {
    data_bytes: usize,
    stream_id: u32,
    kind: u8,
}

impl Header {
    fn parse(bytes: &[u8; HEADER_BYTES]) -> Self {
        let [a, b, c, d, e, f, g, h, kind, _flags] = *bytes;
        Self {
            data_bytes: u32::from_be_bytes([a, b, c, d]) as usize,
            stream_id: u32::from_be_bytes([e, f, g, h]),
            kind,
        }
    }
}

/// Serves one connection until its end, then drops the calls that only wait.
pub async fn serve<S: Service + 'static>(socket: Pollable, service: Rc<S>) {
    let connection =
        Rc::new(Connection { socket, writing: Mutex::new(()), in_flight: Cell::new(0) });
    if let Err(error) = read_requests(&connection, &service).await {
        warn!("connection closed: {error}");
    }
}

async fn read_requests<S: Service + 'static>(
    connection: &Rc<Connection>,
    service: &Rc<S>,
) -> io::Result<()> {
    let mut waiting = JoinSet::new();
    let mut last_stream_id = 0;
    let mut buffer = ReadBuffer::default();
    while let Some((header, data)) = buffer.next_frame(&connection.socket).await? {
        while waiting.try_join_next().is_some() {}
        if header.kind != TYPE_REQUEST {
            continue;
        }
        let request = match check(&header, last_stream_id, data, connection.in_flight.get()) {
            Ok(request) => request,
            Err(status) => {
                connection.reply(header.stream_id, Err(status)).await?;
                continue;
            }
        };
        last_stream_id = header.stream_id;
        let long = S::ends_with_connection(&request.method);
        let task = answer(connection.clone(), service.clone(), header.stream_id, request);
        if long {
            waiting.spawn_local(task);
        } else {
            spawn_local(task);
        }
    }
    Ok(())
}

fn check(
    header: &Header,
    last_stream_id: u32,
    data: Option<Vec<u8>>,
    in_flight: usize,
) -> Result<TtrpcRequest> {
    let id = header.stream_id;
    if id.is_multiple_of(2) || id <= last_stream_id {
        return Err(Status::invalid(format!("stream id {id} is not odd and new")));
    }
    let data = data.ok_or_else(|| {
        Status::new(
            Code::ResourceExhausted,
            format!("message of {} bytes exceeds {MAX_DATA_BYTES}", header.data_bytes),
        )
    })?;
    if in_flight >= MAX_IN_FLIGHT {
        return Err(Status::new(Code::ResourceExhausted, "too many calls in flight"));
    }
    TtrpcRequest::decode(data.as_slice())
        .map_err(|error| Status::invalid(format!("request does not decode: {error}")))
}

/// Counts a call as in flight for as long as it lives, however it ends.
struct InFlight(Rc<Connection>);

impl InFlight {
    fn new(connection: Rc<Connection>) -> Self {
        connection.in_flight.set(connection.in_flight.get() + 1);
        Self(connection)
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.in_flight.set(self.0.in_flight.get() - 1);
    }
}

async fn answer<S: Service>(
    connection: Rc<Connection>,
    service: Rc<S>,
    stream_id: u32,
    request: TtrpcRequest,
) {
    let _counted = InFlight::new(connection.clone());
    let timeout_nano = u64::try_from(request.timeout_nano).unwrap_or(0);
    let method = request.method.clone();
    let call = service.call(request);
    let result = if timeout_nano > 0 && S::ends_with_connection(&method) {
        match tokio::time::timeout(Duration::from_nanos(timeout_nano), call).await {
            Ok(result) => result,
            Err(_) => Err(Status::new(Code::DeadlineExceeded, format!("{method} timed out"))),
        }
    } else {
        call.await
    };
    if let Err(status) = &result {
        crate::debug!("{method}: {status}");
    }
    // A failed write means that the connection is gone; its reader finds that out by itself.
    let _ = connection.reply(stream_id, result).await;
}

impl Connection {
    async fn reply(&self, stream_id: u32, result: Result<Vec<u8>>) -> io::Result<()> {
        let response = match result {
            Ok(payload) => TtrpcResponse { status: None, payload },
            Err(status) => failed(&status),
        };
        let mut frame = encode_response(stream_id, &response);
        if frame.len() > HEADER_BYTES + MAX_DATA_BYTES {
            let status = Status::new(Code::ResourceExhausted, "reply exceeds 4 MiB");
            frame = encode_response(stream_id, &failed(&status));
        }
        let _whole_frame = self.writing.lock().await;
        self.socket.write_all(&frame).await
    }
}

fn failed(status: &Status) -> TtrpcResponse {
    TtrpcResponse {
        status: Some(RpcStatus { code: status.code as i32, message: status.message.clone() }),
        payload: Vec::new(),
    }
}

fn encode_response(stream_id: u32, response: &TtrpcResponse) -> Vec<u8> {
    let data_bytes = response.encoded_len();
    let mut frame = Vec::with_capacity(HEADER_BYTES + data_bytes);
    frame.extend_from_slice(&u32::try_from(data_bytes).unwrap_or(u32::MAX).to_be_bytes());
    frame.extend_from_slice(&stream_id.to_be_bytes());
    frame.extend_from_slice(&[TYPE_RESPONSE, 0]);
    response.encode_raw(&mut frame);
    frame
}

/// Bytes of the connection that have arrived and are not yet a whole frame.
#[derive(Default)]
struct ReadBuffer {
    bytes: Vec<u8>,
}

impl ReadBuffer {
    /// The next frame; its data is `None` if it was too long and has been thrown away.
    async fn next_frame(
        &mut self,
        socket: &Pollable,
    ) -> io::Result<Option<(Header, Option<Vec<u8>>)>> {
        if self.bytes.is_empty() && !self.fill(socket).await? {
            return Ok(None);
        }
        match tokio::time::timeout(FRAME_TIMEOUT, self.rest_of_frame(socket)).await {
            Ok(frame) => frame.map(Some),
            Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, "frame not completed in time")),
        }
    }

    async fn rest_of_frame(&mut self, socket: &Pollable) -> io::Result<(Header, Option<Vec<u8>>)> {
        self.fill_to(socket, HEADER_BYTES).await?;
        let mut head = [0; HEADER_BYTES];
        head.copy_from_slice(&self.bytes[..HEADER_BYTES]);
        let header = Header::parse(&head);
        if header.data_bytes > MAX_DATA_BYTES {
            self.bytes.drain(..HEADER_BYTES);
            self.discard(socket, header.data_bytes).await?;
            return Ok((header, None));
        }
        let frame_bytes = HEADER_BYTES + header.data_bytes;
        self.fill_to(socket, frame_bytes).await?;
        let data = self.bytes[HEADER_BYTES..frame_bytes].to_vec();
        let left = self.bytes.split_off(frame_bytes);
        // A buffer that held a long frame is not kept.
        self.bytes = left;
        Ok((header, Some(data)))
    }

    async fn discard(&mut self, socket: &Pollable, mut left: usize) -> io::Result<()> {
        loop {
            let here = left.min(self.bytes.len());
            self.bytes.drain(..here);
            left -= here;
            if left == 0 {
                return Ok(());
            }
            self.fill_to(socket, 1).await?;
        }
    }

    async fn fill_to(&mut self, socket: &Pollable, wanted: usize) -> io::Result<()> {
        while self.bytes.len() < wanted {
            if !self.fill(socket).await? {
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "end inside a frame"));
            }
        }
        Ok(())
    }

    /// Reads once; false at the end of the connection.
    async fn fill(&mut self, socket: &Pollable) -> io::Result<bool> {
        let mut chunk = [0; READ_CHUNK_BYTES];
        let count = socket.read(&mut chunk).await?;
        self.bytes.extend_from_slice(&chunk[..count]);
        Ok(count > 0)
    }
}

#[cfg(test)]
#[path = "ttrpc_tests.rs"]
mod tests;
