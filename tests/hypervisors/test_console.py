"""The console ring: bounded whatever the guest writes, and safe to print."""

from __future__ import annotations

import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from hypervisors.console import LINE_OVERHEAD_BYTES, MAX_LINE_BYTES, ConsoleRing, escape


@given(st.lists(st.binary(max_size=80)))
def test_lines_are_the_same_at_every_split(chunks):
    split, whole = ConsoleRing(1 << 16), ConsoleRing(1 << 16)
    for chunk in chunks:
        split.feed(chunk)
    whole.feed(b"".join(chunks))
    assert split.tail(1000) == whole.tail(1000)


@given(st.binary(max_size=200))
def test_nothing_unprintable_gets_out(data):
    ring = ConsoleRing(4096)
    ring.feed(data)
    assert all(line.isprintable() and line.isascii() for line in ring.tail(100))


def test_escape_shows_what_a_terminal_would_obey():
    assert escape(b"\x1b[2Jhi\tthere\x07\xff\r") == "\\x1b[2Jhi there\\x07\\xff\\x0d"


def test_old_lines_go_first_and_memory_is_bounded():
    ring = ConsoleRing(4096)
    for number in range(1000):
        ring.feed(b"line %d\r\n" % number)
    tail = ring.tail(1000)
    assert tail[-1] == "line 999"
    assert len(tail) <= 4096 // LINE_OVERHEAD_BYTES
    ring.feed(b"\n" * 10_000)
    assert len(ring.tail(100_000)) <= 4096 // LINE_OVERHEAD_BYTES
    ring.feed(b"x" * 1_000_000)
    assert sum(map(len, ring.tail(100_000))) <= 4096 + MAX_LINE_BYTES


def test_tail_counts_an_unfinished_line():
    ring = ConsoleRing(4096)
    ring.feed(b"one\ntwo\nlogin: ")
    assert ring.tail(2) == ["two", "login: "]
    assert ring.tail(0) == []


async def test_a_line_is_noticed_before_during_and_unfinished():
    ring = ConsoleRing(4096)
    ring.feed(b"early\n")
    await ring.wait_for(b"early")
    seen = []

    async def watch(needle):
        await ring.wait_for(needle)
        seen.append(needle)

    async with trio.open_nursery() as nursery:
        for needle in (b"panic", b"login:"):
            nursery.start_soon(watch, needle)
        await trio.testing.wait_all_tasks_blocked()
        ring.feed(b"Kernel pan")
        await trio.testing.wait_all_tasks_blocked()
        assert seen == []
        ring.feed(b"ic - not syncing\nlogin: ")
    assert sorted(seen) == [b"login:", b"panic"]
