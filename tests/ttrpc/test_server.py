from __future__ import annotations

import errno
import gc
import os
import resource
import socket

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.harness.own_process import open_descriptors
from tests.ttrpc.wire import RawPeer, connected, frame, request, serving
from ttrpc import frames
from ttrpc.client import Client
from ttrpc.errors import CallTimeout, Code, ConnectionLost, RemoteStatus, StatusError
from ttrpc.events import Status
from ttrpc.handlers import CallContext, StreamHandler
from ttrpc.peer import is_same_user, peer_credentials
from ttrpc.server import Server


def echo(_context: CallContext, payload: bytes) -> bytes:
    return payload


async def echo_later(_context: CallContext, payload: bytes) -> bytes:
    await trio.lowlevel.checkpoint()
    return payload


async def for_ever(_context: CallContext, _payload: bytes) -> bytes:
    await trio.sleep_forever()
    raise AssertionError


class Gate:
    """A handler that waits, and tells how many wait and were cancelled."""

    def __init__(self) -> None:
        self.opened = trio.Event()
        self.waiting = 0
        self.cancelled = 0

    async def __call__(self, _context: CallContext, _payload: bytes) -> bytes:
        self.waiting += 1
        try:
            await self.opened.wait()
        except trio.Cancelled:
            self.cancelled += 1
            raise
        finally:
            self.waiting -= 1
        return b"opened"


BASIC = {"test": {"Echo": echo, "Later": echo_later, "ForEver": for_ever}}


@pytest.mark.parametrize("method", ["Echo", "Later"])
async def test_answer_comes_back_on_the_stream_of_the_request(method):
    async with serving(BASIC) as peer:
        await peer.send(request(1, method, b"a") + request(7, method, b"b"))
        answers = [await peer.frame(), await peer.frame()]
        assert sorted(one.stream_id for one in answers if one) == [1, 7]
        assert all(one.type == frames.RESPONSE for one in answers if one)


@pytest.mark.parametrize(
    ("service", "method", "message"),
    [("nope", "Echo", "service nope"), ("test", "Nope", "method Nope"), ("", "", "service ")],
)
async def test_unknown_service_and_method_are_unimplemented(service, method, message):
    async with connected(BASIC) as client:
        with pytest.raises(RemoteStatus) as caught:
            await client.call(service, method, b"")
        assert (caught.value.code, caught.value.message) == (Code.UNIMPLEMENTED, message)


async def test_handler_sees_metadata_deadline_and_peer(autojump_clock):
    seen: list[CallContext] = []

    def look(context: CallContext, payload: bytes) -> bytes:
        seen.append(context)
        return payload

    async with connected({"test": {"Look": look}}) as client:
        metadata = (("a", "1"), ("a", "2"), ("b", "3"))
        await client.call("test", "Look", b"", timeout_s=5, metadata=metadata)
        await client.call("test", "Look", b"")
    first, second = seen
    assert (first.metadata, first.values("a")) == (metadata, ["1", "2"])
    assert first.deadline == pytest.approx(trio.current_time() + 5, abs=0.1)
    assert second.deadline == float("inf")
    assert first.peer is not None
    assert (first.peer.pid, first.peer.uid) == (os.getpid(), os.geteuid())


@pytest.mark.parametrize("is_async", [False, True])
async def test_exceptions_become_statuses_and_the_server_goes_on(is_async):
    reports: list[str] = []
    errors = [
        (StatusError(Code.NOT_FOUND, "gone"), Code.NOT_FOUND, "gone"),
        (ValueError("bad value"), Code.UNKNOWN, "bad value"),
        (KeyError(), Code.UNKNOWN, "KeyError"),
        (RecursionError("deep"), Code.UNKNOWN, "deep"),
        (ExceptionGroup("two", [OSError()]), Code.UNKNOWN, "two (1 sub-exception)"),
    ]

    def fail(_context: CallContext, payload: bytes) -> bytes:
        raise errors[int(payload)][0]

    async def fail_later(context: CallContext, payload: bytes) -> bytes:
        return fail(context, payload)

    handler = fail_later if is_async else fail
    report = lambda message, _error: reports.append(message)  # noqa: E731
    async with connected({"test": {"Fail": handler}}, report=report) as client:
        for index, (_, code, message) in enumerate(errors):
            with pytest.raises(RemoteStatus) as caught:
                await client.call("test", "Fail", b"%d" % index)
            assert (caught.value.code, caught.value.message) == (code, message)
    assert len(reports) == 4


async def test_own_table_of_statuses_is_used_and_may_be_faulty():
    def table(error: BaseException) -> Status:
        if isinstance(error, KeyError):
            raise RuntimeError("the table is broken")
        return Status(Code.FAILED_PRECONDITION, f"<{error}>")

    def fail(_context: CallContext, payload: bytes) -> bytes:
        raise KeyError if payload else ValueError("x")

    async with connected({"test": {"Fail": fail}}, status_from=table) as client:
        with pytest.raises(RemoteStatus, match="FAILED_PRECONDITION: <x>"):
            await client.call("test", "Fail", b"")
        with pytest.raises(RemoteStatus, match="INTERNAL"):
            await client.call("test", "Fail", b"x")


async def test_message_that_is_not_unicode_or_too_long_is_still_sent():
    def fail(_context: CallContext, payload: bytes) -> bytes:
        raise ValueError("\udcff" if payload else "x" * (5 << 20))

    async with connected({"test": {"Fail": fail}}) as client:
        for payload, message in ((b"x", "?"), (b"", "x" * 65536)):
            with pytest.raises(RemoteStatus) as caught:
                await client.call("test", "Fail", payload)
            assert caught.value.message == message


@pytest.mark.parametrize("result", [None, "text", 7])
async def test_handler_that_returns_no_bytes_is_an_error_of_that_call(result):
    async def wrong_later(_context: CallContext, _payload: bytes):
        return result

    handlers = {"Wrong": lambda _context, _payload: result, "Echo": echo, "Later": wrong_later}
    async with connected({"test": handlers}) as client:
        for method in ("Wrong", "Later"):
            with pytest.raises(RemoteStatus):
                await client.call("test", method, b"")
        assert await client.call("test", "Echo", b"x") == b"x"


async def test_answer_over_the_limit_is_resource_exhausted():
    handlers = {"Big": lambda _context, _payload: bytes(frames.MAX_MESSAGE_BYTES), "Echo": echo}
    async with connected({"test": handlers}) as client:
        with pytest.raises(RemoteStatus) as caught:
            await client.call("test", "Big", b"")
        assert caught.value.code is Code.RESOURCE_EXHAUSTED
        assert await client.call("test", "Echo", b"x") == b"x"


async def test_server_enforces_the_timeout_itself(autojump_clock):
    async with serving(BASIC) as peer:
        start = trio.current_time()
        await peer.send(request(1, "ForEver", timeout_nano=3_000_000_000))
        response = await peer.response()
        assert response.status.code == Code.DEADLINE_EXCEEDED
        assert trio.current_time() - start == pytest.approx(3)


@pytest.mark.parametrize("timeout_nano", [-1, -(2**63), 1])
async def test_timeout_that_has_passed_already_ends_the_call_at_once(autojump_clock, timeout_nano):
    async with serving(BASIC) as peer:
        await peer.send(request(1, "ForEver", timeout_nano=timeout_nano))
        assert (await peer.response()).status.code == Code.DEADLINE_EXCEEDED


async def test_longest_timeout_is_accepted():
    async with serving(BASIC) as peer:
        await peer.send(request(1, "Later", b"x", timeout_nano=2**63 - 1))
        assert (await peer.response()).payload == b"x"


async def test_blocked_calls_do_not_hold_up_others():
    async with connected(BASIC) as client, trio.open_nursery() as nursery:
        for _ in range(10):
            nursery.start_soon(client.call, "test", "ForEver", b"")
        await wait_all_tasks_blocked()
        assert await client.call("test", "Echo", b"x") == b"x"
        nursery.cancel_scope.cancel()


async def test_end_of_the_connection_cancels_its_calls_only():
    gate = Gate()
    server = Server({"test": {"Wait": gate}})
    pairs = [socket.socketpair() for _ in range(2)]
    peers = [RawPeer(theirs) for _, theirs in pairs]
    async with trio.open_nursery() as nursery:
        for ours, _ in pairs:
            nursery.start_soon(server.serve_connection, ours)
        for peer in peers:
            await peer.send(request(1, "Wait") + request(3, "Wait"))
        await wait_all_tasks_blocked()
        assert gate.waiting == 4
        peers[0].close()
        await wait_all_tasks_blocked()
        assert (gate.waiting, gate.cancelled) == (2, 2)
        gate.opened.set()
        assert (await peers[1].response()).payload == b"opened"
        peers[1].close()
    assert not server._sessions


async def test_truncated_frame_then_end_is_reported_once():
    reports: list[str] = []
    report = lambda message, _error: reports.append(message)  # noqa: E731
    async with serving(BASIC, report=report) as peer:
        await peer.send(request(1, "Echo")[:-1])
        peer.close()
        await wait_all_tasks_blocked()
    assert reports == ["connection closed: the connection ended within a frame"]


async def test_frame_that_stalls_ends_the_connection(autojump_clock):
    async with serving(BASIC, frame_deadline_s=10) as peer:
        await trio.sleep(3600)
        start = trio.current_time()
        await peer.send(request(1, "Echo")[:-1])
        assert await peer.frame() is None
        assert trio.current_time() - start == pytest.approx(10)


async def test_streaming_in_every_direction():
    async def add_up(_context, stream):
        return b"".join([message async for message in stream])

    async def letters(_context, stream):
        for letter in (await stream.receive()).decode():
            await stream.send(letter.encode())

    async def chat(_context, stream):
        async for message in stream:
            if message == b"fail":
                raise StatusError(Code.ABORTED, "as asked")
            await stream.send(message + b"!")

    handlers = {
        name: StreamHandler(function)
        for name, function in {"Sum": add_up, "Letters": letters, "Chat": chat}.items()
    }
    async with connected({"test": handlers}) as client:
        async with await client.open_stream("test", "Sum") as stream:
            for message in (b"a", b"", b"b"):
                await stream.send(message)
            await stream.close_send()
            await stream.close_send()
            assert [one async for one in stream] == [b"ab"]
        async with await client.open_stream("test", "Letters", b"xyz", client_streams=False) as s:
            assert [one async for one in s] == [b"x", b"y", b"z"]
            assert await s.receive() is None
        async with await client.open_stream("test", "Chat") as stream:
            await stream.send(b"a")
            assert await stream.receive() == b"a!"
            await stream.send(b"fail")
            with pytest.raises(RemoteStatus, match="as asked"):
                await stream.receive()
        assert client._connection.streams == {}


async def test_stream_has_the_deadline_of_its_call(autojump_clock):
    async def listen(_context, stream):
        await stream.receive()

    async with connected({"test": {"Listen": StreamHandler(listen)}}) as client:
        stream = await client.open_stream("test", "Listen", timeout_s=2)
        with pytest.raises(RemoteStatus) as caught:
            await stream.receive()
        assert caught.value.code is Code.DEADLINE_EXCEEDED


async def test_oversized_stream_message_fails_that_stream_only():
    ended: list[Exception] = []

    async def listen(_context, stream):
        try:
            await stream.receive()
        except StatusError as error:
            ended.append(error)
            raise

    handlers = {"Listen": StreamHandler(listen), "Echo": echo}
    async with serving({"test": handlers}, max_message_bytes=100) as peer:
        await peer.send(request(1, "Listen", flags=frames.REMOTE_OPEN))
        await peer.send(frame(1, frames.DATA, 0, bytes(101)))
        assert (await peer.response()).status.code == Code.RESOURCE_EXHAUSTED
        await wait_all_tasks_blocked()
        assert len(ended) == 1
        await peer.send(request(3, "Echo", b"x"))
        answers = [await peer.frame(), await peer.frame()]
        assert 3 in [one.stream_id for one in answers if one]


async def test_unread_stream_is_failed_after_a_second(autojump_clock):
    async def ignore(_context, _stream):
        await trio.sleep(100)

    handlers = {"Ignore": StreamHandler(ignore), "Echo": echo}
    async with serving({"test": handlers}) as peer:
        await peer.send(request(1, "Ignore", flags=frames.REMOTE_OPEN))
        await peer.send(frame(1, frames.DATA, 0, b"x") * 100 + request(3, "Echo", b"x"))
        received = await peer.frame()
        assert received is not None
        assert received.stream_id == 3


@pytest.fixture
def listener(tmp_path):
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(str(tmp_path / "s"))
    sock.listen()
    yield sock
    sock.close()


def dial(listener: socket.socket) -> RawPeer:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(listener.getsockname())
    return RawPeer(sock)


async def test_shutdown_lets_active_calls_finish_and_sends_their_answers(listener):
    gate = Gate()
    server = Server({"test": {"Wait": gate, "Echo": echo}})
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            await nursery.start(server.serve, listener)
            busy, idle = dial(listener), dial(listener)
            await busy.send(request(1, "Wait"))
            await wait_all_tasks_blocked()
            nursery.start_soon(server.shutdown)
            await wait_all_tasks_blocked()
            assert await idle.frame() is None
            await busy.send(request(3, "Echo"))
            assert (await busy.response()).status.code == Code.UNAVAILABLE
            gate.opened.set()
            assert (await busy.response()).payload == b"opened"
            assert await busy.frame() is None
            busy.close()
            idle.close()


async def test_shutdown_cancels_what_does_not_finish_in_time(listener, autojump_clock):
    gate = Gate()
    server = Server({"test": {"Wait": gate}})
    async with trio.open_nursery() as nursery:
        await nursery.start(server.serve, listener)
        peer = dial(listener)
        await peer.send(request(1, "Wait"))
        await wait_all_tasks_blocked()
        await server.shutdown(grace_s=5)
        assert await peer.frame() is None
        peer.close()
    assert gate.cancelled == 1


async def hang_up_after(peer: RawPeer, seconds: float) -> None:
    await trio.sleep(seconds)
    peer.close()


async def test_shutdown_leaves_clients_time_to_hang_up_after_their_answers(
    listener, autojump_clock
):
    server = Server({"test": {"Echo": echo}})
    async with trio.open_nursery() as nursery:
        await nursery.start(server.serve, listener)
        leaving, staying = dial(listener), dial(listener)
        for peer in (leaving, staying):
            await peer.send(request(1, "Echo"))
            assert (await peer.response()).status.code == Code.OK
        begin = trio.current_time()
        nursery.start_soon(hang_up_after, leaving, 1)
        await server.shutdown(grace_s=9, farewell_s=3)
        assert trio.current_time() - begin == pytest.approx(3)
        staying.close()


async def test_peer_of_another_user_is_turned_away(listener):
    server = Server(BASIC, authorize=lambda peer: peer is not None and peer.uid == 12345)
    async with trio.open_nursery() as nursery:
        await nursery.start(server.serve, listener)
        peer = dial(listener)
        assert await peer.frame() is None
        peer.close()
        nursery.cancel_scope.cancel()


async def test_peer_of_the_same_user_is_served(listener):
    async with trio.open_nursery() as nursery:
        await nursery.start(Server(BASIC, authorize=is_same_user).serve, listener)
        peer = dial(listener)
        await peer.send(request(1, "Echo", b"x"))
        assert (await peer.response()).payload == b"x"
        peer.close()
        nursery.cancel_scope.cancel()


async def test_stream_handler_that_fails_or_is_one_too_many_is_answered(autojump_clock):
    def fail(_context, _stream):
        raise StatusError(Code.ABORTED, "before it began")

    async def listen(_context, stream):
        await stream.receive()

    handlers = {"Fail": StreamHandler(fail), "Listen": StreamHandler(listen)}
    async with connected({"test": handlers}, max_in_flight=1) as client:
        outcomes = []
        for method in ("Fail", "Listen", "Listen"):
            stream = await client.open_stream("test", method)
            with trio.move_on_after(0.05):
                with pytest.raises(RemoteStatus) as caught:
                    await stream.receive()
                outcomes.append(caught.value.code)
        assert outcomes == [Code.ABORTED, Code.RESOURCE_EXHAUSTED]


async def test_answer_is_not_sent_to_a_client_that_has_gone():
    seen: list[Exception] = []

    async def talk(_context, stream):
        await stream.receive()
        with trio.CancelScope(shield=True):
            try:
                while True:
                    await stream.send(b"x")
                    await trio.lowlevel.checkpoint()
            except ConnectionLost as error:
                seen.append(error)

    async with serving({"test": {"Talk": StreamHandler(talk)}}) as peer:
        await peer.send(request(1, "Talk", b"go", flags=frames.REMOTE_OPEN))
        await peer.frame()
        peer.close()
        with trio.fail_after(30):
            await wait_all_tasks_blocked()
    assert len(seen) == 1


def test_socket_that_is_not_connected_is_nobodys():
    with socket.socket(socket.AF_UNIX) as sock:
        assert not is_same_user(peer_credentials(sock))


def test_sockets_without_credentials_have_none():
    with socket.socket(socket.AF_INET) as sock:
        assert peer_credentials(sock) is None
    assert not is_same_user(None)


async def test_accept_survives_running_out_of_descriptors(listener):
    """Real EMFILE: accepting pauses, goes on when there is room, and open connections live."""
    reports: list[BaseException | None] = []
    reported = trio.Event()

    def report(_message: str, error: BaseException | None) -> None:
        reports.append(error)
        reported.set()

    server = Server(BASIC, report=report)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            await nursery.start(server.serve, listener)
            first = dial(listener)
            await first.send(request(1, "Echo", b"x"))
            assert (await first.response()).payload == b"x"
            second = dial_at_limit(listener)
            try:
                await reported.wait()
                await first.send(request(3, "Echo", b"y"))
                assert (await first.response()).payload == b"y"
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            await second.send(request(1, "Echo", b"z"))
            assert (await second.response()).payload == b"z"
            first.close()
            second.close()
            nursery.cancel_scope.cancel()
    assert isinstance(reports[0], OSError)
    assert reports[0].errno == errno.EMFILE


def dial_at_limit(listener: socket.socket) -> RawPeer:
    """Connect, and leave no descriptor for the server to accept with."""
    peer = dial(listener)
    gc.collect()  # so that it frees none meanwhile
    spare = os.dup(0)
    os.close(spare)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (spare, hard))
    return peer


async def test_accept_error_that_will_not_pass_is_raised():
    with socket.socket(socket.AF_UNIX) as sock:
        with pytest.raises(ExceptionGroup) as caught:
            await Server(BASIC).serve(sock)
        assert caught.group_contains(OSError)


async def test_client_and_server_close_without_leaving_descriptors():
    before = open_descriptors()
    for _ in range(50):
        async with connected(BASIC) as client:
            await client.call("test", "Echo", b"x")
            with pytest.raises(CallTimeout):
                await client.call("test", "ForEver", b"", timeout_s=0)
    assert open_descriptors() <= before


async def test_client_sees_the_server_go():
    ours, theirs = socket.socketpair()
    client = Client(theirs)
    async with trio.open_nursery() as nursery:
        await nursery.start(client.run)
        with trio.move_on_after(0):
            await Server(BASIC).serve_connection(ours)
        with pytest.raises(ConnectionLost):
            await client.call("test", "Echo", b"x")
