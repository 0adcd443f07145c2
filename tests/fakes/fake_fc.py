"""A program that speaks as Firecracker does and runs no guest: for tests without KVM.

    path = write_program(directory, "panic")       # an executable; the word is its scenario

What it answers is what version 1.16 was heard to say (tests/vectors/fc). Scenarios change one
thing:

    mute             takes connections, answers nothing    old         says that it is version 1.11
    refuses-boot     400 to the boot source                strange     answers that are no JSON
    reboot, panic    what the guest does after the start   fault       the same, of the VMM itself
    deaf             its socket has a name, nobody listens  link        its vsock leads elsewhere
    early            ends before it listens                 file        a file instead of a socket
    garbled          log and metrics that nobody can read
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
from functools import partial
from pathlib import Path

import trio

from tests.fakes.fake_http_peer import ScriptedApi, Seen, answer


def write_program(directory: Path, scenario: str = "") -> Path:
    """Write the executable that plays this scenario."""
    path = directory / f"firecracker-{scenario or 'plain'}"
    root = str(Path(__file__).parents[2])
    path.write_text(
        f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {root!r})\n"
        f"from tests.fakes.fake_fc import main\nmain({scenario!r})\n"
    )
    path.chmod(0o755)
    return path


def fault(text: str) -> bytes:
    return answer(400, {"fault_message": text})


class FakeVmm:
    """One machine's state, and what is answered to each request."""

    def __init__(self, scenario: str) -> None:
        self.scenario = scenario
        self.drives: dict[str, bool] = {}
        self.state = "Not started"
        self.started = trio.Event()
        self.metrics = ""
        self._vsock: socket.socket | None = None

    async def reply(self, name: str, seen: Seen) -> bytes:
        if self.scenario == "mute":
            await trio.sleep_forever()
        await trio.lowlevel.checkpoint()
        result: bytes = getattr(self, name)(seen)
        return result

    def get_version(self, _: Seen) -> bytes:
        if self.scenario == "strange":
            return answer(200, b"version 1.16")
        version = "1.11.0" if self.scenario == "old" else "1.16.1"
        return answer(200, {"firecracker_version": version})

    def configure(self, seen: Seen) -> bytes:
        if self.scenario == "refuses-boot" and seen.target == "/boot-source":
            return fault("Boot source error: The kernel file cannot be opened")
        if seen.target == "/metrics":
            self.metrics = seen.body["metrics_path"]
        if seen.target == "/vsock":
            self._listen(seen.body["uds_path"])
        if seen.target.startswith("/network-interfaces/"):
            return fault("Open tap device failed: no such interface")
        return answer(204)

    def drive(self, seen: Seen) -> bytes:
        read_only = self.drives.setdefault(
            seen.body["drive_id"], seen.body.get("is_read_only", False)
        )
        try:
            with open(seen.body["path_on_host"], "rb" if read_only else "r+b") as stream:
                stream.seek(0, os.SEEK_END)
        except OSError as error:
            return fault(f"Unable to patch the block device: {error}")
        return answer(204)

    def _listen(self, path: str) -> None:
        if self.scenario == "link":
            os.symlink("/run/somebody-elses.sock", path)
            return
        self._vsock = socket.socket(socket.AF_UNIX)
        self._vsock.bind(path)
        self._vsock.listen()

    def actions(self, seen: Seen) -> bytes:
        if seen.body["action_type"] == "SendCtrlAltDel":
            self.end(0)
            return answer(204)
        os.write(1, b"GUEST-READY\r\n")
        self.state = "Running"
        if self.scenario == "garbled":
            self.say_metrics(b"{]\n" + b"x" * 70000 + b"\n[" * 9 + b"\n")
        self.started.set()
        return answer(204)

    def vm(self, seen: Seen) -> bytes:
        wanted = {"Paused": "Paused", "Resumed": "Running"}[seen.body["state"]]
        self.state = wanted
        return answer(204)

    def say_metrics(self, data: bytes) -> None:
        fd = os.open(self.metrics, os.O_WRONLY | os.O_NONBLOCK)
        # As the VMM: what the reader has no room for is lost.
        with contextlib.suppress(BlockingIOError):
            for start in range(0, len(data), 4096):
                os.write(fd, data[start : start + 4096])
        os.close(fd)

    def end(self, code: int) -> None:
        """End, but for the answer that is on its way."""
        os.write(2, b"")
        self.say_metrics(json.dumps({"seccomp": {"num_faults": int(code == 148)}}).encode() + b"\n")
        os._exit(code)


async def _play_guest(vmm: FakeVmm) -> None:
    """What a scenario's guest does when it runs, once the start's answer has gone out."""
    await vmm.started.wait()
    await trio.sleep(0.05)
    if vmm.scenario == "panic":
        os.write(1, b"Kernel panic - not syncing: sysrq\r\nRebooting in 1 seconds\r\n")
    if vmm.scenario in ("panic", "reboot"):
        vmm.end(0)
    if vmm.scenario == "fault":
        vmm.end(148)


async def _serve(scenario: str, path: str, log: int) -> None:
    vmm = FakeVmm(scenario)
    api = ScriptedApi()
    api.on("GET", "/version", partial(vmm.reply, "get_version"))
    for target in ("/metrics", "/machine-config", "/boot-source", "/vsock", "/entropy"):
        api.on("PUT", target, partial(vmm.reply, "configure"))
    for number in range(32):
        for name in (f"slot{number}", f"disk{number}"):
            api.on("PUT", f"/drives/{name}", partial(vmm.reply, "drive"))
            api.on("PATCH", f"/drives/{name}", partial(vmm.reply, "drive"))
        api.on("PUT", f"/network-interfaces/net{number}", partial(vmm.reply, "configure"))
    api.on("PUT", "/actions", partial(vmm.reply, "actions"))
    api.on("PATCH", "/vm", partial(vmm.reply, "vm"))
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    os.write(log, b"Running Firecracker v1.16.1\n")
    if scenario == "deaf":
        await trio.sleep_forever()
    listener.listen()
    listener.setblocking(False)
    os.write(log, f"Listening on API socket ({path!r}).\n".encode())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(api.serve, trio.socket.from_stdlib_socket(listener))
        nursery.start_soon(_play_guest, vmm)


def main(scenario: str) -> None:
    """Play a scenario with the paths of the command line."""
    arguments = dict(zip(sys.argv[1::2], sys.argv[2::2], strict=True))
    path, log_path = arguments.pop("--api-sock"), arguments.pop("--log-path")
    if set(arguments) != {"--id", "--level"}:
        sys.exit(f"unknown arguments {arguments}")
    log = os.open(log_path, os.O_WRONLY | os.O_NONBLOCK)
    if scenario == "early":
        os.write(log, b"Failed to open the API socket at: /run/api.sock\n")
        sys.exit(1)
    if scenario == "file":
        Path(path).touch()
        os.write(log, b"Running\n")
        trio.run(trio.sleep_forever)
    trio.run(_serve, scenario, path, log)
