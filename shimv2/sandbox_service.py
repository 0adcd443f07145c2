"""containerd's Sandbox API: a pod whose VM is there before any container, and outlives them all.

    (none) ──Create──> created ──Start──> ready ──Stop, VM's end──> stopped ──Shutdown──> (exit)

The VM is made at Start, by the same steps as at the Create of a pause container, and taken down by
the same; the pod's containers are tasks that join it. Until Create the sandbox is NotFound for all
but Platform and Shutdown, which containerd sends after a Create that failed. Imported at the first
call: with the sandboxer `podsandbox` nobody makes one.
Source: containerd api/runtime/sandbox/v1/sandbox.proto, plugins/sandbox/controller.go.
"""

from __future__ import annotations

import json
import os
import stat
import time
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Final

import trio

from shimv2 import stats
from shimv2.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound, Unavailable
from shimv2.pb import containerd_sandbox_pb2 as pb
from shimv2.pod_spec import member_bundle, pod_bundle, pod_config, pod_files
from shimv2.process import KILLED_STATUS, ProcessExit, exit_now
from shimv2.runtime_options import config_path_of_start
from shimv2.sandbox_creation import Creation
from shimv2.start import write_file
from shimv2.stdio import parse_stdio
from shimv2.task_events import set_timestamp

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from shimv2.bootstrap import ShimInvocation
    from shimv2.bundle import Bundle
    from shimv2.sandbox import Sandbox

    Method = Callable[[bytes, float], Awaitable[bytes]]

_EMPTY: Final = b""
_MAX_HOST_FILE_BYTES: Final = 64 << 10
# Go's names, which containerd looks up images by.
_ARCHITECTURES: Final = {"x86_64": "amd64", "aarch64": "arm64"}


class _State(Enum):
    CREATED = "created"
    STARTING = "starting"
    READY = "ready"
    STOPPED = "stopped"


class SandboxService:
    """The one pod of a shim; `call` serves a method by its name."""

    def __init__(
        self, sandbox: Sandbox, invocation: ShimInvocation, exit_requested: trio.Event
    ) -> None:
        self._sandbox = sandbox
        self._invocation = invocation
        self._exit_requested = exit_requested
        self._pod: Bundle | None = None
        self._config_path: str | None = None
        self._state = _State.CREATED
        self._started_ns = 0
        self._booting = trio.CancelScope()
        self._boot_over = trio.Event()
        self._is_asked_to_stop = False
        self._exit: ProcessExit | None = None
        self._exited = trio.Event()
        self._methods: dict[str, Method] = {
            "CreateSandbox": self._create,
            "StartSandbox": self._start,
            "WaitSandbox": self._wait,
            "StopSandbox": self._stop,
            "ShutdownSandbox": self._shutdown,
            "Platform": self._platform,
            "PingSandbox": self._ping,
            "SandboxStatus": self._status,
            "SandboxMetrics": self._metrics,
        }

    @property
    def has_pod(self) -> bool:
        """Whether the shim has something to live for besides its containers."""
        return self._pod is not None

    def adapt(self, bundle: Bundle) -> Bundle:
        """Give a container's bundle what it has of the pod. Raises `ShimError`."""
        if self._pod is None:
            return bundle
        return member_bundle(bundle, self._pod, self._sandbox.neighbours())

    async def call(self, method: str, payload: bytes, limit_s: float) -> bytes:
        """Serve one request; `limit_s` is how long its client waits. Raises `ShimError`."""
        return await self._methods[method](payload, limit_s)

    # --- Its life ---

    async def _create(self, payload: bytes, _limit_s: float) -> bytes:
        request = pb.CreateSandboxRequest.FromString(payload)
        self._check_id(request.sandbox_id)
        if self._pod is not None:
            raise AlreadyExists(f"sandbox {request.sandbox_id} already exists")
        if "\0" in request.bundle_path or not request.bundle_path.startswith("/"):
            raise InvalidArgument(f"bundle {request.bundle_path!r} is not an absolute path")
        config = pod_config(request.options)
        pod = pod_bundle(
            config,
            sandbox_id=request.sandbox_id,
            namespace=self._invocation.namespace,
            path=Path(request.bundle_path),
            netns_path=request.netns_path,
            annotations=request.annotations,
        )
        # The runtime's options come with `start` alone.
        self._config_path = config_path_of_start(self._invocation.options)
        files = pod_files(
            config,
            pod,
            host_hosts=_host_file("/etc/hosts"),
            host_resolv_conf=_host_file("/etc/resolv.conf"),
        )
        for name, text in files.items():
            write_file(request.bundle_path, name, text)  # containerd removes the directory
        self._pod = pod
        await trio.lowlevel.checkpoint()
        return _EMPTY

    async def _start(self, payload: bytes, limit_s: float) -> bytes:
        pod = self._known(pb.StartSandboxRequest.FromString(payload).sandbox_id)
        if self._state is not _State.CREATED:
            raise FailedPrecondition(
                f"sandbox {pod.sandbox_id} is {self._state.value}: only one that is created can be "
                "started"
            )
        self._state = _State.STARTING
        self._boot_over = trio.Event()
        try:
            with trio.CancelScope() as self._booting:
                await self._sandbox.found(self._creation(pod, limit_s))
            if self._booting.cancelled_caught:
                phase = self._sandbox.timeline.phase
                raise Unavailable(f"sandbox {pod.sandbox_id} was stopped while {phase}")
            self._state = _State.READY
            self._started_ns = time.time_ns()
            self._sandbox.start_job(self._follow, self._sandbox.ended)
        finally:
            if self._state is _State.STARTING:
                self._state = _State.CREATED
            self._boot_over.set()
        response = pb.StartSandboxResponse(pid=self._sandbox.reported_pid)
        set_timestamp(response.created_at, self._started_ns)
        return response.SerializeToString()

    def _creation(self, pod: Bundle, limit_s: float) -> Creation:
        return Creation(
            bundle=pod,
            stdio=parse_stdio("", "", "", terminal=False),
            rootfs=(),
            config_path=self._config_path,
            limit_s=limit_s,
        )

    async def _follow(self, ended: trio.Event) -> None:
        """Notice the VM's end. One that was asked for is told when everything is given back."""
        await ended.wait()
        if not self._is_asked_to_stop:
            self._settle(KILLED_STATUS, await self._sandbox.explain())

    async def _wait(self, payload: bytes, _limit_s: float) -> bytes:
        self._known(pb.WaitSandboxRequest.FromString(payload).sandbox_id)
        await self._exited.wait()
        assert self._exit is not None
        response = pb.WaitSandboxResponse(exit_status=self._exit.status)
        set_timestamp(response.exited_at, self._exit.at_ns)
        return response.SerializeToString()

    async def _stop(self, payload: bytes, _limit_s: float) -> bytes:
        self._known(pb.StopSandboxRequest.FromString(payload).sandbox_id)
        await self._end()
        return _EMPTY

    async def _shutdown(self, payload: bytes, _limit_s: float) -> bytes:
        sandbox_id = pb.ShutdownSandboxRequest.FromString(payload).sandbox_id
        self._check_id(sandbox_id)
        if self._pod is not None:
            await self._end()
        elif self._sandbox.containers:
            raise FailedPrecondition(
                f"sandbox {sandbox_id} was not made by the Sandbox API and has containers"
            )
        self._exit_requested.set()
        return _EMPTY

    async def _end(self) -> None:
        """Whatever it is at: let it be stopped with everything given back. Idempotent."""
        self._booting.cancel()
        if self._state is _State.STARTING:
            await self._boot_over.wait()
        if not self._sandbox.ended.is_set():
            self._is_asked_to_stop = True
        if self._state is not _State.CREATED:
            await self._sandbox.end("the sandbox was stopped")
        self._settle(0)

    def _settle(self, status: int, reason: str = "") -> None:
        self._state = _State.STOPPED
        if self._exit is None:
            self._exit = exit_now(status, reason)
            self._exited.set()

    # --- What is known about it ---

    async def _platform(self, _payload: bytes, _limit_s: float) -> bytes:
        machine = os.uname().machine
        response = pb.PlatformResponse()
        response.platform.os = "linux"
        response.platform.architecture = _ARCHITECTURES.get(machine, machine)
        await trio.lowlevel.checkpoint()
        return response.SerializeToString()

    async def _ping(self, payload: bytes, _limit_s: float) -> bytes:
        pod = self._known(pb.PingRequest.FromString(payload).sandbox_id)
        if self._state is not _State.READY:
            raise Unavailable(f"sandbox {pod.sandbox_id} is {self._state.value}{self._because()}")
        await trio.lowlevel.checkpoint()
        return _EMPTY

    async def _status(self, payload: bytes, _limit_s: float) -> bytes:
        request = pb.SandboxStatusRequest.FromString(payload)
        pod = self._known(request.sandbox_id)
        is_ready = self._state is _State.READY
        response = pb.SandboxStatusResponse(
            sandbox_id=pod.sandbox_id,
            pid=self._sandbox.reported_pid if is_ready else 0,
            state="SANDBOX_READY" if is_ready else "SANDBOX_NOTREADY",
        )
        if self._started_ns:
            set_timestamp(response.created_at, self._started_ns)
        if self._exit is not None:
            set_timestamp(response.exited_at, self._exit.at_ns)
        if request.verbose:
            response.info["info"] = json.dumps(self._info(response.pid))
        await trio.lowlevel.checkpoint()
        return response.SerializeToString()

    async def _metrics(self, payload: bytes, _limit_s: float) -> bytes:
        pod = self._known(pb.SandboxMetricsRequest.FromString(payload).sandbox_id)
        found = self._sandbox.host_statistics()
        if found is None:
            raise FailedPrecondition(
                f"sandbox {pod.sandbox_id} is {self._state.value}, or the host has no cgroups: "
                "nothing counts what it uses"
            )
        type_url, value = stats.metrics(
            found, unified=stats.host_is_unified(), network=self._sandbox.network_statistics()
        )
        response = pb.SandboxMetricsResponse()
        response.metrics.id = pod.sandbox_id
        set_timestamp(response.metrics.timestamp, time.time_ns())
        response.metrics.data.type_url = type_url
        response.metrics.data.value = value
        await trio.lowlevel.checkpoint()
        return response.SerializeToString()

    def _info(self, pid: int) -> dict[str, object]:
        # Names of containerd's own SandboxInfo: newer ones pass nothing else on.
        return {"pid": pid, "processStatus": f"{self._state.value}{self._because()}"}

    def _because(self) -> str:
        return f": {self._exit.reason}" if self._exit is not None and self._exit.reason else ""

    # --- Whom it is about ---

    def _check_id(self, sandbox_id: str) -> None:
        own = self._invocation.sandbox_id
        if sandbox_id != own:
            raise NotFound(f"sandbox {sandbox_id[:100]!r} not found: this shim has {own}")

    def _known(self, sandbox_id: str) -> Bundle:
        self._check_id(sandbox_id)
        if self._pod is None:
            raise NotFound(f"sandbox {sandbox_id} not found: it has not been created")
        return self._pod


def _host_file(path: str) -> str:
    """A small file of the host's; empty where there is none."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return ""
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return ""
        return file.read(_MAX_HOST_FILE_BYTES).decode("utf-8", "replace")
