"""OCI hooks: what they are told, when they run, what their failures do. A fake VM, real hooks."""

from __future__ import annotations

import json
import os
import socket
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from shimv2 import daemon
from shimv2.bootstrap import ShimInvocation
from shimv2.cleanup import remove_state
from shimv2.config import AgentConfig, RuntimeConfig
from shimv2.errors import InvalidArgument
from shimv2.hooks import parse_hooks
from shimv2.journal import HOOKS_LIMIT_S, Journal, read, replay
from shimv2.state_dir import StateDir
from tests.netns.pod import NEEDS_TAPS, Holder
from tests.netns.test_tap import links
from tests.shimv2.shim_bench import ShimBench, pod_annotations, refusal, spec
from ttrpc import Code


class Scripts:
    """Makes hooks of shell scripts that write what they see into `log`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.log = directory / "log"
        self.log.touch()

    def hook(self, name: str, script: str = "", **fields: Any) -> dict[str, Any]:
        """A hook that logs its name and its state, then does `script`."""
        path = self.directory / name
        lines = [
            "#!/bin/sh",
            "state=$(cat)",
            """pid=$(echo "$state" | sed -n 's/.*"pid": \\([0-9]*\\).*/\\1/p')""",
            f'printf "%s %s %s\\n" {name} "$PWD" "$state" >> {self.log}',
            script,
        ]
        path.write_text("\n".join(lines) + "\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return {"path": str(path), "args": [name], "env": ["PATH=/usr/bin:/bin"], **fields}

    @property
    def lines(self) -> list[tuple[str, str, dict[str, Any]]]:
        """Name, directory and state of each hook that ran."""
        rows = [line.split(" ", 2) for line in self.log.read_text().splitlines()]
        return [(name, directory, json.loads(state)) for name, directory, state in rows]

    @property
    def names(self) -> list[str]:
        return [name for name, _, _ in self.lines]


@pytest.fixture
def scripts(tmp_path: Path) -> Scripts:
    directory = tmp_path / "hooks"
    directory.mkdir()
    return Scripts(directory)


@pytest.fixture
def holder() -> Iterator[Holder]:
    """An empty network namespace."""
    made = Holder()
    yield made
    made.close()


def pods_network(pid: int) -> os.stat_result:
    return os.stat(f"/proc/{pid}/ns/net")


@pytest.mark.parametrize(
    ("hooks", "text"),
    [
        ([], "'hooks' is not an object"),
        ({"prestart": {}}, "hooks.prestart is not a list"),
        ({"poststop": [{"path": "bin/x"}]}, "hooks.poststop[0].path 'bin/x' is not an absolute"),
        ({"prestart": [{"path": "/x", "args": [1]}]}, "hooks.prestart[0].args is not a list of"),
        ({"prestart": [{"path": "/x", "env": ["A\0"]}]}, "hooks.prestart[0].env has a string"),
        ({"createRuntime": [{"path": "/x", "timeout": 0}]}, "timeout 0 is not a number of seconds"),
        ({"createRuntime": [{"path": "/x", "timeout": True}]}, "timeout True is not a number"),
        ({"poststart": [{"path": "/x"}] * 65}, "has 65 hooks; at most 64 are run"),
    ],
)
def test_hooks_that_cannot_be_run_are_refused_by_field(hooks: Any, text: str) -> None:
    if hooks == []:
        assert all(found == () for found in parse_hooks({"hooks": hooks}).values())
        hooks = "x"
    with pytest.raises(InvalidArgument) as caught:
        parse_hooks({"hooks": hooks})
    assert text in str(caught.value)


async def test_refused_hooks_leave_no_vm(tmp_path: Path) -> None:
    async with ShimBench(tmp_path).running() as shim:
        error = await refusal(shim.create(config=spec(hooks={"prestart": [{"path": "x"}]})))
        assert error.code == Code.INVALID_ARGUMENT
        assert not shim.hypervisor.machines


async def test_start_container_hooks_go_to_the_guest_and_no_others(
    tmp_path: Path, scripts: Scripts
) -> None:
    inside = {"path": "/bin/inside", "args": ["inside", "x"], "env": ["A=b"], "timeout": 3}
    hooks = {"startContainer": [inside], "poststop": [scripts.hook("stop")]}
    async with ShimBench(tmp_path).running() as shim:
        await shim.create(config=spec(hooks=hooks))
        sent = shim.agent.called("CreateContainer")[0].OCI.Hooks
        (hook,) = sent.StartContainer
        assert (hook.Path, list(hook.Args), list(hook.Env)) == (
            "/bin/inside",
            ["inside", "x"],
            ["A=b"],
        )
        assert hook.Timeout == 3
        assert not sent.Poststop
        await shim.delete()
    assert scripts.names == ["stop"]


class TestOnTheHost:
    pytestmark = NEEDS_TAPS

    async def test_each_runs_at_its_point_with_the_container_s_state(
        self, tmp_path: Path, scripts: Scripts
    ) -> None:
        stages = ("prestart", "createRuntime", "createContainer", "poststart", "poststop")
        hooks = {stage: [scripts.hook(f"{stage}{n}") for n in (0, 1)] for stage in stages}
        async with ShimBench(tmp_path).running() as shim:
            await shim.create(config=spec(annotations={"who": "me"}, hooks=hooks))
            assert scripts.names == [f"{stage}{n}" for stage in stages[:3] for n in (0, 1)]
            await shim.start()
            assert scripts.names[6:] == ["poststart0", "poststart1"]
            await shim.wait()
            assert len(scripts.names) == 8
            assert shim.state_dir.exists()
            await shim.delete()
            assert scripts.names[8:] == ["poststop0", "poststop1"]
            bundle = str(tmp_path / "bundles" / "c1")
            assert {directory for _, directory, _ in scripts.lines} == {bundle}
            for name, _, state in scripts.lines:
                expected = {"prest": "creating", "creat": "creating", "posts": "stopped"}[name[:5]]
                assert state["status"] == ("running" if "poststart" in name else expected)
                assert (state["ociVersion"], state["id"]) == ("1.0.2", "c1")
                assert (state["bundle"], state["annotations"]) == (bundle, {"who": "me"})
                assert ("pid" in state) == (state["status"] != "stopped")

    async def test_network_that_a_hook_makes_by_the_pid_is_the_vm_s(
        self, tmp_path: Path, scripts: Scripts, holder: Holder
    ) -> None:
        made = tmp_path / "inode"
        script = f"""
            stat -L -c %i /proc/$pid/ns/net > {made}
            nsenter --net=/proc/$pid/ns/net sh -ec '
                ip link show lo | grep -q LOWER_UP
                ip link add eth0 type veth peer name peer netns {holder.pid}
                ip addr add 10.1.2.3/24 dev eth0
                ip link set eth0 up'
        """
        hooks = {"createRuntime": [scripts.hook("network", script)]}
        async with ShimBench(tmp_path).running() as shim:
            await shim.create(config=spec(hooks=hooks))
            assert int(made.read_text()) != pods_network(os.getpid()).st_ino
            (interface,) = [call.interface for call in shim.agent.called("UpdateInterface")]
            assert [each.address for each in interface.IPAddresses] == ["10.1.2.3"]
            fd = shim.machine.spec.network_namespace
            assert fd is not None
            # The process that the hook was told of is gone, the namespace is the VM's.
            assert shim.hypervisor.namespaces == [int(made.read_text())]
            names = [entry.fields.get("name") for entry in read(shim.state_dir.journal)[1]]
            assert "network holder" not in names
            await shim.delete()

    async def test_given_namespace_is_the_one_that_hooks_are_told(
        self, tmp_path: Path, scripts: Scripts, holder: Holder
    ) -> None:
        told, own, inside = (tmp_path / name for name in ("told", "own", "inside"))
        look = f"readlink /proc/$pid/ns/net > {told}; readlink /proc/self/ns/net > {own}"
        config = spec(hooks={
            "prestart": [scripts.hook("before", look)],
            "createContainer": [scripts.hook("inside", f"readlink /proc/self/ns/net > {inside}")],
        })  # fmt: skip
        config["linux"]["namespaces"][2]["path"] = str(holder.path)
        async with ShimBench(tmp_path).running() as shim:
            await shim.create(config=config)
            inode = os.stat(holder.path).st_ino
            assert told.read_text() == inside.read_text() == f"net:[{inode}]\n"
            assert own.read_text().strip() == os.readlink("/proc/self/ns/net")
            await shim.delete()
        assert list(links(holder.path)) == ["lo"]

    async def test_docker_s_hook_is_called_by_the_name_it_gives_itself(
        self, tmp_path: Path, scripts: Scripts
    ) -> None:
        """Docker before 26: prestart is /proc/<pid of dockerd>/exe, which looks at argv[0]."""
        seen = tmp_path / "seen"
        script = f'printf "%s|" "$0" "$@" "$A$HOME" > {seen}; stat -L /proc/$PPID/ns/net'
        arguments = ["libnetwork-setkey", "-c", script, "named", "-exec-root=/run", "x", "y"]
        hook = {"path": "/bin/sh", "args": arguments, "env": ["A=b"]}
        async with ShimBench(tmp_path).running() as shim:
            hooks = {"prestart": [hook], "poststop": None, "poststart": []}
            await shim.create(config=spec(hooks=hooks))
            assert seen.read_text() == "named|-exec-root=/run|x|y|b|"
            await shim.delete()

    async def test_cri_o_s_containers_have_their_hooks_run(
        self, tmp_path: Path, scripts: Scripts
    ) -> None:
        def annotations(kind: str) -> dict[str, str]:
            return {
                "io.kubernetes.cri-o.ContainerType": kind,
                "io.kubernetes.cri-o.SandboxID": "c1",
            }

        async with ShimBench(tmp_path).running() as shim:
            for name, kind in (("c1", "sandbox"), ("m1", "container")):
                hooks = {"prestart": [scripts.hook(f"pre-{name}")]}
                await shim.create(name, config=spec(annotations=annotations(kind), hooks=hooks))
            assert scripts.names == ["pre-c1", "pre-m1"]
            await shim.delete("m1")
            await shim.delete()

    async def test_failing_hook_fails_the_create_with_its_name_status_and_last_words(
        self, tmp_path: Path, scripts: Scripts
    ) -> None:
        hooks = {
            "createRuntime": [
                scripts.hook("first", "echo no such bridge >&2; echo at all; exit 3"),
                scripts.hook("second"),
            ],
            "poststop": [scripts.hook("stop")],
        }
        async with ShimBench(tmp_path).running() as shim:
            error = await refusal(shim.create(config=spec(hooks=hooks)))
            assert error.code == Code.FAILED_PRECONDITION
            assert f"hook createRuntime[0] {scripts.directory}/first of container c1" in str(error)
            assert "exited with 3: no such bridge | at all" in str(error)
            assert scripts.names == ["first", "stop"]
            assert not shim.hypervisor.machines
            assert not shim.state_dir.exists()
            await shim.create(config=spec())

    async def test_hook_that_cannot_be_executed_is_named(
        self, tmp_path: Path, scripts: Scripts
    ) -> None:
        async with ShimBench(tmp_path).running() as shim:
            hooks = {"prestart": [{"path": "/no/such/hook"}]}
            error = await refusal(shim.create(config=spec(hooks=hooks)))
            assert "hook prestart[0] /no/such/hook of container c1 cannot be started" in str(error)
            assert "No such file" in str(error)

    async def test_hanging_hook_is_killed_with_what_it_started(
        self, tmp_path: Path, scripts: Scripts
    ) -> None:
        child = tmp_path / "child"
        script = f"sleep 1000 & echo $! > {child}; echo waiting; wait"
        hooks = {"createRuntime": [scripts.hook("hang", script, timeout=3)]}
        async with ShimBench(tmp_path).running() as shim:
            with trio.fail_after(60):
                error = await refusal(shim.create(config=spec(hooks=hooks)))
            assert "did not end within 3 s and was killed: waiting" in str(error)
            with trio.fail_after(30):
                await shim.until(lambda: not Path(f"/proc/{child.read_text().strip()}").exists())

    async def test_hook_without_a_timeout_ends_with_the_create_s(
        self, tmp_path: Path, scripts: Scripts
    ) -> None:
        hooks = {"createRuntime": [scripts.hook("hang", "sleep 1000")]}
        config = RuntimeConfig(agent=AgentConfig(create_container_timeout_s=3))
        async with ShimBench(tmp_path, config).running() as shim:
            error = await refusal(shim.create(config=spec(hooks=hooks)))
            assert error.code == Code.DEADLINE_EXCEEDED
            assert "running hook createRuntime[0]" in str(error)

    async def test_flood_of_words_neither_blocks_nor_fills_the_error(
        self, tmp_path: Path, scripts: Scripts
    ) -> None:
        flood = "yes 'all work and no play' | head -c 5000000; echo end >&2; exit 1"
        hooks = {"createRuntime": [scripts.hook("flood", flood)]}
        async with ShimBench(tmp_path).running() as shim:
            with trio.fail_after(60):
                error = await refusal(shim.create(config=spec(hooks=hooks)))
            assert str(error).endswith("end")
            assert len(str(error)) < 2048

    async def test_failing_poststart_and_poststop_hooks_are_logged_and_the_others_run(
        self, tmp_path: Path, scripts: Scripts
    ) -> None:
        hooks = {
            stage: [scripts.hook(f"{stage}0", "exit 4"), scripts.hook(f"{stage}1")]
            for stage in ("poststart", "poststop")
        }
        async with ShimBench(tmp_path).running() as shim:
            await shim.run(config=spec(hooks=hooks))
            await shim.wait()
            await shim.delete()
            told = [str(line["error"]) for line in shim.log.named("hook failed")]
            assert [text.split()[1] for text in told] == ["poststart[0]", "poststop[0]"]
            assert all("exited with 4: it said nothing" in text for text in told), told
            assert scripts.names == ["poststart0", "poststart1", "poststop0", "poststop1"]

    async def test_vm_outlives_the_poststart_hooks_of_a_container_that_ends_at_once(
        self, tmp_path: Path, scripts: Scripts
    ) -> None:
        go = tmp_path / "go"
        os.mkfifo(go)
        descriptor = os.open(go, os.O_RDWR)
        hooks = {"poststart": [scripts.hook("slow", f"read word < {go}")]}
        async with ShimBench(tmp_path).running() as shim:
            await shim.create(config=spec(hooks=hooks))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(shim.start)
                with trio.fail_after(60):
                    await shim.wait()
                    await shim.until(lambda: scripts.names == ["slow"])
                    await trio.testing.wait_all_tasks_blocked(0.05)
                assert shim.machine.exit is None
                os.write(descriptor, b"go\n")
            with trio.fail_after(60):
                await shim.until(lambda: shim.machine.exit is not None)
            await shim.delete()
        os.close(descriptor)

    async def test_containers_of_a_pod_have_hooks_of_their_own(
        self, tmp_path: Path, scripts: Scripts
    ) -> None:
        def hooks(name: str) -> dict[str, Any]:
            return {
                "createRuntime": [scripts.hook(f"{name}-create")],
                "poststop": [scripts.hook(f"{name}-stop")],
            }

        async with ShimBench(tmp_path).running() as shim:
            pod = pod_annotations("sandbox", "c1")
            await shim.create(config=spec(annotations=pod, hooks=hooks("pod")))
            member = pod_annotations("container", "c1")
            await shim.create("m1", config=spec(annotations=member, hooks=hooks("m1")))
            bad = {"createRuntime": [{"path": "/bin/false"}], "poststop": hooks("m2")["poststop"]}
            await refusal(shim.create("m2", config=spec(annotations=member, hooks=bad)))
            assert scripts.names == ["pod-create", "m1-create", "m2-stop"]
            assert scripts.lines[1][2]["pid"] == shim.machine.pid
            await shim.delete("m1")
            assert scripts.names[3:] == ["m1-stop"]
            await shim.delete()
            assert scripts.names[4:] == ["pod-stop"]

    async def test_poststop_hooks_of_a_killed_shim_are_run_once_by_its_journal(
        self, tmp_path: Path, scripts: Scripts
    ) -> None:
        hooks = {
            "createRuntime": [scripts.hook("create")],
            "poststop": [scripts.hook("stop", "exit 2"), scripts.hook("hang", "sleep 1000")],
        }
        async with ShimBench(tmp_path).running() as shim:
            await shim.create(config=spec(hooks=hooks))
            journal = shim.state_dir.journal

            # In a process of its own: replaying is for one without an event loop.
            code = (
                "from shimv2.journal import replay\n"
                f"for _ in 1, 2: print(replay({journal!r}, container='c1'))"
            )
            done = await trio.run_process([sys.executable, "-c", code], capture_stdout=True)
            first, second = done.stdout.decode().splitlines()
            assert "hook poststop[0]" in first
            assert "exited with 2" in first
            assert "hook poststop[1]" in first
            assert "was killed" in first
            assert second == "[]"
            assert scripts.names == ["create", "stop", "hang"]
            assert scripts.lines[1][2]["status"] == "stopped"
            shim.machine.die()
            await shim.wait()
            await shim.delete()
        assert replay(journal) == []


def left_by_a_killed_shim(state_dir: StateDir, *hooks: tuple[str, dict[str, Any]]) -> None:
    """Leave what a shim leaves that was killed before its containers' poststop hooks ran."""
    state_dir.create()
    journal = Journal.open(state_dir.journal)
    for container, hook in hooks:
        path = f"{state_dir.path}/poststop-{container}.json"
        journal.take("poststop", path=path, container=container)
        parsed = parse_hooks({"hooks": {"poststop": [hook]}})["poststop"]
        bundle = state_dir.path
        record = {"container": container, "bundle": bundle, "state": "{}"}
        hooks_json = [each._asdict() for each in parsed]
        Path(path).write_text(json.dumps({**record, "hooks": hooks_json}))
    journal.close()


async def test_poststop_hooks_that_an_event_loop_cannot_run_stay_for_the_next_cleanup(
    tmp_path: Path, scripts: Scripts
) -> None:
    state_dir = StateDir("k", str(tmp_path / "s"))
    left_by_a_killed_shim(state_dir, ("c1", scripts.hook("stop")))
    (problem,) = remove_state(state_dir)
    assert "poststop hooks are still to be run" in problem
    assert scripts.names == []
    code = (
        "from shimv2 import cleanup, state_dir\n"
        f"print(cleanup.remove_state(state_dir.StateDir('k', {state_dir.root!r})))"
    )
    done = await trio.run_process([sys.executable, "-c", code], capture_stdout=True)
    assert done.stdout == b"[]\n"
    assert scripts.names == ["stop"]
    assert not state_dir.exists()


def test_a_shim_runs_what_an_earlier_one_left_before_it_serves(
    tmp_path: Path, scripts: Scripts, monkeypatch: pytest.MonkeyPatch
) -> None:
    state_dir = StateDir("k", str(tmp_path / "s"))
    left_by_a_killed_shim(state_dir, ("c1", scripts.hook("stop")))
    seen: list[list[str]] = []

    async def serve(listener: socket.socket, *arguments: object) -> None:
        await trio.lowlevel.checkpoint()
        listener.close()
        seen.append(scripts.names)

    monkeypatch.setattr(daemon, "serve", serve)
    monkeypatch.setattr(daemon, "_settle", lambda *arguments: None)
    monkeypatch.setattr(daemon, "load", lambda: None)
    monkeypatch.setattr(daemon, "state_dir_of", lambda invocation: state_dir)
    monkeypatch.setattr("shimv2.heap.keep_chunks", lambda: None)
    gate, opened = os.pipe()
    os.write(opened, b"g")
    os.close(opened)
    listener, peer = socket.socketpair()
    invocation = ShimInvocation(
        namespace="n", id="c1", containerd_address="/c.sock", bundle_path=str(tmp_path)
    )
    assert daemon.run(invocation, listener.detach(), gate) == 0
    peer.close()
    assert seen == [["stop"]]
    assert not state_dir.exists()


def test_poststop_hooks_that_are_replayed_share_one_time(tmp_path: Path, scripts: Scripts) -> None:
    state_dir = StateDir("k", str(tmp_path / "s"))
    names = [f"c{number}" for number in range(10)]
    left_by_a_killed_shim(state_dir, *((name, scripts.hook(name, "sleep 1000")) for name in names))
    before = time.monotonic()
    problems = replay(state_dir.journal)
    assert time.monotonic() - before < 5 * HOOKS_LIMIT_S
    assert len(problems) == len(names)
    assert all("was killed" in problem for problem in problems), problems
    assert remove_state(state_dir) == []
