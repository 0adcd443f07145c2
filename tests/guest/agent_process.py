"""Runs the real agent as a plain process, in namespaces of its own, and talks to it.

The agent gets a private /run, pid, mount, network, UTS and IPC namespaces; only its cgroups are the
machine's, and `running_agent` removes them.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest
import trio

from agent_proto.client import AgentClient
from agent_proto.pb import agent_pb2, oci_pb2

ROOT: Final = Path(__file__).parents[2]
AGENT: Final = ROOT / "build/agent-target/x86_64-unknown-linux-gnu/release/kata-agent"
BUSYBOX: Final = shutil.which("busybox") or "/usr/bin/busybox"
APPLETS: Final = ("sh", "cat", "sleep", "true", "echo", "dd", "id", "stty", "touch", "ln", "kill")
START_DEADLINE_S: Final = 20.0
STEP_DEADLINE_S: Final = 60.0

_UNIFIED: Final = Path("/sys/fs/cgroup/unified")
_CGROUPS: Final = (_UNIFIED if _UNIFIED.exists() else Path("/sys/fs/cgroup")) / "kata"
_ENTER: Final = (
    "unshare",
    "--mount",
    "--pid",
    "--fork",
    "--kill-child",
    "--net",
    "--uts",
    "--ipc",
    "--mount-proc",
    "--",
    "sh",
    "-c",
    # The image has no programs that the agent calls, so neither has this.
    'mount -t tmpfs tmpfs /run && mount -t tmpfs tmpfs /usr/sbin && exec "$@"',
    "sh",
)

needs_agent = pytest.mark.skipif(
    os.geteuid() != 0 or not AGENT.exists() or not Path(BUSYBOX).exists(),
    reason="needs root, the agent (`make agent`) and a static busybox",
)


@dataclass(frozen=True)
class Guest:
    """A connection to the agent, and a root filesystem for containers."""

    client: AgentClient
    socket_path: Path
    rootfs: Path

    async def create(self, cid: str, args: Sequence[str], *, terminal: bool = False) -> None:
        request = agent_pb2.CreateContainerRequest(
            container_id=cid, exec_id=cid, OCI=spec(self.rootfs, args, terminal=terminal)
        )
        await self.client.create_container(request)

    async def start(self, cid: str, *args: str, terminal: bool = False) -> None:
        await self.create(cid, args, terminal=terminal)
        await self.client.start_container(cid)

    async def exec(self, cid: str, exec_id: str, *args: str, terminal: bool = False) -> None:
        process = oci_pb2.Process(Args=args, Cwd="/", Env=["PATH=/bin"], Terminal=terminal)
        await self.client.exec_process(
            agent_pb2.ExecProcessRequest(container_id=cid, exec_id=exec_id, process=process)
        )

    async def output(self, cid: str, exec_id: str = "") -> bytes:
        """Everything until the end of stdout."""
        parts = []
        while part := await self.client.read_stdout(cid, exec_id or cid):
            parts.append(part)
        return b"".join(parts)


def spec(rootfs: Path, args: Sequence[str], *, terminal: bool = False) -> oci_pb2.Spec:
    """The smallest spec in which a shell is comfortable."""
    made = oci_pb2.Spec(Version="1.0.2")
    made.Process.Args.extend(args)
    made.Process.Env.append("PATH=/bin")
    made.Process.Cwd = "/"
    made.Process.Terminal = terminal
    for names in (
        made.Process.Capabilities.Bounding,
        made.Process.Capabilities.Effective,
        made.Process.Capabilities.Permitted,
    ):
        names.extend(["CAP_KILL", "CAP_MKNOD", "CAP_DAC_OVERRIDE"])
    made.Root.Path = str(rootfs)
    for destination, kind, options in (
        ("/proc", "proc", ["nosuid", "noexec", "nodev"]),
        ("/dev", "tmpfs", ["nosuid", "mode=755"]),
        ("/dev/pts", "devpts", ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "gid=5"]),
        ("/tmp", "tmpfs", ["nosuid", "nodev"]),
    ):
        made.Mounts.add(destination=destination, type=kind, source=kind, options=options)
    for kind in ("mount", "pid", "ipc", "uts", "network", "cgroup"):
        made.Linux.Namespaces.add(Type=kind)
    return made


def make_rootfs(path: Path) -> Path:
    for directory in ("bin", "proc", "dev", "tmp", "etc"):
        (path / directory).mkdir(parents=True)
    shutil.copy(BUSYBOX, path / "bin/busybox")
    for applet in APPLETS:
        (path / "bin" / applet).symlink_to("busybox")
    return path


async def connect(path: Path) -> socket.socket:
    """Dial the agent until it listens."""
    with trio.fail_after(START_DEADLINE_S):
        while True:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                sock.connect(str(path))
            except (FileNotFoundError, ConnectionRefusedError):
                sock.close()
                await trio.sleep(0.01)
            else:
                sock.setblocking(False)
                return sock


def _spawn(path: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([*_ENTER, str(AGENT), "--listen", f"unix:{path}"])


@contextlib.asynccontextmanager
async def running_agent(directory: Path) -> AsyncIterator[Guest]:
    """An agent with a sandbox; all of it is gone at the end."""
    path = directory / "agent.sock"
    rootfs = make_rootfs(directory / "rootfs")
    before = set(_CGROUPS.iterdir()) if _CGROUPS.exists() else set()
    process = _spawn(path)
    try:
        client = AgentClient(await connect(path))
        async with trio.open_nursery() as nursery:
            await nursery.start(client.run)
            await client.create_sandbox(agent_pb2.CreateSandboxRequest(hostname="pod"))
            with trio.fail_after(STEP_DEADLINE_S):
                yield Guest(client=client, socket_path=path, rootfs=rootfs)
            client.close()
            nursery.cancel_scope.cancel()
    finally:
        process.kill()
        process.wait()
        await _remove_cgroups(before)


async def _remove_cgroups(before: set[Path]) -> None:
    """Containers that a test left running die with the pid namespace, a little later."""
    if not _CGROUPS.exists():
        return
    with trio.fail_after(STEP_DEADLINE_S):
        for path in {entry for entry in _CGROUPS.iterdir() if entry.is_dir()} - before:
            # The kernel's notification of this file would need inotify; the deadline bounds it.
            while "populated 1" in (path / "cgroup.events").read_text():  # noqa: ASYNC110
                await trio.sleep(0.01)
            path.rmdir()
    if not before:
        with contextlib.suppress(OSError):
            _CGROUPS.rmdir()
