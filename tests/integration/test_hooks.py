"""OCI hooks of a spec, as any client of containerd may send it; runc is the oracle."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

from tests.harness.ctr import KATA, RUNTIME, Ctr, fresh_id
from tests.harness.parts import find_shims

if TYPE_CHECKING:
    from tests.harness.node import Node

_HOME = "/tmp/hooks"
_CONFIG = f"{_HOME}/config.json"
_LOG = f"{_HOME}/log"
# One line a hook: its name, whether it is in the node's network, whether its pid is, its state.
_HOOK = f"""#!/bin/sh
state=$(cat)
pid=$(echo "$state" | sed -n 's/.*"pid": *\\([0-9]*\\).*/\\1/p')
own=$(readlink /proc/self/ns/net)
echo "$0 $own $(readlink /proc/${{pid:-none}}/ns/net || echo none) $state" >> {_LOG}
[ ! -e {_HOME}/hang ] || exec sleep 1000
"""


@pytest.fixture
def home(node: Node) -> Iterator[str]:
    """A directory of the node with a root filesystem, a hook and its log."""
    node.run(["sh", "-ec", f"mkdir -p {_HOME}/root/bin; cp $(which busybox) {_HOME}/root/bin/sh"])
    node.run(["sh", "-ec", f"cd {_HOME}/root; ln bin/sh bin/cat; mkdir proc dev sys tmp"])
    node.write(f"{_HOME}/hook", _HOOK)
    node.run(["chmod", "755", f"{_HOME}/hook"])
    node.write(_LOG, "")
    yield _HOME
    node.run(["rm", "-rf", _HOME])


def write_config(node: Node, hooks: dict[str, Any], command: str) -> None:
    """Write a small config.json with these hooks."""
    config = {
        "ociVersion": "1.0.2",
        "process": {
            "args": ["sh", "-c", command],
            "cwd": "/",
            "user": {"uid": 0, "gid": 0},
            "env": ["PATH=/bin"],
        },
        "root": {"path": f"{_HOME}/root"},
        "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
        "hooks": hooks,
        "linux": {
            "cgroupsPath": f"/{node.name}/hooks",
            "namespaces": [{"type": kind} for kind in ("pid", "mount", "network", "ipc", "uts")],
        },
        "annotations": {"who": "me"},
    }
    node.write(_CONFIG, json.dumps(config))


def hook(name: str) -> dict[str, Any]:
    return {"path": f"{_HOME}/hook", "args": [name], "env": ["PATH=/usr/bin:/bin"]}


def argv(container: str) -> list[str]:
    return ["ctr", "run", "--rm", "--runtime", RUNTIME, "--config", _CONFIG, container]


def wait_until(is_true: Callable[[], bool], deadline_s: float = 30) -> None:
    deadline = time.monotonic() + deadline_s
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.05)  # a file that others write has no event here


def read_log(node: Node) -> list[list[str]]:
    return [line.split(" ", 3) for line in node.path(_LOG).read_text().splitlines()]


@pytest.mark.usefixtures("home")
def test_hooks_run_at_their_points_with_a_pid_in_the_container_s_network(
    node: Node, ctr: Ctr
) -> None:
    stages = ("prestart", "createRuntime", "createContainer", "poststart", "poststop")
    inside = {"path": "/bin/sh", "args": ["sh", "-c", "cat > /started"], "env": ["PATH=/bin"]}
    hooks = {stage: [hook(stage)] for stage in stages} | {"startContainer": [inside]}
    container = fresh_id("hooks")
    write_config(node, hooks, "cat /started")
    done = node.run(argv(container))
    assert json.loads(done.stdout)["status"] == "created"
    log = read_log(node)
    # sh takes its name from the file; runc's and ours come in the same order.
    states = [json.loads(state) for *_, state in log]
    # runc 1.1 says "created" in poststart, where the specification has "running".
    running = "running" if RUNTIME == KATA else "created"
    assert [state["status"] for state in states] == ["creating"] * 3 + [running, "stopped"]
    assert {state["id"] for state in states} == {container}
    assert {state["annotations"]["who"] for state in states} == {"me"}
    networks = [own for _, own, *_ in log]
    here = node.run(["readlink", "/proc/self/ns/net"]).stdout.strip()
    pods = log[0][2]
    assert pods not in (here, "none")
    told = [told for _, _, told, _ in log]
    assert networks[:2] + networks[3:] == [here] * 4
    assert told[:2] + told[3:] == [pods, pods, pods, "none"]
    if RUNTIME == KATA:  # runc's createContainer has another pid namespace than its /proc
        assert (networks[2], told[2]) == (pods, pods)


@pytest.mark.usefixtures("home")
def test_failing_hook_is_told_and_its_container_is_not_there(node: Node, ctr: Ctr) -> None:
    broken = {"path": "/bin/sh", "args": ["sh", "-c", "echo no bridge >&2; exit 3"]}
    write_config(node, {"createRuntime": [broken], "poststop": [hook("poststop")]}, "true")
    container = fresh_id("broken")
    done = node.run(argv(container), check=False)
    assert done.returncode != 0
    assert "no bridge" in done.stderr
    if RUNTIME == KATA:
        assert f"hook createRuntime[0] /bin/sh of container {container} exited with 3" in (
            done.stderr
        )
    assert ctr.status(container) is None
    assert [json.loads(state)["status"] for *_, state in read_log(node)] == ["stopped"]


@pytest.mark.usefixtures("home", "kata_only")
def test_shim_that_is_killed_while_a_hook_runs_leaves_nothing_and_runs_poststop(
    node: Node, ctr: Ctr
) -> None:
    hooks = {"createRuntime": [hook("createRuntime")], "poststop": [hook("poststop")]}
    write_config(node, hooks, "true")
    node.write(f"{_HOME}/hang", "")
    process = node.popen(argv(fresh_id("killed")), stderr=subprocess.DEVNULL)
    wait_until(lambda: len(read_log(node)) == 1)
    assert node.find("sleep 1000")
    node.path(f"{_HOME}/hang").unlink()
    (shim,) = find_shims(ctr)
    node.signal(shim.pid, "KILL")
    assert process.wait(30) != 0
    wait_until(lambda: len(read_log(node)) == 2)
    assert json.loads(read_log(node)[1][3])["status"] == "stopped"
    wait_until(lambda: not node.find("sleep 1000"))
