"""Drive a node's containerd through `ctr`, the way a person would."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import pty
import select
import struct
import subprocess
import termios
import time
from collections.abc import Sequence
from typing import IO, TYPE_CHECKING

from tests.harness.oci_image import BUSYBOX_IMAGE
from tests.harness.patience import patient

if TYPE_CHECKING:
    from tests.harness.node import Node

KATA, RUNC = "io.containerd.kata.v2", "io.containerd.runc.v2"
#: `KATA_TEST_RUNTIME=io.containerd.runc.v2` runs the tests against runc's shim, the oracle of
#: what containerd's users expect.
RUNTIME = os.environ.get("KATA_TEST_RUNTIME", KATA)
_counter = itertools.count(1)
_Output = int | IO[bytes] | None


def fresh_id(stem: str) -> str:
    """Return a container id that no other test of this run uses."""
    return f"{stem}-{next(_counter)}"


class Ctr:
    """`ctr` on one node, with one runtime. Every call has a time limit."""

    def __init__(self, node: Node, runtime: str = RUNTIME) -> None:
        self.node = node
        self.runtime = runtime

    def run_argv(
        self,
        container: str,
        command: Sequence[str],
        options: Sequence[str] = (),
        image: str = BUSYBOX_IMAGE,
    ) -> list[str]:
        """Return the argv of `ctr run`."""
        return ["ctr", "run", "--runtime", self.runtime, *options, image, container, *command]

    def run(
        self,
        container: str,
        *command: str,
        options: Sequence[str] = ("--rm",),
        image: str = BUSYBOX_IMAGE,
        stdin: bytes = b"",
        check: bool = False,
        timeout_s: float = 60,
    ) -> subprocess.CompletedProcess[str]:
        """Run a container to its end; the status of ctr is the container's."""
        return self.node.run(
            self.run_argv(container, command, options, image),
            check=check,
            stdin=stdin,
            timeout_s=timeout_s,
        )

    def start(
        self, container: str, *command: str, options: Sequence[str] = (), image: str = BUSYBOX_IMAGE
    ) -> None:
        """Start a detached container without stdio; raises AssertionError if it doesn't start."""
        argv = self.run_argv(container, command, ["-d", "--null-io", *options], image)
        self.node.run(argv)

    def popen(
        self,
        container: str,
        *command: str,
        options: Sequence[str] = ("--rm",),
        stdin: _Output = None,
        stdout: _Output = None,
        stderr: _Output = None,
    ) -> subprocess.Popen[bytes]:
        """Start `ctr run` attached and return its process."""
        return self.node.popen(
            self.run_argv(container, command, options), stdin=stdin, stdout=stdout, stderr=stderr
        )

    def task(
        self, *arguments: str, check: bool = True, stdin: bytes = b"", timeout_s: float = 60
    ) -> subprocess.CompletedProcess[str]:
        """Run `ctr task …`."""
        return self.node.run(
            ["ctr", "task", *arguments], check=check, stdin=stdin, timeout_s=timeout_s
        )

    def exec(
        self,
        container: str,
        *command: str,
        options: Sequence[str] = (),
        stdin: bytes = b"",
        check: bool = False,
        timeout_s: float = 60,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in a running container; the status of ctr is the command's."""
        exec_id = fresh_id("exec")
        return self.task(
            "exec",
            "--exec-id",
            exec_id,
            *options,
            container,
            *command,
            check=check,
            stdin=stdin,
            timeout_s=timeout_s,
        )

    def status(self, container: str) -> str | None:
        """Return the state `ctr task ls` shows: RUNNING, STOPPED, …; None for no such task."""
        for row in self.task("ls").stdout.splitlines()[1:]:
            fields = row.split()
            if fields[0] == container:
                return fields[2]
        return None

    def pid(self, container: str) -> int:
        """Return the pid `ctr task ls` shows."""
        for row in self.task("ls").stdout.splitlines()[1:]:
            fields = row.split()
            if fields[0] == container:
                return int(fields[1])
        raise AssertionError(f"no task {container}")

    def metrics(self, container: str) -> dict[str, object]:
        """Return `ctr task metrics` as JSON."""
        text = self.task("metrics", "--format", "json", container).stdout
        result: dict[str, object] = json.loads(text)
        return result

    def remove(self, *containers: str) -> None:
        """Kill and delete tasks and containers, whatever state they are in."""
        for container in containers:
            self.task("rm", "-f", container, check=False)
            self.node.run(["ctr", "container", "rm", container], check=False)


class Terminal:
    """A process of the node on a pseudo-terminal, as if a person sat there."""

    def __init__(
        self, node: Node, argv: Sequence[str], *, rows: int = 24, columns: int = 80
    ) -> None:
        self._master, slave = pty.openpty()
        self._seen = b""
        self.resize(rows, columns)
        try:
            self.process = node.popen(
                argv,
                stdin=slave,
                stdout=slave,
                stderr=slave,
                env={"TERM": "vt100"},
                wrapper=["setsid", "--ctty", "--wait"],
            )
        finally:
            os.close(slave)

    def resize(self, rows: int, columns: int) -> None:
        """Change the window; the kernel sends SIGWINCH to ctr."""
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def resize_until(self, rows: int, columns: int, text: str, timeout_s: float = 30) -> None:
        """Change the window, as often as it takes until `text` shows up.

        ctr listens for changes from when its first Resize was answered. One that comes between
        that and its look at the window is lost, and nothing tells when it has begun.
        """
        deadline = time.monotonic() + patient(timeout_s)
        while True:
            # No signal comes of a size that the window has already.
            self.resize(rows, columns - 1)
            self.resize(rows, columns)
            again = time.monotonic() + patient(1)
            if self._read_until(text.encode(), min(again, deadline)) is not None:
                return
            assert time.monotonic() < deadline, self._missing(text, timeout_s)

    def send(self, text: str) -> None:
        os.write(self._master, text.encode())

    def expect(self, text: str, timeout_s: float = 30) -> str:
        """Read until `text` shows up and return what came before it; carriage returns don't count.

        (ctr leaves OPOST on, so that a line's end passes two terminals that add one each.)
        """
        before = self._read_until(text.encode(), time.monotonic() + patient(timeout_s))
        assert before is not None, self._missing(text, timeout_s)
        return before.decode(errors="replace")

    def _missing(self, text: str, timeout_s: float) -> str:
        return f"no {text!r} within {patient(timeout_s):g} s; seen: {self._seen!r}"

    def _read_until(self, wanted: bytes, deadline: float) -> bytes | None:
        """Take what comes before `wanted`, and it; None when it doesn't come in time."""
        while wanted not in self._seen:
            left_s = max(0.0, deadline - time.monotonic())
            if not select.select([self._master], [], [], left_s)[0]:
                return None
            try:
                self._seen += os.read(self._master, 65536).replace(b"\r", b"")
            except OSError:  # EIO: the other side is closed
                raise AssertionError(f"terminal closed before {wanted!r}: {self._seen!r}") from None
        before, _, self._seen = self._seen.partition(wanted)
        return before

    def close(self) -> int:
        """Wait for the process to end and return its status."""
        status = self.process.wait(patient(30))
        os.close(self._master)
        return status
