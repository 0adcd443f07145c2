"""A node: a machine of a test's own made of namespaces, with a containerd in it.

Mounts, network, pids, IPC and hostname are private; /run, /tmp and /dev/shm are empty tmpfs, /etc
is an overlay. Whatever a shim does in it is seen from outside through `path()` and gone with
`stop()`: the node's PID 1 dies with the test process (PDEATHSIG), and everything with it. Only
cgroups aren't private; names carry the node's name, and `stop()` removes them.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Self

from tests.harness import foreign_agent, oci_image, pod_network, registry, vmm
from tests.harness.configuration import CONFIGURATION, configurations
from tests.harness.containerd_daemon import ADDRESS, ContainerdDaemon, ContainerdVersion, tool_cache
from tests.harness.patience import patient, read_line

REPOSITORY = Path(__file__).resolve().parents[2]
BUILD = REPOSITORY / "build"
#: containerd's namespace of everything that came over CRI.
CRI_NAMESPACE = "k8s.io"
_BASE_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_counter = itertools.count(1)
_Output = int | IO[bytes] | None


@dataclass(frozen=True)
class NodeProcess:
    """A process of a node; `directory` is its /proc entry, seen from outside."""

    pid: int
    parent: int
    state: str
    start_ticks: int
    comm: str
    command: str
    directory: Path


class Node:
    """A private machine with one containerd. `name` is also its containerd namespace."""

    def __init__(self, version: ContainerdVersion, *, log_directory: Path | None = None) -> None:
        self.name = f"kt{os.getpid()}n{next(_counter)}"
        self.log_directory = log_directory or BUILD / "tests" / "logs"
        self.log_directory.mkdir(parents=True, exist_ok=True)
        self.version = version
        self.containerd = ContainerdDaemon(self, version)
        self.pid = 0
        self._holder: subprocess.Popen[bytes] | None = None
        self._started: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Make the namespaces, start containerd and import the images; undone on failure."""
        try:
            self._start_holder()
            self._configure_shim()
            pod_network.configure(self)
            self.containerd.start()
            self.import_images(self.name, CRI_NAMESPACE)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End every process of the node and remove its cgroups. Safe to call again."""
        try:
            if self._holder is not None:
                # The kernel reports PID 1 dead only after every process of its namespace is.
                os.kill(self.pid or self._holder.pid, signal.SIGKILL)
                self._holder.wait(patient(10))
                self._holder = None
        finally:
            try:
                self._reap_started()
            finally:
                self._remove_cgroups()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *details: object) -> None:
        self.stop()

    def path(self, inside: str) -> Path:
        """Return where the node's absolute path `inside` is seen from outside."""
        return Path(f"/proc/{self.pid}/root{inside}")

    def write(self, inside: str, text: str) -> None:
        """Write a file of the node, with the directories above it."""
        path = self.path(inside)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def argv(self, command: Sequence[str]) -> list[str]:
        """Return the argv that runs `command` inside the node."""
        return [
            "nsenter",
            "-t",
            str(self.pid),
            "-m",
            "-n",
            "-p",
            "-i",
            "-u",
            "--wd=/",
            "--",
            *command,
        ]

    def environment(self, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        """Return the environment of a process in the node: shim first in PATH, then containerd."""
        path = f"{BUILD / 'bin'}:{self.version.directory}:{_BASE_PATH}"
        return {
            "PATH": path,
            "HOME": "/root",
            "LANG": "C.UTF-8",
            "CONTAINERD_ADDRESS": ADDRESS,
            "CONTAINERD_NAMESPACE": self.name,
            "CONTAINERD_SUPPRESS_DEPRECATION_WARNINGS": "1",
            **(extra or {}),
        }

    def popen(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        stdin: _Output = None,
        stdout: _Output = None,
        stderr: _Output = None,
        wrapper: Sequence[str] = (),
    ) -> subprocess.Popen[bytes]:
        """Start a command in the node. Its pid is that of nsenter, which passes its status on."""
        process = subprocess.Popen(
            [*wrapper, *self.argv(command)],
            env=self.environment(env),
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
        )
        self._started.append(process)
        return process

    def run(
        self,
        command: Sequence[str],
        *,
        check: bool = True,
        timeout_s: float = 60,
        stdin: bytes = b"",
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in the node to its end; with `check` a failure raises AssertionError."""
        done = subprocess.run(
            self.argv(command),
            env=self.environment(),
            input=stdin,
            capture_output=True,
            timeout=patient(timeout_s),
            check=False,
        )
        result = subprocess.CompletedProcess(
            list(command),
            done.returncode,
            done.stdout.decode(errors="replace"),
            done.stderr.decode(errors="replace"),
        )
        if check and done.returncode != 0:
            raise AssertionError(
                f"{' '.join(command)} exited with {done.returncode}:\n"
                f"{result.stdout}{result.stderr}"
            )
        return result

    def processes(self) -> list[NodeProcess]:
        """List the processes of the node but its PID 1 and the zombies, by their pids inside."""
        found = (
            _read_process(directory)
            for directory in self.path("/proc").iterdir()
            if directory.name.isdigit() and directory.name != "1"
        )
        return [process for process in found if process is not None and process.state != "Z"]

    def find(self, text: str) -> list[NodeProcess]:
        """List the processes whose command line contains `text`."""
        return [process for process in self.processes() if text in process.command]

    def serve_images(self, archives: Sequence[Path]) -> None:
        """Serve the images of OCI archives to containerd, whatever registry it pulls them from."""
        directory = f"{registry.CONFIGURATION}/_default"
        self.write(f"{directory}/hosts.toml", registry.mirror_configuration())
        program = [sys.executable, "-I", "-S", registry.__file__, str(registry.PORT)]
        process = self.popen(
            [*program, *map(str, archives)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        if read_line(process.stdout) != b"ready\n":
            raise RuntimeError("the node's registry didn't start")

    def signal(self, pid: int, name: str) -> None:
        """Send a signal to a process of the node; `pid` is the one inside."""
        self.run(["kill", "-s", name, str(pid)])

    def cgroups(self) -> list[Path]:
        """Return the cgroup directories, of every hierarchy, that bear the node's name."""
        own = re.compile(rf"{self.name}(?!\d)")  # kt1n1 has no part in what is kt1n10's
        found: list[Path] = []
        for mountpoint in _cgroup_mounts():
            for parent, names, _ in os.walk(mountpoint):
                paths = [Path(parent, name) for name in names]
                found += [path for path in paths if own.search(str(path))]
        return found

    def _start_holder(self) -> None:
        kept = [str(REPOSITORY), str(tool_cache()), sys.prefix, sys.base_prefix]
        if program := vmm.find_program(vmm.NAME):
            kept.append(str(program.parent))
        settings = json.dumps({"name": self.name, "kept": [p for p in kept if Path(p).exists()]})
        holder = Path(__file__).with_name("holder.py")
        log = (self.log_directory / f"{self.name}-holder.log").open("wb")
        self._holder = subprocess.Popen(
            [
                "setpriv",
                "--pdeathsig",
                "KILL",
                "unshare",
                "--mount",
                "--net",
                "--pid",
                "--ipc",
                "--uts",
                "--fork",
                "--kill-child=KILL",
                "--mount-proc",
                sys.executable,
                "-I",
                "-S",
                str(holder),
                settings,
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
        )
        log.close()
        assert self._holder.stdout is not None
        with self._holder.stdout as answer:
            if read_line(answer) != b"ready\n":
                raise RuntimeError(f"no namespaces for a node, see {log.name}")
        unshare = self._holder.pid
        children = Path(f"/proc/{unshare}/task/{unshare}/children").read_text().split()
        self.pid = int(children[0])

    def _reap_started(self) -> None:
        while self._started:
            process = self._started.pop()
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            process.wait(patient(10))
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream is not None:
                    with contextlib.suppress(BrokenPipeError):
                        stream.close()

    def _configure_shim(self) -> None:
        for name, text in configurations(BUILD / "etc").items():
            self.write(f"{CONFIGURATION.rpartition('/')[0]}/{name}", text)
        if agent := foreign_agent.find_agent():
            settings = foreign_agent.write_image(self, BUILD / "guest", agent)
            drop_in = f"{CONFIGURATION.rpartition('/')[0]}/config.d/10-agent.toml"
            self.write(drop_in, f"[hypervisor.{vmm.NAME}]\n{settings}")

    def import_images(self, *namespaces: str) -> None:
        """Import the tests' busybox and pause image into namespaces of containerd."""
        for archive in _images():
            for namespace in namespaces:
                self.run(["ctr", "-n", namespace, "images", "import", str(archive)])

    def _remove_cgroups(self) -> None:
        for directory in sorted(self.cgroups(), key=lambda path: -len(path.parts)):
            with contextlib.suppress(OSError):
                directory.rmdir()


@functools.cache
def _images() -> tuple[Path, ...]:
    directory = BUILD / "tests" / "images"
    return oci_image.write_busybox_image(directory), oci_image.write_pause_image(directory)


def _read_process(directory: Path) -> NodeProcess | None:
    try:
        head, _, tail = (directory / "stat").read_text().rpartition(")")
        command = (directory / "cmdline").read_bytes().replace(b"\0", b" ")
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = tail.split()
    return NodeProcess(
        int(directory.name),
        int(fields[1]),
        fields[0],
        int(fields[19]),
        head.partition("(")[2],
        command.decode(errors="replace").strip(),
        directory,
    )


def _cgroup_mounts() -> list[str]:
    rows = (line.split() for line in Path("/proc/self/mounts").read_text().splitlines())
    return [row[1] for row in rows if row[2] in {"cgroup", "cgroup2"}]
