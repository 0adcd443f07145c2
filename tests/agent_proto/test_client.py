"""The client against an agent that behaves: every call there and back."""

from __future__ import annotations

import re
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from agent_proto.client import AgentClient
from agent_proto.details import AgentVersion
from agent_proto.errors import AgentStatus
from agent_proto.limits import MAX_CHUNK_BYTES, UNLIMITED, AgentTimeouts
from agent_proto.pb import agent_pb2, csi_pb2, health_pb2, oci_pb2, types_pb2
from agent_proto.vsock import HybridVsock, dial
from tests.fakes.fake_agent import FakeAgent
from tests.fakes.fake_process import CAT, SLEEP, Program
from ttrpc.errors import Code

STRING_USER = agent_pb2.StringUser(uid="0", gid="0")


@asynccontextmanager
async def connected(
    directory: Path, timeouts: AgentTimeouts | None = None
) -> AsyncIterator[tuple[AgentClient, FakeAgent]]:
    """A fake agent and a client of it, both running."""
    agent = FakeAgent(directory / "v")
    async with trio.open_nursery() as nursery:
        await nursery.start(agent.serve)
        sock = await dial(HybridVsock(agent.uds_path), timeout_s=30)
        client = AgentClient(sock, timeouts=timeouts)
        await nursery.start(client.run)
        yield client, agent
        client.close()
        nursery.cancel_scope.cancel()


async def create(client: AgentClient, cid: str = "c1") -> None:
    await client.create_container(agent_pb2.CreateContainerRequest(container_id=cid, exec_id=cid))


CALLS = {
    "Check": lambda client: client.check(),
    "Version": lambda client: client.version(),
    "CreateSandbox": lambda client: client.create_sandbox(
        agent_pb2.CreateSandboxRequest(hostname="pod", dns=["nameserver 1"], sandbox_id="s1")
    ),
    "DestroySandbox": lambda client: client.destroy_sandbox(),
    "CreateContainer": lambda client: create(client, "c2"),
    "StartContainer": lambda client: client.start_container("c1"),
    "RemoveContainer": lambda client: client.remove_container("c1", 7),
    "UpdateContainer": lambda client: client.update_container(
        "c1", oci_pb2.LinuxResources(Pids=oci_pb2.LinuxPids(Limit=5))
    ),
    "PauseContainer": lambda client: client.pause_container("c1"),
    "ResumeContainer": lambda client: client.resume_container("c1"),
    "StatsContainer": lambda client: client.stats_container("c1"),
    "GetOOMEvent": lambda client: client.get_oom_event(),
    "GetDiagnosticData": lambda client: client.get_diagnostic_data("c1"),
    "ExecProcess": lambda client: client.exec_process(
        agent_pb2.ExecProcessRequest(container_id="c1", exec_id="e1", string_user=STRING_USER)
    ),
    "SignalProcess": lambda client: client.signal_process("c1", "c1", signal.SIGTERM),
    "WaitProcess": lambda client: client.wait_process("c1", "done"),
    "WriteStdin": lambda client: client.write_stdin("c1", "c1", b"in"),
    "ReadStdout": lambda client: client.read_stdout("c1", "done", 10),
    "ReadStderr": lambda client: client.read_stderr("c1", "done", 10),
    "CloseStdin": lambda client: client.close_stdin("c1", "c1"),
    "TtyWinResize": lambda client: client.tty_win_resize("c1", "c1", 24, 80),
    "UpdateInterface": lambda client: client.update_interface(
        types_pb2.Interface(name="eth0", hwAddr="02:00:00:00:00:01", mtu=1500)
    ),
    "UpdateRoutes": lambda client: client.update_routes([types_pb2.Route(dest="10.0.0.0/8")]),
    "ListInterfaces": lambda client: client.list_interfaces(),
    "ListRoutes": lambda client: client.list_routes(),
    "AddARPNeighbors": lambda client: client.add_arp_neighbors(
        [types_pb2.ARPNeighbor(device="eth0", lladdr="02:00:00:00:00:02", state=0x80)]
    ),
    "GetIPTables": lambda client: client.get_ip_tables(ipv6=True),
    "SetIPTables": lambda client: client.set_ip_tables(b"*nat", ipv6=False),
    "CopyFile": lambda client: client.copy_file(
        agent_pb2.CopyFileRequest(path="/run/x", file_size=3, data=b"abc")
    ),
    "UpdateEphemeralMounts": lambda client: client.update_ephemeral_mounts(
        [agent_pb2.Storage(driver="ephemeral", mount_point="/m")]
    ),
    "RemoveStaleVirtiofsShareMounts": lambda client: client.remove_stale_virtiofs_share_mounts(),
    "GetVolumeStats": lambda client: client.get_volume_stats("/volume"),
    "ResizeVolume": lambda client: client.resize_volume("/volume", 1 << 30),
    "GetGuestDetails": lambda client: client.get_guest_details(),
    "OnlineCPUMem": lambda client: client.online_cpu_mem(wait=True, nb_cpus=2, cpu_only=True),
    "MemHotplugByProbe": lambda client: client.mem_hotplug_by_probe([1 << 32]),
    "AddSwap": lambda client: client.add_swap([2, 3]),
    "AddSwapPath": lambda client: client.add_swap_path("/dev/vdb"),
    "ReseedRandomDev": lambda client: client.reseed_random_dev(b"noise"),
    "SetGuestDateTime": lambda client: client.set_guest_date_time(1_000, 5),
    "GetMetrics": lambda client: client.get_metrics(),
    "MemAgentMemcgSet": lambda client: client.mem_agent_memcg_set(
        agent_pb2.MemAgentMemcgConfig(disabled=False, swappiness_max=50)
    ),
    "MemAgentCompactSet": lambda client: client.mem_agent_compact_set(
        agent_pb2.MemAgentCompactConfig(compact_order=9)
    ),
    "SetPolicy": lambda client: client.set_policy("package agent_policy"),
}

# What arrives at the agent and what the caller gets back, where it is more than nothing.
REQUESTS = {
    "CreateSandbox": {"hostname": "pod", "sandbox_id": "s1"},
    "CreateContainer": {"container_id": "c2", "exec_id": "c2"},
    "StartContainer": {"container_id": "c1"},
    "RemoveContainer": {"container_id": "c1", "timeout": 7},
    "ExecProcess": {"container_id": "c1", "exec_id": "e1", "string_user": STRING_USER},
    "SignalProcess": {"container_id": "c1", "exec_id": "c1", "signal": 15},
    "WaitProcess": {"container_id": "c1", "exec_id": "done"},
    "WriteStdin": {"container_id": "c1", "exec_id": "c1", "data": b"in"},
    "ReadStdout": {"container_id": "c1", "exec_id": "done", "len": 10},
    "TtyWinResize": {"container_id": "c1", "exec_id": "c1", "row": 24, "column": 80},
    "GetDiagnosticData": {"container_id": "c1", "log_type": "termination_log"},
    "GetIPTables": {"is_ipv6": True},
    "SetIPTables": {"is_ipv6": False, "data": b"*nat"},
    "ResizeVolume": {"volume_guest_path": "/volume", "size": 1 << 30},
    "GetGuestDetails": {"mem_block_size": True, "mem_hotplug_probe": True},
    "OnlineCPUMem": {"wait": True, "nb_cpus": 2, "cpu_only": True},
    "MemHotplugByProbe": {"memHotplugProbeAddr": [1 << 32]},
    "AddSwap": {"PCIPath": [2, 3]},
    "AddSwapPath": {"path": "/dev/vdb"},
    "ReseedRandomDev": {"data": b"noise"},
    "SetGuestDateTime": {"Sec": 1_000, "Usec": 5},
    "SetPolicy": {"policy": "package agent_policy"},
}
RESULTS = {
    "Version": AgentVersion("0.0.1", "fake-1.0"),
    "GetOOMEvent": "c1",
    "GetDiagnosticData": "the end",
    "WaitProcess": 3,
    "WriteStdin": 2,
    "ReadStdout": b"out",
    "ReadStderr": b"err",
    "GetIPTables": b"*filter v6",
    "SetIPTables": b"*nat",
    "GetMetrics": "kata_agent_total_rss 1\n",
}


def test_every_method_of_both_services_has_a_call():
    services = (
        agent_pb2.DESCRIPTOR.services_by_name["AgentService"],
        health_pb2.DESCRIPTOR.services_by_name["Health"],
    )
    assert {method.name for service in services for method in service.methods} == set(CALLS)


def test_every_call_is_snake_case_of_its_method():
    plain = {name.lower() for name in CALLS}
    coroutines = {name for name in vars(AgentClient) if re.fullmatch(r"[a-z][a-z_]+", name)}
    assert {name.replace("_", "") for name in coroutines - {"run", "close", "do_in_order"}} == plain


@pytest.mark.parametrize("method", CALLS)
async def test_call_goes_there_and_back(method, tmp_path, autojump_clock):
    async with connected(tmp_path) as (client, agent):
        agent.program(SLEEP)
        agent.program(Program(b"out", b"err", 3), container="c1", exec_id="done")
        await create(client)
        agent.process("c1").terminal = True
        await client.exec_process(agent_pb2.ExecProcessRequest(container_id="c1", exec_id="done"))
        agent.oom("c1")
        agent.requests.clear()
        with trio.fail_after(5):
            result = await CALLS[method](client)
        ((name, request),) = agent.requests
        assert name == method
        for field, value in REQUESTS.get(method, {}).items():
            assert getattr(request, field) == value
        if method in RESULTS:
            assert result == RESULTS[method]


NETWORK = [
    agent_pb2.UpdateInterfaceRequest(interface=types_pb2.Interface(name="eth0")),
    agent_pb2.UpdateRoutesRequest(routes=agent_pb2.Routes(Routes=[types_pb2.Route(dest="")])),
    agent_pb2.CreateSandboxRequest(sandbox_id="s1"),
]


async def test_requests_in_order_are_sent_without_waiting_for_the_answers(tmp_path):
    async with connected(tmp_path) as (client, agent), trio.open_nursery() as nursery:
        agent.hang("UpdateInterface")
        with trio.fail_after(10):
            nursery.start_soon(client.do_in_order, *NETWORK)
            while len(agent.requests) < len(NETWORK):  # noqa: ASYNC110
                await trio.sleep(0.001)
        # The fake takes them as its event loop likes; their order on the wire is ttrpc's test.
        assert all(request in NETWORK for _, request in agent.requests)
        nursery.cancel_scope.cancel()


async def test_first_refusal_of_requests_in_order_is_raised_with_its_method(tmp_path):
    async with connected(tmp_path) as (client, agent):
        agent.fail("UpdateRoutes", Code.INVALID_ARGUMENT, "no way there")
        agent.hang("CreateSandbox")
        with trio.fail_after(10), pytest.raises(AgentStatus, match="no way there") as refused:
            await client.do_in_order(*NETWORK)
        assert refused.value.method == "UpdateRoutes"
        await client.check()


async def test_replies_with_structure_arrive_whole(tmp_path, autojump_clock):
    async with connected(tmp_path) as (client, _):
        await create(client)
        stats = await client.stats_container("c1")
        assert stats.cgroup_stats.memory_stats.usage.usage == 4 << 20
        interface = await CALLS["UpdateInterface"](client)
        assert list((await client.list_interfaces()).Interfaces) == [interface]
        routes = await CALLS["UpdateRoutes"](client)
        assert routes == await client.list_routes()
        (usage,) = (await client.get_volume_stats("/volume")).usage
        assert (usage.used, usage.unit) == (40, csi_pb2.VolumeUsage.Unit.BYTES)
        details = await client.get_guest_details()
        assert details.memory_block_bytes == 128 << 20
        assert details.is_init
        assert details.storage_handlers == ("virtio-fs", "ephemeral", "local")


async def test_init_is_also_known_by_an_empty_exec_id(tmp_path, autojump_clock):
    async with connected(tmp_path) as (client, agent):
        agent.program(SLEEP)
        await create(client)
        await client.start_container("c1")
        await client.signal_process("c1", "", signal.SIGKILL)
        assert await client.wait_process("c1", "c1") == 128 + 9


async def test_calls_run_side_by_side(tmp_path, autojump_clock):
    async with connected(tmp_path) as (client, agent):
        agent.program(SLEEP)
        await create(client)
        await client.start_container("c1")
        statuses: list[int] = []
        async with trio.open_nursery() as nursery:

            async def wait() -> None:
                statuses.append(await client.wait_process("c1", "c1"))

            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            await client.check()
            await client.signal_process("c1", "c1", signal.SIGTERM)
        assert statuses == [143]


async def test_agents_error_keeps_its_code(tmp_path, autojump_clock):
    async with connected(tmp_path) as (client, agent):
        agent.fail("StartContainer", Code.INTERNAL, "bo\x00om")
        with pytest.raises(AgentStatus, match=r"StartContainer with INTERNAL: bo\\x00om") as caught:
            await client.start_container("c1")
        assert caught.value.code is Code.INTERNAL
        assert caught.value.method == "StartContainer"
        with pytest.raises(AgentStatus) as caught:
            await client.pause_container("absent")
        assert caught.value.code is Code.INVALID_ARGUMENT


async def test_agent_that_does_not_serve_fails_its_check(tmp_path, autojump_clock):
    async with connected(tmp_path) as (client, agent):
        agent.serving = False
        with pytest.raises(AgentStatus, match="not serving") as caught:
            await client.check()
        assert caught.value.code is Code.UNAVAILABLE


@pytest.mark.parametrize("size", [-1, 0, MAX_CHUNK_BYTES + 1])
async def test_read_of_an_impossible_size_is_refused_locally(size, tmp_path, autojump_clock):
    async with connected(tmp_path) as (client, agent):
        with pytest.raises(ValueError, match="chunk"):
            await client.read_stdout("c1", "c1", size)
        assert not agent.requests


async def test_write_over_the_chunk_size_is_refused_locally(tmp_path, autojump_clock):
    async with connected(tmp_path) as (client, agent):
        with pytest.raises(ValueError, match="chunk"):
            await client.write_stdin("c1", "c1", bytes(MAX_CHUNK_BYTES + 1))
        assert not agent.requests


async def test_whole_chunks_pass_both_ways(tmp_path, autojump_clock):
    async with connected(tmp_path) as (client, agent):
        agent.program(CAT)
        await create(client)
        await client.start_container("c1")
        chunk = bytes(range(256)) * (MAX_CHUNK_BYTES // 256)
        assert await client.write_stdin("c1", "c1", chunk) == len(chunk)
        assert await client.read_stdout("c1", "c1") == chunk
        assert await client.write_stdin("c1", "c1", b"") == 0
        assert await client.read_stdout("c1", "c1") == b""
        assert await client.wait_process("c1", "c1") == 0


def test_only_calls_that_wait_for_processes_have_no_deadline():
    timeouts = AgentTimeouts()
    unlimited = {method for method in CALLS if timeouts.of(method) is None}
    waiting = {"WaitProcess", "ReadStdout", "ReadStderr", "WriteStdin", "GetOOMEvent"}
    assert unlimited == UNLIMITED == waiting
