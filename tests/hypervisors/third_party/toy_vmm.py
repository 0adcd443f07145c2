"""The toy VMM, a program that plays its guest: it says on its console what scratch_guest.py would.

It stands alone, in one file: a VMM's own user can read no checkout. QMP is on descriptor 3.

`toy.agent=PATH` on the kernel's command line makes the guest one with an agent: whoever connects to
its vsock device is led to the socket at PATH.
"""

import json
import os
import random
import socket
import sys
import threading
from pathlib import Path
from typing import Any

QMP_FD = 3
FLOOD_BYTES = 60000


class Machine:
    """What the argument describes, and what has become of it."""

    def __init__(self, description: dict[str, Any]) -> None:
        words = description["cmdline"].split()
        self.options = dict(word.partition("=")[::2] for word in words)
        self.disks: list[str] = description["disks"]
        self.macs: list[str] = description["macs"]
        self.memory_mib: int = description["memory_mib"]
        self.qmp = socket.socket(fileno=QMP_FD)
        self.listener: socket.socket | None = None
        if description["vsock"]:
            self.listener = socket.socket(socket.AF_UNIX)
            self.listener.bind(description["vsock"])
            self.listener.listen()
            threading.Thread(target=self.take_connections, daemon=True).start()

    def take_connections(self) -> None:
        """Lead connections to the agent; without one, the device answers by closing."""
        assert self.listener is not None
        while True:
            connection, _ = self.listener.accept()
            if "toy.agent" not in self.options:
                connection.recv(64)
                connection.close()
                continue
            agent = socket.socket(socket.AF_UNIX)
            agent.connect(self.options["toy.agent"])
            for ends in ((connection, agent), (agent, connection)):
                threading.Thread(target=copy, args=ends, daemon=True).start()

    def tell(self, message: dict[str, Any]) -> None:
        self.qmp.sendall(json.dumps(message).encode() + b"\r\n")

    def event(self, name: str, **data: str) -> None:
        self.tell({"event": name, "data": data, "timestamp": {"seconds": 0, "microseconds": 0}})

    def end(self, reason: str) -> None:
        self.event("SHUTDOWN", reason=reason)
        os._exit(0)

    def play(self) -> None:
        """Boot, and do what the scenario says."""
        if self.listener is not None:
            say("VSOCK virtio:19")
        say("GUEST-READY")
        scenario = self.options.get("scenario")
        if scenario == "flood":
            os.write(1, random.randbytes(FLOOD_BYTES))
        if scenario == "panic":
            say("Kernel panic - not syncing: sysrq triggered crash")
            self.end("guest-panic")
        if scenario in ("poweroff", "flood"):
            self.end("guest-shutdown")
        if scenario == "reboot":
            self.end("guest-reset")
        self.show()

    def show(self) -> None:
        disks = "".join(f" {Path(node).name}" for node in self.disks)
        nets = "".join(f" {mac}" for mac in self.macs)
        say(f"STATE disks=[{disks} ] nets=[{nets} ] cpus=1 mem128={self.memory_mib // 128}.")

    def obey(self, command: dict[str, Any]) -> None:
        match command:
            case {"execute": "plug", "arguments": {"node": node}}:
                self.disks.append(node)
                self.show()
            case {"execute": "unplug", "arguments": {"node": node}}:
                self.disks.remove(node)
                self.show()
                self.event("DEVICE_DELETED", node=node)
            case {"execute": "stop"}:
                self.event("STOP")
            case {"execute": "cont"}:
                self.event("RESUME")
            case {"execute": "quit"}:
                self.tell({"return": {}, "id": command["id"]})
                self.end("host-qmp-quit")
        self.tell({"return": {}, "id": command["id"]})


def copy(source: socket.socket, target: socket.socket) -> None:
    """Pass on what comes, and its end."""
    while data := source.recv(65536):
        target.sendall(data)
    target.shutdown(socket.SHUT_WR)


def say(text: str) -> None:
    """A line on the console."""
    os.write(1, f"{text}\r\n".encode())


def main() -> None:
    """Run the machine that the argument describes."""
    machine = Machine(json.loads(sys.argv[1]))
    version = {"qemu": {"major": 9, "minor": 0, "micro": 0}, "package": "toy"}
    machine.tell({"QMP": {"version": version, "capabilities": []}})
    commands = machine.qmp.makefile("r")
    negotiated = False
    for line in commands:
        machine.obey(json.loads(line))
        if not negotiated:
            negotiated = True
            machine.play()


if __name__ == "__main__":
    main()
