"""The Task service over real ttrpc, with a fake guest: the life of containers and execs."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from shimv2.pb import containerd_process_pb2 as process_pb
from shimv2.pb import containerd_task_pb2 as pb
from tests.fakes.fake_hypervisor import FAKE_PID
from tests.fakes.fake_process import CAT, SLEEP, Program
from tests.harness.limitations import documented
from tests.shimv2.shim_bench import ShimBench, overlay, pod_annotations, refusal, spec
from ttrpc import Code


async def test_a_container_runs_from_create_to_shutdown(tmp_path: Path) -> None:
    async with ShimBench(tmp_path).running() as shim:
        shim.agent.program(Program(exit_status=7))
        assert (await shim.create(rootfs=[overlay()])).pid == FAKE_PID
        assert (await shim.state()).status == process_pb.CREATED
        assert (await shim.start()).pid == FAKE_PID
        assert (await shim.wait()).exit_status == 7
        deleted = await shim.delete()
        assert (deleted.pid, deleted.exit_status) == (FAKE_PID, 7)
        await shim.call("Shutdown", pb.ShutdownRequest(id="c1"))
        assert shim.service.exit_requested.is_set()
        assert shim.publisher.topics == ["create", "start", "exit", "delete"]


async def test_exit_status_and_time_are_the_same_in_every_answer(tmp_path: Path) -> None:
    async with ShimBench(tmp_path).running() as shim:
        shim.agent.program(Program(exit_status=3))
        await shim.run()
        waited = await shim.wait()
        state = await shim.state()
        deleted = await shim.delete()
        event = shim.publisher.named("exit")[0]
        answers = {(a.exit_status, a.exited_at.seconds, a.exited_at.nanos)
                   for a in (waited, state, deleted, event)}  # fmt: skip
        assert len(answers) == 1
        assert waited.exited_at.seconds > 0


async def test_wait_returns_the_same_exit_to_every_caller(tmp_path: Path) -> None:
    async with ShimBench(tmp_path).running() as shim:
        shim.agent.program(SLEEP)
        await shim.create()
        exits = []

        async def wait() -> None:
            exits.append((await shim.wait()).exit_status)

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            await shim.start()
            await shim.kill(signal=15)
        assert exits == [143] * 5
        assert (await shim.wait()).exit_status == 143


async def test_exited_at_is_unset_while_a_process_runs(tmp_path: Path) -> None:
    async with ShimBench(tmp_path).running() as shim:
        shim.agent.program(SLEEP)
        await shim.run()
        state = await shim.state()
        assert state.status == process_pb.RUNNING
        assert not state.HasField("exited_at")


async def test_init_exits_after_its_execs(tmp_path: Path) -> None:
    async with ShimBench(tmp_path).running() as shim:
        shim.agent.program(SLEEP)
        await shim.run()
        await shim.exec("e1")
        await shim.start(exec_id="e1")
        await shim.kill()
        await shim.wait()
        assert [message.id for message in shim.publisher.named("exit")] == ["e1", "c1"]


async def test_an_exec_has_an_exit_of_its_own(tmp_path: Path) -> None:
    async with ShimBench(tmp_path).running() as shim:
        shim.agent.program(SLEEP)
        await shim.run()
        shim.agent.program(Program(exit_status=5), container="c1", exec_id="e1")
        await shim.exec("e1")
        assert (await shim.state(exec_id="e1")).status == process_pb.CREATED
        await shim.start(exec_id="e1")
        assert (await shim.wait(exec_id="e1")).exit_status == 5
        assert (await shim.state(exec_id="e1")).id == "e1"
        assert (await shim.delete(exec_id="e1")).exit_status == 5
        assert (await refusal(shim.state(exec_id="e1"))).code == Code.NOT_FOUND
        assert (await shim.state()).status == process_pb.RUNNING
        assert shim.publisher.topics == [
            "create", "start", "exec-added", "exec-started", "exit"]  # fmt: skip


async def test_an_exec_id_is_free_again_after_delete(tmp_path: Path) -> None:
    async with ShimBench(tmp_path).running() as shim:
        shim.agent.program(SLEEP)
        await shim.run()
        await shim.exec("e1")
        assert (await refusal(shim.exec("e1"))).code == Code.ALREADY_EXISTS
        assert (await shim.delete(exec_id="e1")).exit_status == 0
        await shim.exec("e1")


async def test_an_exec_that_cannot_start_fails_at_once_and_can_be_deleted(tmp_path: Path) -> None:
    async with ShimBench(tmp_path).running() as shim:
        shim.agent.program(SLEEP)
        await shim.run()
        shim.agent.fail("ExecProcess", Code.INTERNAL, "executable file not found in $PATH")
        await shim.exec("e1")
        error = await refusal(shim.start(exec_id="e1"))
        assert "executable file not found" in str(error)
        assert (await shim.wait(exec_id="e1")).exit_status == 255
        assert (await shim.delete(exec_id="e1")).exit_status == 255
        assert "exec-started" not in shim.publisher.topics


async def test_exec_keeps_capabilities_rlimits_and_no_new_privileges(tmp_path: Path) -> None:
    async with ShimBench(tmp_path).running() as shim:
        shim.agent.program(SLEEP)
        await shim.run()
        process = {
            "args": ["id"],
            "cwd": "/",
            "noNewPrivileges": True,
            "capabilities": {"bounding": ["CAP_KILL"], "effective": ["CAP_KILL"]},
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 9, "soft": 8}],
        }
        await shim.exec("e1", process=process)
        await shim.start(exec_id="e1")
        sent = shim.agent.called("ExecProcess")[0].process
        assert sent.NoNewPrivileges
        assert list(sent.Capabilities.Effective) == ["CAP_KILL"]
        assert (sent.Rlimits[0].Type, sent.Rlimits[0].Hard) == ("RLIMIT_NOFILE", 9)


async def test_deleting_a_created_container_reports_status_0(tmp_path: Path) -> None:
    async with ShimBench(tmp_path).running() as shim:
        await shim.create()
        assert (await shim.delete()).exit_status == 0
        assert shim.publisher.topics == ["create", "delete"]


async def test_a_running_process_cannot_be_deleted(tmp_path: Path) -> None:
    async with ShimBench(tmp_path).running() as shim:
        shim.agent.program(SLEEP)
        await shim.run()
        error = await refusal(shim.delete())
        assert error.code == Code.FAILED_PRECONDITION
        assert "cannot delete a running process" in str(error)


async def test_the_second_of_two_deletes_finds_nothing(tmp_path: Path) -> None:
    async with ShimBench(tmp_path).running() as shim:
        await shim.run()
        await shim.wait()
        outcomes: list[object] = []

        async def delete() -> None:
            try:
                outcomes.append((await shim.delete()).exit_status)
            except Exception as exc:
                outcomes.append(getattr(exc, "code", exc))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(delete)
            nursery.start_soon(delete)
        assert sorted(outcomes) == [0, Code.NOT_FOUND]
        assert shim.publisher.topics.count("delete") == 1


async def test_kill_of_a_finished_process_is_not_found(tmp_path: Path) -> None:
    async with ShimBench(tmp_path).running() as shim:
        await shim.run()
        await shim.wait()
        for signal in (9, 15, 1):
            error = await refusal(shim.kill(signal=signal))
            assert error.code == Code.NOT_FOUND
            assert "process already finished" in str(error)


async def test_kill_of_an_exec_that_never_started_is_refused(tmp_path: Path) -> None:
    async with ShimBench(tmp_path).running() as shim:
        shim.agent.program(SLEEP)
        await shim.run()
        await shim.exec("e1")
        assert (await refusal(shim.kill(exec_id="e1"))).code == Code.FAILED_PRECONDITION


async def test_a_created_container_that_is_killed_stops(tmp_path: Path) -> None:
    async with ShimBench(tmp_path).running() as shim:
        shim.agent.program(SLEEP)
        await shim.create()
        await shim.kill()
        assert (await shim.wait()).exit_status == 137
        assert (await shim.delete()).exit_status == 137


async def test_kill_all_reaches_every_process(tmp_path: Path) -> None:
    async with ShimBench(tmp_path).running() as shim:
        shim.agent.program(SLEEP)
        await shim.run()
        await shim.exec("e1")
        await shim.start(exec_id="e1")
        await shim.kill(signal=15, everyone=True)
        assert (await shim.wait(exec_id="e1")).exit_status == 143


@pytest.mark.parametrize(
    "method",
    ["State", "Pids", "Kill", "Wait", "Delete", "Start", "Pause", "Resume", "Stats", "Update",
     "ResizePty", "CloseIO"],
)  # fmt: skip
async def test_an_unknown_container_is_not_found(tmp_path: Path, method: str) -> None:
    request = {
        "State": pb.StateRequest, "Pids": pb.PidsRequest, "Kill": pb.KillRequest,
        "Wait": pb.WaitRequest, "Delete": pb.DeleteRequest, "Start": pb.StartRequest,
        "Pause": pb.PauseRequest, "Resume": pb.ResumeRequest, "Stats": pb.StatsRequest,
        "Update": pb.UpdateTaskRequest, "ResizePty": pb.ResizePtyRequest,
        "CloseIO": pb.CloseIORequest,
    }[method](id="nobody")  # fmt: skip
    if method == "CloseIO":
        request.stdin = True
    async with ShimBench(tmp_path).running() as shim:
        error = await refusal(shim.call(method, request))
        assert error.code == Code.NOT_FOUND
        assert "nobody" in str(error)


async def test_connect_answers_for_unknown_ids(tmp_path: Path) -> None:
    async with ShimBench(tmp_path).running() as shim:
        unknown = await shim.call("Connect", pb.ConnectRequest(id="x"), pb.ConnectResponse)
        assert unknown.shim_pid > 0
        assert unknown.task_pid == 0
        await shim.create()
        known = await shim.call("Connect", pb.ConnectRequest(id="c1"), pb.ConnectResponse)
        assert known.task_pid == FAKE_PID


async def test_pids_of_a_live_task_are_never_empty(tmp_path: Path) -> None:
    async with ShimBench(tmp_path).running() as shim:
        await shim.create()
        answer = await shim.call("Pids", pb.PidsRequest(id="c1"), pb.PidsResponse)
        assert [process.pid for process in answer.processes] == [FAKE_PID]


async def test_pause_and_resume_are_told_in_state_and_events(tmp_path: Path) -> None:
    async with ShimBench(tmp_path).running() as shim:
        shim.agent.program(SLEEP)
        await shim.run()
        await shim.call("Pause", pb.PauseRequest(id="c1"))
        assert (await shim.state()).status == process_pb.PAUSED
        assert (await refusal(shim.exec("e1"))).code == Code.FAILED_PRECONDITION
        await shim.call("Resume", pb.ResumeRequest(id="c1"))
        assert (await shim.state()).status == process_pb.RUNNING
        assert shim.publisher.topics[-2:] == ["paused", "resumed"]


async def test_update_sends_what_means_something_in_the_guest(tmp_path: Path) -> None:
    async with ShimBench(tmp_path).running() as shim:
        shim.agent.program(SLEEP)
        await shim.run()
        request = pb.UpdateTaskRequest(id="c1")
        request.resources.value = b'{"memory":{"limit":5},"cpu":{"quota":7,"cpus":"0-3"}}'
        await shim.call("Update", request)
        sent = shim.agent.containers["c1"].resources[0]
        assert (sent.Memory.Limit, sent.CPU.Quota, sent.CPU.Cpus) == (5, 7, "0,1")
        request.resources.value = b'{"memory":{"limit":"much"}}'
        error = await refusal(shim.call("Update", request))
        assert error.code == Code.INVALID_ARGUMENT
        assert "memory.limit" in str(error)


async def test_checkpoint_is_refused_with_a_sentence(tmp_path: Path) -> None:
    async with ShimBench(tmp_path).running() as shim:
        await shim.create()
        error = await refusal(shim.call("Checkpoint", pb.CheckpointTaskRequest(id="c1")))
        assert error.code == Code.UNIMPLEMENTED
        assert documented(
            "a container in a VM cannot be checkpointed: its state is the guest kernel's"
        ).search(str(error))
        error = await refusal(shim.create("c2", checkpoint="/c"))
        assert error.code == Code.UNIMPLEMENTED
        text = documented("a container cannot be restored from a checkpoint into a VM")
        assert text.search(str(error))


async def test_an_exec_is_refused_where_its_container_does_not_run(tmp_path: Path) -> None:
    async with ShimBench(tmp_path).running() as shim:
        shim.agent.program(SLEEP)
        await shim.create()
        await shim.exec("e1")
        text = documented("container …: cannot start an exec in a created container")
        assert text.search(str(await refusal(shim.start(exec_id="e1"))))
        await shim.start()
        await shim.call("Pause", pb.PauseRequest(id="c1"))
        text = documented("container …: cannot exec in a paused container")
        assert text.search(str(await refusal(shim.exec("e2"))))
        await shim.call("Resume", pb.ResumeRequest(id="c1"))


async def test_shutdown_with_a_container_left_is_no_end(tmp_path: Path) -> None:
    async with ShimBench(tmp_path).running() as shim:
        await shim.create()
        await shim.call("Shutdown", pb.ShutdownRequest(id="c1"))
        assert not shim.service.exit_requested.is_set()
        assert (await shim.state()).status == process_pb.CREATED


async def test_a_pod_shares_one_vm_and_takes_containers_after_others_left(tmp_path: Path) -> None:
    async with ShimBench(tmp_path).running() as shim:
        shim.agent.program(SLEEP)
        await shim.run("p1", config=spec(annotations=pod_annotations("sandbox", "p1")))
        for name in ("a", "b"):
            await shim.run(name, config=spec(annotations=pod_annotations("container", "p1")))
            await shim.kill(name)
            await shim.wait(name)
            await shim.delete(name)
            await shim.call("Shutdown", pb.ShutdownRequest(id=name))
        assert len(shim.hypervisor.machines) == 1
        assert shim.machine.exit is None
        assert not shim.service.exit_requested.is_set()
        await shim.kill("p1")
        await shim.wait("p1")
        await shim.delete("p1")
        await shim.call("Shutdown", pb.ShutdownRequest(id="p1"))
        assert shim.service.exit_requested.is_set()


async def test_a_member_without_a_sandbox_is_refused(tmp_path: Path) -> None:
    async with ShimBench(tmp_path).running() as shim:
        config = spec(annotations=pod_annotations("container", "p1"))
        error = await refusal(shim.create("a", config=config))
        assert error.code == Code.FAILED_PRECONDITION
        assert "p1" in str(error)


async def test_the_same_id_twice_already_exists(tmp_path: Path) -> None:
    async with ShimBench(tmp_path).running() as shim:
        await shim.create()
        assert (await refusal(shim.create())).code == Code.ALREADY_EXISTS
        assert (await shim.state()).status == process_pb.CREATED


async def test_oom_is_told_once_and_only_of_own_containers(tmp_path: Path) -> None:
    async with ShimBench(tmp_path).running() as shim:
        shim.agent.program(SLEEP)
        await shim.run()
        for name in ("somebody-else", "c1", "c1"):
            shim.agent.oom(name)
        with trio.fail_after(30):
            await shim.until(lambda: bool(shim.publisher.named("oom")))
        assert [message.container_id for message in shim.publisher.named("oom")] == ["c1"]


async def test_the_timeline_is_logged_once(tmp_path: Path) -> None:
    async with ShimBench(tmp_path).running() as shim:
        await shim.run()
        await shim.wait()
        (line,) = shim.log.named("sandbox timeline")
        marks = [line[name] for name in ("launch", "agent_ready", "created", "started", "exited")]
        assert marks == sorted(marks)  # type: ignore[type-var]


async def test_stats_come_in_the_message_of_the_hosts_cgroup_mode(tmp_path: Path) -> None:
    async with ShimBench(tmp_path).running() as shim:
        shim.agent.program(SLEEP)
        await shim.run()
        answer = await shim.call("Stats", pb.StatsRequest(id="c1"), pb.StatsResponse)
        assert answer.stats.type_url in (
            "io.containerd.cgroups.v1.Metrics", "io.containerd.cgroups.v2.Metrics")  # fmt: skip
        assert answer.stats.value


async def test_terminal_size_set_before_start_reaches_the_terminal(tmp_path: Path) -> None:
    async with ShimBench(tmp_path).running() as shim:
        shim.agent.program(CAT)
        await shim.create(terminal=True)
        await shim.call("ResizePty", pb.ResizePtyRequest(id="c1", width=99, height=33))
        await shim.start()
        assert shim.agent.process("c1").size == (33, 99)
        await shim.call("ResizePty", pb.ResizePtyRequest(id="c1", width=80, height=25))
        assert shim.agent.process("c1").size == (25, 80)


async def test_resize_without_a_terminal_does_nothing(tmp_path: Path) -> None:
    async with ShimBench(tmp_path).running() as shim:
        shim.agent.program(SLEEP)
        await shim.run()
        await shim.call("ResizePty", pb.ResizePtyRequest(id="c1", width=99, height=33))
        assert not shim.agent.called("TtyWinResize")
