"""Measures a State-like call against our server: `python -m tests.bench.ttrpc_latency [calls]`.

The client is another process with blocking I/O and no decoding, so that the figure is the server's.
Prints one JSON object: microseconds for a handler answered inline and for one with a task.
"""

from __future__ import annotations

import gc
import json
import os
import socket
import sys
import time
from typing import Final

import trio

from shimv2.pb import containerd_process_pb2 as process_pb
from shimv2.pb.containerd_task_pb2 import StateRequest, StateResponse
from tests.ttrpc.wire import HEADER, frame
from ttrpc.frames import REQUEST
from ttrpc.pb import ttrpc_pb2 as pb
from ttrpc.server import Server

SERVICE: Final = "containerd.task.v2.Task"
ID: Final = "0123456789abcdef" * 4
QUANTILES: Final = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p99.9": 0.999}
WARM_UP: Final = 500


def state(_context, payload: bytes) -> bytes:
    request = StateRequest.FromString(payload)
    return StateResponse(
        id=request.id,
        bundle=f"/run/bundles/{ID}",
        pid=1234,
        status=process_pb.RUNNING,
        stdout="/run/stdout",
    ).SerializeToString()


async def state_by_task(context, payload: bytes) -> bytes:
    return state(context, payload)


def measure(sock: socket.socket, method: str, first_id: int, calls: int) -> dict[str, float]:
    metadata = [pb.KeyValue(key="containerd-namespace-ttrpc", value="k8s.io")]
    payload = StateRequest(id=ID).SerializeToString()
    message = pb.Request(service=SERVICE, method=method, payload=payload, metadata=metadata)
    body = message.SerializeToString()
    took = []
    for index in range(calls):
        data = frame(first_id + 2 * index, REQUEST, 0, body)
        start = time.perf_counter_ns()
        sock.send(data)
        answer = sock.recv(65536)
        took.append(time.perf_counter_ns() - start)
        assert HEADER.unpack_from(answer)[0] == len(answer) - HEADER.size
    took = sorted(took[WARM_UP:])
    return {name: round(took[int(len(took) * q)] / 1000, 1) for name, q in QUANTILES.items()}


def main() -> None:
    calls = int(sys.argv[1]) if len(sys.argv) > 1 else 20_000
    ours, theirs = socket.socketpair()
    if child := os.fork():
        theirs.close()
        gc.freeze()
        server = Server({SERVICE: {"Inline": state, "Task": state_by_task}})
        trio.run(server.serve_connection, ours)
        os.waitpid(child, 0)
        return
    ours.close()
    figures = {
        "inline_us": measure(theirs, "Inline", 1, calls),
        "task_us": measure(theirs, "Task", 2 * calls + 1, calls),
    }
    print(json.dumps(figures), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
