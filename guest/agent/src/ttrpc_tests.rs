//! Frames at every split point, and the requests that are refused before anybody looks into them.

use std::os::unix::net::UnixStream;

use nix::unistd::write;

use super::*;

fn header(data_bytes: usize, stream_id: u32) -> Header {
    Header { data_bytes, stream_id, kind: TYPE_REQUEST }
}

fn frame(stream_id: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = u32::try_from(data.len()).unwrap().to_be_bytes().to_vec();
    bytes.extend_from_slice(&stream_id.to_be_bytes());
    bytes.extend_from_slice(&[TYPE_REQUEST, 0]);
    bytes.extend_from_slice(data);
    bytes
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.unwrap().block_on(future)
}

#[test]
fn frames_are_whole_wherever_the_bytes_are_split() {
    let bytes = [frame(1, b"first"), frame(3, b""), frame(5, &[7; 20])].concat();
    for split in 0..=bytes.len() {
        block_on(async {
            let (ours, theirs) = UnixStream::pair().unwrap();
            let socket = Pollable::new(ours.into()).unwrap();
            write(&theirs, &bytes[..split]).unwrap();
            let rest = bytes[split..].to_vec();
            let sender = std::thread::spawn(move || write(&theirs, &rest).unwrap());
            let mut buffer = ReadBuffer::default();
            let mut got = Vec::new();
            while let Some((header, data)) = buffer.next_frame(&socket).await.unwrap() {
                got.push((header.stream_id, data.unwrap()));
            }
            sender.join().unwrap();
            assert_eq!(got, [(1, b"first".to_vec()), (3, vec![]), (5, vec![7; 20])]);
        });
    }
}

#[test]
fn connection_that_ends_inside_of_a_frame_is_an_error() {
    let bytes = frame(1, b"data");
    for length in 1..bytes.len() {
        block_on(async {
            let (ours, theirs) = UnixStream::pair().unwrap();
            let socket = Pollable::new(ours.into()).unwrap();
            write(&theirs, &bytes[..length]).unwrap();
            drop(theirs);
            let error = ReadBuffer::default().next_frame(&socket).await.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof, "{length}");
        });
    }
}

#[test]
fn stream_ids_are_odd_and_rise() {
    let request = TtrpcRequest { method: "M".to_owned(), ..TtrpcRequest::default() };
    let data = || Some(request.encode_to_vec());
    assert_eq!(check(&header(3, 5), 3, data(), 0).unwrap(), request);
    for (id, last) in [(0, 0), (2, 1), (3, 3), (1, 5)] {
        let status = check(&header(3, id), last, data(), 0).unwrap_err();
        assert_eq!(status.code, Code::InvalidArgument, "{id} after {last}");
    }
    assert_eq!(check(&header(9, 1), 0, None, 0).unwrap_err().code, Code::ResourceExhausted);
    let full = check(&header(3, 1), 0, data(), MAX_IN_FLIGHT).unwrap_err();
    assert_eq!(full.code, Code::ResourceExhausted);
    let broken = check(&header(1, 1), 0, Some(vec![0xff]), 0).unwrap_err();
    assert_eq!(broken.code, Code::InvalidArgument);
}

#[test]
fn reply_has_the_streams_number_and_the_responses_type() {
    let status = Status::new(Code::NotFound, "gone");
    let frame = encode_response(7, &failed(&status));
    let mut head = [0; HEADER_BYTES];
    head.copy_from_slice(&frame[..HEADER_BYTES]);
    let expected = Header { data_bytes: frame.len() - 10, stream_id: 7, kind: TYPE_RESPONSE };
    assert_eq!(Header::parse(&head), expected);
    let response = TtrpcResponse::decode(&frame[HEADER_BYTES..]).unwrap();
    let status = response.status.unwrap();
    assert_eq!((status.code, status.message.as_str()), (5, "gone"));
}
