"""The guest agent as coroutines: one for each call of the agent's protocol.

One `AgentClient` is one connection. It translates errors and checks answers; what to call when, and
what to do when the agent is gone, is the caller's. All calls may run side by side. Cancelling one
drops its answer; the agent may have done the work all the same.

In every call a process is named by its container's id and by `exec_id`, which for the init process
is the container's id again.
Source: the Go shim's kata_agent.go does so; agents also take an empty exec_id.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, TypeVar

import trio

from agent_proto.details import AgentVersion, GuestDetails
from agent_proto.errors import (
    AgentMisbehaved,
    AgentStatus,
    AgentTimeout,
    AgentUnreachable,
    RequestTooLarge,
    guest_text,
)
from agent_proto.limits import (
    CHUNK_REPLY_OVERHEAD,
    MAX_CHUNK_BYTES,
    AgentTimeouts,
    reply_limit,
)
from agent_proto.pb import agent_pb2, csi_pb2, health_pb2, oci_pb2, types_pb2
from ttrpc.client import Call, Client
from ttrpc.errors import (
    CallTimeout,
    Code,
    ConnectionLost,
    LocalProtocolError,
    MessageTooLarge,
    RemoteProtocolError,
    RemoteStatus,
)

if TYPE_CHECKING:
    from google.protobuf.message import Message

    Reply = TypeVar("Reply", bound=Message)

AGENT_SERVICE: Final = "grpc.AgentService"
HEALTH_SERVICE: Final = "grpc.Health"

# The longest legal message is a stdio chunk; everything else has a limit below it in limits.py.
# Source: both upstream ttrpc stacks stop at 4 MiB.
MAX_MESSAGE_BYTES: Final = 4 << 20

# What a process's exit becomes when the guest reports something that is no exit status: the same
# as when the agent is lost.
_IMPOSSIBLE_STATUS: Final = 255

# RemoveContainer with a limit of its own: on top of it, for the answer's way.
_ANSWER_S: Final = 5.0


class AgentClient:
    """The agent behind the connected socket `sock`, which the client owns from here on.

    `run` must be going for calls to be answered.
    """

    def __init__(self, sock: socket.socket, *, timeouts: AgentTimeouts | None = None) -> None:
        self._timeouts = timeouts or AgentTimeouts()
        self._client = Client(sock, max_message_bytes=MAX_MESSAGE_BYTES)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve the connection until it ends, for whatever reason; then return.

        From then on every call, pending or new, raises AgentUnreachable.
        """
        await self._client.run(task_status=task_status)

    def close(self) -> None:
        """End the connection. Idempotent."""
        self._client.close()

    # --- Health ---

    async def check(self) -> None:
        """Return if the agent says that it serves, else raise AgentStatus(UNAVAILABLE)."""
        reply = await self._ask(
            "Check", health_pb2.CheckRequest(), health_pb2.HealthCheckResponse, HEALTH_SERVICE
        )
        if reply.status != health_pb2.HealthCheckResponse.ServingStatus.SERVING:
            raise AgentStatus(Code.UNAVAILABLE, f"not serving (status {reply.status})", "Check")

    async def version(self) -> AgentVersion:
        """Return the versions the agent claims for its API and itself."""
        reply = await self._ask(
            "Version", health_pb2.CheckRequest(), health_pb2.VersionCheckResponse, HEALTH_SERVICE
        )
        return AgentVersion.from_reply(reply)

    # --- Sandbox ---

    async def create_sandbox(self, request: agent_pb2.CreateSandboxRequest) -> None:
        """Set the guest up for containers. Once in an agent's life."""
        await self._do("CreateSandbox", request)

    async def destroy_sandbox(self) -> None:
        """Take the sandbox down. The agent may then end itself and the connection."""
        await self._do("DestroySandbox", agent_pb2.DestroySandboxRequest())

    # --- Containers ---

    async def create_container(self, request: agent_pb2.CreateContainerRequest) -> None:
        """Make a container; its init process waits for `start_container`."""
        await self._do("CreateContainer", request)

    async def start_container(self, cid: str) -> None:
        """Let the init process run."""
        await self._do("StartContainer", agent_pb2.StartContainerRequest(container_id=cid))

    async def remove_container(self, cid: str, timeout_s: int = 0) -> None:
        """Kill what is left of a container and forget it.

        The agent gives up after `timeout_s` seconds, or with 0 never: then only this side does.
        """
        request = agent_pb2.RemoveContainerRequest(container_id=cid, timeout=timeout_s)
        limit_s = timeout_s + _ANSWER_S if timeout_s else self._timeouts.remove_container_s
        await self._call(AGENT_SERVICE, "RemoveContainer", request, limit_s)

    async def update_container(self, cid: str, resources: oci_pb2.LinuxResources) -> None:
        """Change a container's cgroup limits."""
        request = agent_pb2.UpdateContainerRequest(container_id=cid, resources=resources)
        await self._do("UpdateContainer", request)

    async def pause_container(self, cid: str) -> None:
        """Freeze all processes of a container."""
        await self._do("PauseContainer", agent_pb2.PauseContainerRequest(container_id=cid))

    async def resume_container(self, cid: str) -> None:
        """Thaw what `pause_container` froze."""
        await self._do("ResumeContainer", agent_pb2.ResumeContainerRequest(container_id=cid))

    async def stats_container(self, cid: str) -> agent_pb2.StatsContainerResponse:
        """Return the container's cgroup statistics. Guest's numbers: not for host decisions."""
        request = agent_pb2.StatsContainerRequest(container_id=cid)
        return await self._ask("StatsContainer", request, agent_pb2.StatsContainerResponse)

    async def get_oom_event(self) -> str:
        """Wait for the guest's OOM killer to hit; return the id the guest gives. No deadline.

        The guest may name any container: only an exact, live id of this sandbox may be believed.
        """
        request = agent_pb2.GetOOMEventRequest()
        return (await self._ask("GetOOMEvent", request, agent_pb2.OOMEvent)).container_id

    async def get_diagnostic_data(self, cid: str, log_type: str = "termination_log") -> str:
        """Return what the agent kept of a container for `log_type`."""
        request = agent_pb2.GetDiagnosticDataRequest(container_id=cid, log_type=log_type)
        reply = await self._ask("GetDiagnosticData", request, agent_pb2.GetDiagnosticDataResponse)
        return reply.data

    # --- Processes ---

    async def exec_process(self, request: agent_pb2.ExecProcessRequest) -> None:
        """Run another process in a container; it is running when this returns."""
        await self._do("ExecProcess", request)

    async def signal_process(self, cid: str, exec_id: str, signal: int) -> None:
        """Send a signal. An empty `exec_id` with SIGKILL reaches all of the container."""
        request = agent_pb2.SignalProcessRequest(container_id=cid, exec_id=exec_id, signal=signal)
        await self._do("SignalProcess", request)

    async def wait_process(self, cid: str, exec_id: str) -> int:
        """Wait for a process to exit; return its status, 0 to 255. No deadline.

        The agent answers once and forgets the process; a second wait raises AgentStatus. A status
        that no process can have becomes 255.
        """
        request = agent_pb2.WaitProcessRequest(container_id=cid, exec_id=exec_id)
        status = (await self._ask("WaitProcess", request, agent_pb2.WaitProcessResponse)).status
        return status if 0 <= status <= 255 else _IMPOSSIBLE_STATUS

    async def write_stdin(self, cid: str, exec_id: str, data: bytes) -> int:
        """Write at most MAX_CHUNK_BYTES to a process; return how many it took. No deadline.

        No data means the end of input, and 0 comes back.
        """
        _check_chunk(len(data))
        request = agent_pb2.WriteStreamRequest(container_id=cid, exec_id=exec_id, data=data)
        taken = (await self._ask("WriteStdin", request, agent_pb2.WriteStreamResponse)).len
        if taken > len(data) or (data and not taken):
            raise AgentMisbehaved("WriteStdin", f"took {taken} of {len(data)} bytes")
        return taken

    async def read_stdout(self, cid: str, exec_id: str, max_bytes: int = MAX_CHUNK_BYTES) -> bytes:
        """Wait for output; return 1 to `max_bytes` bytes of it, or none at its end. No deadline."""
        return await self._read("ReadStdout", cid, exec_id, max_bytes)

    async def read_stderr(self, cid: str, exec_id: str, max_bytes: int = MAX_CHUNK_BYTES) -> bytes:
        """As `read_stdout`, of the other stream."""
        return await self._read("ReadStderr", cid, exec_id, max_bytes)

    async def close_stdin(self, cid: str, exec_id: str) -> None:
        """End a process's input."""
        request = agent_pb2.CloseStdinRequest(container_id=cid, exec_id=exec_id)
        await self._do("CloseStdin", request)

    async def tty_win_resize(self, cid: str, exec_id: str, rows: int, columns: int) -> None:
        """Tell a process's terminal its size."""
        request = agent_pb2.TtyWinResizeRequest(
            container_id=cid, exec_id=exec_id, row=rows, column=columns
        )
        await self._do("TtyWinResize", request)

    # --- Network ---

    async def update_interface(self, interface: types_pb2.Interface) -> types_pb2.Interface:
        """Configure the link with `interface.hwAddr`; return what the agent made of it."""
        request = agent_pb2.UpdateInterfaceRequest(interface=interface)
        return await self._ask("UpdateInterface", request, types_pb2.Interface)

    async def update_routes(self, routes: Sequence[types_pb2.Route]) -> agent_pb2.Routes:
        """Replace the guest's routes; return those it has then."""
        request = agent_pb2.UpdateRoutesRequest(routes=agent_pb2.Routes(Routes=routes))
        return await self._ask("UpdateRoutes", request, agent_pb2.Routes)

    async def do_in_order(self, *requests: Message) -> None:
        """Send several requests at once, and wait until all are done.

        Only for an agent that is known to take those of the network and CreateSandbox in the order
        in which they come (`ReadinessListener` hears from such a one); their answers say no more
        than that they are done. Raises the first refusal when its answer is there; the requests
        after it may have been carried out all the same.
        """
        methods = [type(request).__name__.removesuffix("Request") for request in requests]
        calls = [
            Call(AGENT_SERVICE, method, request.SerializeToString(), self._timeouts.of(method))
            for method, request in zip(methods, requests, strict=True)
        ]
        with _translated(methods[0]):
            pending = self._client.begin(*calls)
        try:
            for method, one in zip(methods, pending, strict=True):
                with _translated(method):
                    answer = await one.answer()
                _check_length(method, answer)
        finally:
            for one in pending:
                one.forget()

    async def list_interfaces(self) -> agent_pb2.Interfaces:
        """Return the guest's links."""
        request = agent_pb2.ListInterfacesRequest()
        return await self._ask("ListInterfaces", request, agent_pb2.Interfaces)

    async def list_routes(self) -> agent_pb2.Routes:
        """Return the guest's routes."""
        return await self._ask("ListRoutes", agent_pb2.ListRoutesRequest(), agent_pb2.Routes)

    async def add_arp_neighbors(self, neighbors: Sequence[types_pb2.ARPNeighbor]) -> None:
        """Add fixed entries to the guest's neighbour table."""
        table = agent_pb2.ARPNeighbors(ARPNeighbors=neighbors)
        await self._do("AddARPNeighbors", agent_pb2.AddARPNeighborsRequest(neighbors=table))

    async def get_ip_tables(self, *, ipv6: bool) -> bytes:
        """Return the guest's packet filter as text of iptables-save."""
        request = agent_pb2.GetIPTablesRequest(is_ipv6=ipv6)
        return (await self._ask("GetIPTables", request, agent_pb2.GetIPTablesResponse)).data

    async def set_ip_tables(self, data: bytes, *, ipv6: bool) -> bytes:
        """Replace the guest's packet filter; return what the tool printed."""
        request = agent_pb2.SetIPTablesRequest(is_ipv6=ipv6, data=data)
        return (await self._ask("SetIPTables", request, agent_pb2.SetIPTablesResponse)).data

    # --- Files and volumes ---

    async def copy_file(self, request: agent_pb2.CopyFileRequest) -> None:
        """Write one piece of a file, or make a directory or a symbolic link, in the guest."""
        await self._do("CopyFile", request)

    async def update_ephemeral_mounts(self, storages: Sequence[agent_pb2.Storage]) -> None:
        """Remount memory-backed volumes with new sizes."""
        request = agent_pb2.UpdateEphemeralMountsRequest(storages=storages)
        await self._do("UpdateEphemeralMounts", request)

    async def remove_stale_virtiofs_share_mounts(self) -> None:
        """Unmount what the host has taken out of the share."""
        request = agent_pb2.RemoveStaleVirtiofsShareMountsRequest()
        await self._do("RemoveStaleVirtiofsShareMounts", request)

    async def get_volume_stats(self, guest_path: str) -> csi_pb2.VolumeStatsResponse:
        """Return how full a volume is, by its path in the guest."""
        request = agent_pb2.VolumeStatsRequest(volume_guest_path=guest_path)
        return await self._ask("GetVolumeStats", request, csi_pb2.VolumeStatsResponse)

    async def resize_volume(self, guest_path: str, size_bytes: int) -> None:
        """Grow a volume's file system to the size its device has got."""
        request = agent_pb2.ResizeVolumeRequest(volume_guest_path=guest_path, size=size_bytes)
        await self._do("ResizeVolume", request)

    # --- The machine ---

    async def get_guest_details(self) -> GuestDetails:
        """Return what the agent knows of its machine and itself, range-checked."""
        request = agent_pb2.GuestDetailsRequest(mem_block_size=True, mem_hotplug_probe=True)
        reply = await self._ask("GetGuestDetails", request, agent_pb2.GuestDetailsResponse)
        return GuestDetails.from_reply(reply)

    async def online_cpu_mem(self, *, wait: bool, nb_cpus: int = 0, cpu_only: bool = False) -> None:
        """Bring hot-plugged CPUs and memory into use; with `wait`, return when they are."""
        request = agent_pb2.OnlineCPUMemRequest(wait=wait, nb_cpus=nb_cpus, cpu_only=cpu_only)
        await self._do("OnlineCPUMem", request)

    async def mem_hotplug_by_probe(self, addresses: Sequence[int]) -> None:
        """Announce memory at these physical addresses to the guest's kernel."""
        request = agent_pb2.MemHotplugByProbeRequest(memHotplugProbeAddr=addresses)
        await self._do("MemHotplugByProbe", request)

    async def add_swap(self, pci_path: Sequence[int]) -> None:
        """Swap on the block device at this chain of PCI slots."""
        await self._do("AddSwap", agent_pb2.AddSwapRequest(PCIPath=pci_path))

    async def add_swap_path(self, guest_path: str) -> None:
        """Swap on the block device at this path of the guest."""
        await self._do("AddSwapPath", agent_pb2.AddSwapPathRequest(path=guest_path))

    async def reseed_random_dev(self, data: bytes) -> None:
        """Mix fresh random bytes into the guest's pool, e.g. after it came from a template."""
        await self._do("ReseedRandomDev", agent_pb2.ReseedRandomDevRequest(data=data))

    async def set_guest_date_time(self, seconds: int, microseconds: int) -> None:
        """Set the guest's clock to this time since the epoch."""
        request = agent_pb2.SetGuestDateTimeRequest(Sec=seconds, Usec=microseconds)
        await self._do("SetGuestDateTime", request)

    async def get_metrics(self) -> str:
        """Return the agent's metrics as Prometheus text: the guest's words, to be parsed."""
        request = agent_pb2.GetMetricsRequest()
        return (await self._ask("GetMetrics", request, agent_pb2.Metrics)).metrics

    async def mem_agent_memcg_set(self, config: agent_pb2.MemAgentMemcgConfig) -> None:
        """Configure how the guest takes idle memory back from containers."""
        await self._do("MemAgentMemcgSet", config)

    async def mem_agent_compact_set(self, config: agent_pb2.MemAgentCompactConfig) -> None:
        """Configure when the guest compacts its memory."""
        await self._do("MemAgentCompactSet", config)

    async def set_policy(self, policy: str) -> None:
        """Replace the policy by which the agent judges calls. Rego text."""
        await self._do("SetPolicy", agent_pb2.SetPolicyRequest(policy=policy))

    # --- What all calls share ---

    async def _read(self, method: str, cid: str, exec_id: str, max_bytes: int) -> bytes:
        _check_chunk(max_bytes, least=1)
        request = agent_pb2.ReadStreamRequest(container_id=cid, exec_id=exec_id, len=max_bytes)
        payload = await self._call(
            AGENT_SERVICE, method, request, None, max_bytes + CHUNK_REPLY_OVERHEAD
        )
        data = _decode(method, payload, agent_pb2.ReadStreamResponse).data
        if len(data) > max_bytes:
            raise AgentMisbehaved(method, f"sent {len(data)} bytes where {max_bytes} were asked")
        return data

    async def _do(self, method: str, request: Message) -> None:
        # The answer is google.protobuf.Empty: there is nothing in it to decode.
        await self._call(AGENT_SERVICE, method, request, self._timeouts.of(method))

    async def _ask(
        self, method: str, request: Message, reply: type[Reply], service: str = AGENT_SERVICE
    ) -> Reply:
        payload = await self._call(service, method, request, self._timeouts.of(method))
        return _decode(method, payload, reply)

    async def _call(
        self,
        service: str,
        method: str,
        request: Message,
        limit_s: float | None,
        max_reply_bytes: int | None = None,
    ) -> bytes:
        """Make one call; return the answer's bytes, not longer than the method's may be."""
        with _translated(method):
            payload = request.SerializeToString()
            answer = await self._client.call(service, method, payload, timeout_s=limit_s)
        _check_length(method, answer, max_reply_bytes)
        return answer


@contextmanager
def _translated(method: str) -> Iterator[None]:
    """Raise what a call of `method` raises as an AgentError."""
    try:
        yield
    except RemoteStatus as error:
        # DEADLINE_EXCEEDED too: something in the guest took too long, and its words say what.
        raise AgentStatus(error.code, error.message, method) from error
    except CallTimeout as error:
        raise AgentTimeout(method, error.timeout_s) from error
    except RemoteProtocolError as error:
        raise AgentMisbehaved(method, guest_text(str(error))) from error
    except MessageTooLarge as error:
        raise RequestTooLarge(method, error.length, error.limit) from error
    except (ConnectionLost, LocalProtocolError) as error:
        # LocalProtocolError: thousands of calls are waiting for a guest that answers none.
        raise AgentUnreachable(method, guest_text(str(error))) from error


def _check_length(method: str, answer: bytes, max_bytes: int | None = None) -> None:
    limit = reply_limit(method) if max_bytes is None else max_bytes
    if len(answer) > limit:
        raise AgentMisbehaved(method, f"answer of {len(answer)} bytes, {limit} allowed")


def _check_chunk(size: int, least: int = 0) -> None:
    if not least <= size <= MAX_CHUNK_BYTES:
        raise ValueError(f"a chunk of {size} bytes is not within {least} and {MAX_CHUNK_BYTES}")


def _decode(method: str, payload: bytes, reply: type[Reply]) -> Reply:
    try:
        return reply.FromString(payload)
    except Exception as error:
        # Not only DecodeError: hostile bytes may also end in RecursionError, MemoryError or
        # UnicodeDecodeError, and none of them may get past the call that caused it.
        raise AgentMisbehaved(method, f"undecodable answer of {len(payload)} bytes") from error
