from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.ttrpc.wire import frame
from ttrpc.errors import MessageTooLarge, RemoteProtocolError
from ttrpc.frames import (
    HEADER_BYTES,
    MAX_MESSAGE_BYTES,
    Frame,
    FrameDecoder,
    OversizedFrame,
    encode_frame,
)

FRAMES = st.builds(
    Frame,
    st.integers(0, 2**32 - 1),
    st.integers(0, 255),
    st.integers(0, 255),
    st.binary(max_size=200),
)


def test_header_is_ten_bytes_big_endian():
    assert encode_frame(1, 2, 3, b"ab") == bytes.fromhex("00000002 00000001 02 03") + b"ab"


@given(FRAMES)
def test_decoder_returns_what_was_encoded(sent):
    assert FrameDecoder().receive_data(encode_frame(*sent)) == [sent]


@given(st.lists(FRAMES, max_size=5), st.data())
def test_cuts_between_receptions_do_not_matter(sent, data):
    stream = b"".join(encode_frame(*one) for one in sent)
    decoder, received = FrameDecoder(), []
    while stream:
        size = data.draw(st.integers(1, len(stream)))
        received += decoder.receive_data(stream[:size])
        stream = stream[size:]
    assert received == sent
    assert not decoder.is_mid_frame


def test_every_split_point_gives_the_same_frames():
    stream = frame(1, 1, 0, b"first") + frame(3, 1, 0, b"") + frame(1, 3, 5, b"third")
    expected = FrameDecoder().receive_data(stream)
    assert len(expected) == 3
    for split in range(1, len(stream)):
        decoder = FrameDecoder()
        received = decoder.receive_data(stream[:split]) + decoder.receive_data(stream[split:])
        assert received == expected


def test_one_byte_at_a_time_gives_the_same_frames():
    stream = frame(1, 1, 0, b"first") + frame(3, 2, 0, b"second")
    decoder = FrameDecoder()
    received = [one for byte in stream for one in decoder.receive_data(bytes([byte]))]
    assert received == [Frame(1, 1, 0, b"first"), Frame(3, 2, 0, b"second")]


@pytest.mark.parametrize("length", range(1, HEADER_BYTES + 4))
def test_end_within_a_frame_is_an_error(length):
    decoder = FrameDecoder()
    assert decoder.receive_data(frame(1, 1, 0, b"data")[:length]) == []
    assert decoder.is_mid_frame
    with pytest.raises(RemoteProtocolError):
        decoder.receive_data(b"")


def test_end_between_frames_is_no_error():
    decoder = FrameDecoder()
    assert decoder.receive_data(b"") == []
    decoder.receive_data(frame(1, 1, 0, b"data"))
    assert decoder.receive_data(b"") == []


def test_message_of_the_maximum_size_is_received():
    data = bytes(MAX_MESSAGE_BYTES)
    assert FrameDecoder().receive_data(encode_frame(1, 1, 0, data)) == [Frame(1, 1, 0, data)]


def test_message_over_the_maximum_is_not_encoded():
    with pytest.raises(MessageTooLarge) as caught:
        encode_frame(1, 1, 0, bytes(MAX_MESSAGE_BYTES + 1))
    assert (caught.value.length, caught.value.limit) == (MAX_MESSAGE_BYTES + 1, MAX_MESSAGE_BYTES)


def test_oversized_frame_is_told_at_once_and_thrown_away():
    decoder = FrameDecoder(max_message_bytes=8)
    oversized = frame(1, 1, 0, bytes(20))
    assert decoder.receive_data(oversized[:HEADER_BYTES]) == [OversizedFrame(1, 1, 20)]
    assert decoder.is_mid_frame
    assert decoder.receive_data(oversized[HEADER_BYTES:] + frame(3, 1, 0, b"ok")) == [
        Frame(3, 1, 0, b"ok")
    ]


@pytest.mark.parametrize("split", range(1, 30))
def test_oversized_frame_is_skipped_at_every_split_point(split):
    decoder = FrameDecoder(max_message_bytes=8)
    stream = frame(1, 1, 0, bytes(20)) + frame(3, 1, 0, b"ok")
    received = decoder.receive_data(stream[:split]) + decoder.receive_data(stream[split:])
    assert received == [OversizedFrame(1, 1, 20), Frame(3, 1, 0, b"ok")]


def test_longest_length_is_discarded_without_being_kept():
    decoder = FrameDecoder()
    assert decoder.receive_data(b"\xff\xff\xff\xff" + b"\x00\x00\x00\x01\x01\x00") == [
        OversizedFrame(1, 1, 2**32 - 1)
    ]
    for _ in range(100):
        assert decoder.receive_data(bytes(65536)) == []
        assert decoder.buffered_bytes == 0
    with pytest.raises(RemoteProtocolError):
        decoder.receive_data(b"")


@given(st.lists(st.binary(min_size=1, max_size=64), max_size=20))
def test_any_bytes_decode_without_growing_past_the_limit(chunks):
    decoder = FrameDecoder(max_message_bytes=100)
    for chunk in chunks:
        decoder.receive_data(chunk)
        assert decoder.buffered_bytes < HEADER_BYTES + 100 + 64
