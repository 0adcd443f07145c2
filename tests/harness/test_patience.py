"""Lines of a pipe, with a deadline."""

from __future__ import annotations

import os

import pytest

from tests.harness.patience import read_line


def test_line_is_read_and_nothing_behind_it_until_the_pipe_ends() -> None:
    reader, writer = os.pipe()
    with open(reader, "rb") as stream:
        os.write(writer, b"one\ntwo")
        assert read_line(stream) == b"one\n"
        os.close(writer)
        assert read_line(stream) == b"two"
        assert read_line(stream) == b""


def test_line_that_does_not_come_is_told_with_what_has_come() -> None:
    reader, writer = os.pipe()
    with open(reader, "rb") as stream, open(writer, "wb", buffering=0) as other:
        other.write(b"hal")
        with pytest.raises(TimeoutError, match=r"no line within \S+ s, only b'hal'"):
            read_line(stream, 0.01)
