"""The HTTP client of VMM APIs against a scripted peer on a unix socket."""

from __future__ import annotations

import os
import socket
from contextlib import asynccontextmanager, closing

import pytest
import trio
import trio.testing

from hypervisors.errors import CommandTimeout, ControlError, ControlLost, HttpRejected
from hypervisors.http_api import MAX_BODY_BYTES, HttpApi
from tests.fakes.fake_http_peer import answer, scripted_api


@asynccontextmanager
async def talking(tmp_path):
    path = tmp_path / "api.sock"
    async with scripted_api(path) as api:
        with closing(HttpApi(str(path))) as client:
            yield api, client


def raw(data):
    async def reply(_):
        await trio.lowlevel.checkpoint()
        return data

    return reply


async def never(_):
    await trio.sleep_forever()


async def test_request_carries_its_json_body_and_the_answer_is_decoded(tmp_path):
    async with talking(tmp_path) as (api, client):
        api.on("PUT", "/vm.add-disk", 200, {"id": "d0", "bdf": "0000:00:05.0"})
        api.on("GET", "/vm", 200, {"state": "Running"})
        api.on("PUT", "/vm.boot", 204)
        assert await client.request("PUT", "/vm.add-disk", {"path": "/x", "readonly": True}) == {
            "id": "d0",
            "bdf": "0000:00:05.0",
        }
        assert await client.request("GET", "/vm") == {"state": "Running"}
        assert await client.request("PUT", "/vm.boot") is None
        disk, get, boot = api.requests
    assert disk.body == {"path": "/x", "readonly": True}
    assert disk.headers["content-type"] == "application/json"
    assert disk.headers["host"] == "localhost"
    # An action with a body is refused by Cloud Hypervisor, even with an empty one.
    assert get.body is None
    assert boot.body is None
    assert "content-length" not in boot.headers
    assert api.connections == 1


async def test_descriptors_travel_with_the_request_and_stay_ours(tmp_path):
    first, second = os.pipe()
    async with talking(tmp_path) as (api, client):
        api.default = 204
        await client.request("PUT", "/vm.add-net", {"id": "n"}, fds=[first, second])
        await client.request("PUT", "/vm.boot")
        with_fds, without = api.requests
    here = [(os.fstat(fd).st_dev, os.fstat(fd).st_ino) for fd in (first, second)]
    assert with_fds.fds == here
    assert without.fds == []
    os.close(first)
    os.close(second)


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (["Error from API", "The disk could not be added", "No such file"],
         "Error from API: The disk could not be added: No such file"),
        ({"fault_message": "Invalid drive"}, "Invalid drive"),
        (b"plain words", "plain words"),
        (b"\x1b[31m\xff", "\\x1b[31m"),
        (b"[" * 5000, "["),
        ([], "no reason given"),
    ],
)  # fmt: skip
async def test_refusal_names_method_target_status_and_reason(tmp_path, body, text):
    async with talking(tmp_path) as (api, client):
        api.on("PUT", "/vm.add-disk", 500, body)
        with pytest.raises(HttpRejected) as caught:
            await client.request("PUT", "/vm.add-disk", {})
        assert (caught.value.method, caught.value.target) == ("PUT", "/vm.add-disk")
        assert caught.value.status == 500
        assert caught.value.text.startswith(text)
        assert len(caught.value.text) <= 600
        assert str(caught.value).isprintable()
        assert "VMM command PUT /vm.add-disk: status 500: " in str(caught.value)
        # The connection goes on.
        api.default = 204
        await client.request("PUT", "/vm.boot")
        assert api.connections == 1


async def test_missing_or_deaf_socket_is_a_lost_connection_with_its_path(tmp_path):
    with (
        closing(HttpApi(str(tmp_path / "none"))) as client,
        pytest.raises(ControlLost, match=r"/none does not answer: No such file"),
    ):
        await client.request("GET", "/")
    deaf = tmp_path / "deaf"
    with socket.socket(socket.AF_UNIX) as bound, closing(HttpApi(str(deaf))) as client:
        bound.bind(str(deaf))
        with pytest.raises(ControlLost, match="refused"):
            await client.connect()


async def test_late_answer_is_never_taken_for_the_next_ones(tmp_path, autojump_clock):
    release = trio.Event()

    async def late(_):
        await release.wait()
        return answer(200, {"of": "first"})

    async with talking(tmp_path) as (api, client):
        api.on("GET", "/slow", late)
        api.on("GET", "/next", 200, {"of": "second"})
        with pytest.raises(CommandTimeout, match=r"GET /slow: no answer within 2 s"):
            await client.request("GET", "/slow", timeout_s=2)
        release.set()
        assert await client.request("GET", "/next") == {"of": "second"}
        assert api.connections == 2


async def test_cancelled_request_leaves_the_client_usable(tmp_path, autojump_clock):
    async with talking(tmp_path) as (api, client):
        api.on("GET", "/slow", never)
        api.on("GET", "/next", 200, {})
        with trio.move_on_after(1):
            await client.request("GET", "/slow")
        assert await client.request("GET", "/next") == {}


async def test_requests_wait_for_each_other_within_their_own_deadlines(tmp_path, autojump_clock):
    async with talking(tmp_path) as (api, client):
        api.on("GET", "/slow", never)
        api.on("GET", "/next", 200, {})
        async with trio.open_nursery() as nursery:

            async def first():
                with pytest.raises(CommandTimeout):
                    await client.request("GET", "/slow", timeout_s=3)

            nursery.start_soon(first)
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(CommandTimeout):
                await client.request("GET", "/next", timeout_s=1)
            assert await client.request("GET", "/next", timeout_s=5) == {}
    assert [seen.target for seen in api.requests] == ["/slow", "/next"]


async def test_closing_wakes_the_one_who_waits_and_is_for_good(tmp_path):
    async with talking(tmp_path) as (api, client):
        api.on("GET", "/slow", never)

        async def ask():
            with pytest.raises(ControlLost, match="the control connection ended"):
                await client.request("GET", "/slow")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await trio.testing.wait_all_tasks_blocked(0.01)
            client.close()
            client.close()
        with pytest.raises(ControlLost):
            await client.request("GET", "/next")


LONG = (
    b'HTTP/1.1 200 \r\nContent-Length: %d\r\n\r\n"' % (2 * MAX_BODY_BYTES) + b"x" * MAX_BODY_BYTES
)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"220 mail.example ESMTP\r\n\r\n", "not HTTP"),
        (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 9000, "not HTTP"),
        (b"HTTP/1.1 200 \r\nContent-Length: -4\r\n\r\n", "not HTTP"),
        (b"HTTP/1.1 200 \r\nContent-Length: 4\r\n\r\n{,,}", "the answer is not JSON"),
        (answer(200, b"[" * 40 + b"]" * 40), "nested deeper than 32"),
        (LONG, "over 1048576 bytes"),
    ],
)
async def test_answer_that_is_none_is_an_error_and_not_the_end(tmp_path, data, words):
    async with talking(tmp_path) as (api, client):
        api.on("GET", "/bad", raw(data))
        api.on("GET", "/good", 200, {})
        with pytest.raises(ControlError, match=words):
            await client.request("GET", "/bad")
        assert await client.request("GET", "/good") == {}


@pytest.mark.parametrize(
    "half", [b"", b"HTTP/1.1 20", b"HTTP/1.1 200 \r\nContent-Length: 9\r\n\r\n{"]
)
async def test_end_inside_of_an_answer_is_a_lost_connection(tmp_path, half):
    path = tmp_path / "api.sock"
    with trio.socket.socket(socket.AF_UNIX) as listener, closing(HttpApi(str(path))) as client:
        await listener.bind(str(path))
        listener.listen()

        async def cut():
            sock, _ = await listener.accept()
            with sock:
                await sock.recv(65536)
                await sock.send(half)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(cut)
            with pytest.raises(ControlLost):
                await client.request("GET", "/")


async def test_answer_may_arrive_byte_by_byte_and_close_the_connection(tmp_path):
    path = tmp_path / "api.sock"
    data = answer(200, {"a": [1]}).replace(b"keep-alive", b"close")
    with trio.socket.socket(socket.AF_UNIX) as listener, closing(HttpApi(str(path))) as client:
        await listener.bind(str(path))
        listener.listen()

        async def dribble():
            for _ in range(2):
                sock, _ = await listener.accept()
                with sock:
                    await sock.recv(65536)
                    for at in range(len(data)):
                        await sock.send(data[at : at + 1])
                        await trio.testing.wait_all_tasks_blocked()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(dribble)
            assert await client.request("GET", "/") == {"a": [1]}
            assert await client.request("GET", "/") == {"a": [1]}
