"""The handshake of hybrid vsock: every way to cut a right answer, and many wrong ones."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_proto.errors import HandshakeRefused
from agent_proto.hybrid_vsock import MAX_REPLY_BYTES, Connected, Handshake, HandshakeState

RIGHT = b"OK 1073741824\n"


def feed(handshake: Handshake, pieces: list[bytes]) -> list[Connected]:
    return [event for piece in pieces for event in handshake.receive_data(piece)]


def test_request_names_the_port():
    assert Handshake(1024).request() == b"CONNECT 1024\n"


@pytest.mark.parametrize("port", [-1, 1 << 32])
def test_port_that_is_no_32_bit_number_is_refused_locally(port):
    with pytest.raises(ValueError, match="32-bit"):
        Handshake(port)


@pytest.mark.parametrize("cut", range(1, len(RIGHT)))
def test_right_answer_is_taken_at_every_split_point(cut):
    handshake = Handshake(1024)
    assert handshake.receive_data(RIGHT[:cut]) == []
    assert handshake.state is HandshakeState.AWAITING
    assert handshake.receive_data(RIGHT[cut:]) == [Connected(1073741824, b"")]
    assert handshake.state is HandshakeState.CONNECTED


def test_right_answer_is_taken_byte_by_byte():
    assert feed(Handshake(1), [bytes([b]) for b in RIGHT]) == [Connected(1073741824, b"")]


@pytest.mark.parametrize("cut", range(len(RIGHT)))
def test_bytes_behind_the_answer_belong_to_the_stream(cut):
    handshake = Handshake(1024)
    pieces = [piece for piece in (RIGHT[:cut], RIGHT[cut:] + b"x" * 100) if piece]
    assert feed(handshake, pieces) == [Connected(1073741824, b"x" * 100)]


@pytest.mark.parametrize("cut", range(len(RIGHT)))
def test_end_of_stream_before_the_answer_is_whole_is_a_refusal(cut):
    handshake = Handshake(1024)
    if cut:
        handshake.receive_data(RIGHT[:cut])
    with pytest.raises(HandshakeRefused, match="closed"):
        handshake.receive_data(b"")
    assert handshake.state is HandshakeState.REFUSED


@pytest.mark.parametrize(
    "answer",
    [
        b"\n",
        b"OK\n",
        b"OK \n",
        b"ok 1\n",
        b"OK 1 \n",
        b"OK 1\r\n",
        b"OK -1\n",
        b"OK 0x1\n",
        b"OK  1\n",
        b" OK 1\n",
        b"OK 4294967296\n",
        b"OK 99999999999999999999\n",
        "OK \N{ARABIC-INDIC DIGIT ONE}\n".encode(),
        b"KO\n",
        b"\x00\x00\x00\x01OK 1\n",
        b"ERR OK 1\n",
        b"X" * MAX_REPLY_BYTES,
    ],
)
def test_answer_other_than_ok_is_a_refusal(answer):
    handshake = Handshake(1024)
    with pytest.raises(HandshakeRefused):
        handshake.receive_data(answer)
    assert handshake.state is HandshakeState.REFUSED


def test_wrong_start_is_refused_without_waiting_for_an_end_of_line():
    with pytest.raises(HandshakeRefused):
        Handshake(1024).receive_data(b"E")


@pytest.mark.parametrize("size", [1, 7, 63, 64, 65, 1 << 20])
def test_endless_line_is_given_up_at_the_limit(size):
    handshake = Handshake(1024)
    endless = b"OK " + b"1" * MAX_REPLY_BYTES
    whole_pieces = (MAX_REPLY_BYTES - 1) // size
    for piece in range(whole_pieces):
        assert handshake.receive_data(endless[piece * size : (piece + 1) * size]) == []
    with pytest.raises(HandshakeRefused):
        handshake.receive_data((endless[whole_pieces * size :] + b"1" * size)[:size])


def test_refusal_shows_the_answer_escaped():
    with pytest.raises(HandshakeRefused) as caught:
        Handshake(1024).receive_data(b"\x1b[2Jboo\n")
    assert "\x1b" not in str(caught.value)
    assert r"\x1b[2Jboo" in str(caught.value)


def test_finished_handshake_takes_no_more_data():
    handshake = Handshake(1024)
    handshake.receive_data(RIGHT)
    with pytest.raises(RuntimeError, match="over"):
        handshake.receive_data(b"more")


@given(st.lists(st.binary(min_size=1, max_size=80), max_size=20))
def test_no_bytes_do_anything_but_connect_refuse_or_wait(pieces):
    handshake = Handshake(1024)
    events: list[Connected] = []
    try:
        for piece in pieces:
            events += handshake.receive_data(piece)
            if events:
                break
    except HandshakeRefused:
        assert handshake.state is HandshakeState.REFUSED
    else:
        joined = b"".join(pieces)
        assert bool(events) == (b"\n" in joined[:MAX_REPLY_BYTES])
        assert len(events) <= 1
