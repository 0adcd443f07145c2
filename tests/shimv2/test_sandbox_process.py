"""The Sandbox API of the real program: no VM, but the real `start`, socket, files and end."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from shimv2.pb import containerd_sandbox_pb2 as pb
from shimv2.pb import containerd_task_pb2 as task
from shimv2.pb.containerd_bootstrap_pb2 import BootstrapParams
from shimv2.task_service import SANDBOX_SERVICE, SERVICE_3
from tests.shimv2.test_start_and_delete import (
    NAMESPACE,
    Shim,
    call,
    connect,
    deleted,
    shim,
    shim_pid,
    state_of,
    wait_gone,
)
from ttrpc import Code

__all__ = ["shim"]

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="the shim runs as root"),
]


class Pod:
    """A pod's shim: a bundle without config.json, and one connection."""

    def __init__(self, shim: Shim) -> None:
        self.bundle = shim.bundle("pod", None)
        self._connection = connect(shim.start(self.bundle))
        self._stream = -1

    def ask(self, method: str, name: str = "pod", **fields: Any) -> tuple[int, Any]:
        """Return the status code and the answer."""
        stem = "Ping" if method == "PingSandbox" else method
        self._stream += 2
        request = getattr(pb, f"{stem}Request")(sandbox_id=name, **fields)
        answer = call(
            self._connection, method, request, stream=self._stream, service=SANDBOX_SERVICE
        )
        return answer.status.code, getattr(pb, f"{stem}Response").FromString(answer.payload)

    def close(self) -> None:
        self._connection.close()


def test_order_of_calls_is_kept_by_the_program(shim: Shim) -> None:
    pod = Pod(shim)
    assert pod.ask("StartSandbox")[0] == Code.NOT_FOUND
    assert pod.ask("WaitSandbox")[0] == Code.NOT_FOUND
    assert pod.ask("CreateSandbox", bundle_path="pod")[0] == Code.INVALID_ARGUMENT
    bundle = str(pod.bundle)
    assert pod.ask("CreateSandbox", bundle_path=bundle)[0] == Code.OK
    assert pod.ask("CreateSandbox", bundle_path=bundle)[0] == Code.ALREADY_EXISTS
    assert pod.ask("CreateSandbox", "other", bundle_path=bundle)[0] == Code.NOT_FOUND
    assert pod.ask("Platform")[1].platform.os == "linux"
    assert pod.ask("SandboxStatus")[1].state == "SANDBOX_NOTREADY"
    assert {"hostname", "hosts", "resolv.conf"} <= {path.name for path in pod.bundle.iterdir()}
    for _ in range(2):
        assert pod.ask("StopSandbox")[0] == Code.OK
    assert pod.ask("WaitSandbox")[1].exit_status == 0
    assert pod.ask("StartSandbox")[0] == Code.FAILED_PRECONDITION
    assert pod.ask("ShutdownSandbox")[0] == Code.OK
    pod.close()
    assert wait_gone(shim_pid(pod.bundle))
    assert list(shim.sockets.glob("*")) == []
    assert not state_of(shim, "pod").exists()
    assert deleted(shim, pod.bundle).exit_status == 137


def test_containerd_2_3_is_answered_version_3_and_served_it(shim: Shim) -> None:
    bundle = shim.bundle("one")
    params = BootstrapParams(
        instance_id="one",
        namespace=NAMESPACE,
        containerd_version="2.3.4",
        socket_dir=str(shim.sockets),
    ).SerializeToString()
    answer = json.loads(shim.run(bundle, "start", stdin=params).stdout)
    assert (answer["version"], answer["protocol"]) == (3, "ttrpc")
    # Of a later containerd's restart, and of the shim's own end: the plain address, as ever.
    assert (bundle / "address").read_text() == answer["address"]
    assert json.loads(shim.run(bundle, "start", stdin=params).stdout) == answer
    with connect(answer["address"]) as connection:
        found = call(connection, "Connect", task.ConnectRequest(id="one"), service=SERVICE_3)
    assert task.ConnectResponse.FromString(found.payload).version == "v3"
    assert Path(answer["address"].removeprefix("unix://")).exists()
