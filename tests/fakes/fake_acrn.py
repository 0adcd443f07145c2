"""A program that speaks as acrn-dm does and runs no guest: nobody here has an ACRN.

    path = write_program(directory, "reset")       # an executable; the word is its scenario

What it does is what ACRN's devicemodel was read to do. Scenarios change one thing:

    mute        answers no command               dies         a device can't be made
    nothing     makes no device                  garbled      the monitor sends no JSON
    poweroff    the guest switches itself off    triple-fault the guest faults, or reboots so
    reset       the guest is reset in place      refuses      every rescan fails
    no-tap      opens no tap, and doesn't say so
    late        acknowledges a rescan after 0.5 s, with an event before it
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import json
import os
import signal
import socket
import struct
import sys
import time
from pathlib import Path
from typing import NoReturn

OPTIONS = {"-m", "--cpu_affinity", "--cmd_monitor", "--logger_setting", "-k", "-B", "-l", "-r"}
SET_GUEST_CID = 0x4008AF60
TUNSETIFF = 0x400454CA
TAP, NO_PI = 0x0002, 0x1000
MAX_NAME = 15
EMPTY = "nodisk"


def write_program(directory: Path, scenario: str = "") -> Path:
    """Write the executable that plays this scenario."""
    path = directory / f"acrn-dm-{scenario or 'plain'}"
    root = str(Path(__file__).parents[2])
    path.write_text(
        f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {root!r})\n"
        f"from tests.fakes.fake_acrn import main\nmain({scenario!r})\n"
    )
    path.chmod(0o755)
    return path


def write_kernel(directory: Path) -> Path:
    """Write what passes for a bzImage."""
    path = directory / "bzImage"
    path.write_bytes(bytes(0x202) + b"HdrS" + bytes(4096))
    return path


class FakeAcrn:
    """One machine: its slots, its monitor."""

    def __init__(self, scenario: str, arguments: list[str]) -> None:
        self.scenario = scenario
        self.options: dict[str, str] = {}
        self.slots: dict[int, str] = {}
        self.kept: list[object] = []
        self.ready: socket.socket | None = None
        self._parse(arguments)

    def _parse(self, arguments: list[str]) -> None:
        *pairs, name = arguments
        if len(pairs) % 2 or len(name) > MAX_NAME:
            _end(1, f"The name of the VM exceeds the maximum length: {name}")
        for option, value in zip(pairs[::2], pairs[1::2], strict=True):
            if option == "-s":
                slot, _, device = value.partition(",")
                self.slots[int(slot.partition(":")[0])] = device
            elif option in OPTIONS:
                self.options[option] = value
            else:
                _end(1, f"Usage: acrn-dm, not {option}")
        for option in ("-k", "-r"):
            if option in self.options:
                os.close(os.open(self.options[option], os.O_RDONLY))

    def make_devices(self) -> None:
        """As init_pci does, in the order of their slots."""
        if self.scenario == "nothing":
            signal.pause()
        for slot, device in sorted(self.slots.items()):
            kind, _, options = device.partition(",")
            if self.scenario == "dies" and kind == "virtio-rnd":
                _end(1, f"pci {kind} init failed")
            if kind == "virtio-blk" and options != EMPTY:
                self._open(slot, options)
            elif kind == "virtio-net" and self.scenario != "no-tap":
                self._open_tap(options)
            elif kind == "vhost-vsock":
                self._take_cid(int(options.removeprefix("cid=")))
            elif kind == "virtio-console":
                self.connect_ready(options)

    def connect_ready(self, options: str) -> None:
        """A console port of type "socket", which is a client."""
        backend, _, rest = options.partition(":ready=")
        path, _, role = rest.partition(":")
        assert (backend, role) == ("socket", "client")
        self.ready = socket.socket(socket.AF_UNIX)
        self.ready.connect(path)

    def _open(self, slot: int, options: str) -> None:
        path, *words = options.split(",")
        assert set(words) <= {"ro", "writeback"}, words
        fd = os.open(path, os.O_RDONLY if "ro" in words else os.O_RDWR)
        self.slots[slot] = "filled"
        _say(f"slot {slot} has {os.fstat(fd).st_size} bytes {'ro' if 'ro' in words else 'rw'}")

    def _open_tap(self, options: str) -> None:
        tap, mac = options.split(",")
        name = tap.removeprefix("tap=")
        fd = os.open("/dev/net/tun", os.O_RDWR)
        self.kept.append(fd)
        fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", name.encode(), TAP | NO_PI))
        _say(f"{name} is opened for {mac.removeprefix('mac=')}")

    def _take_cid(self, cid: int) -> None:
        with contextlib.suppress(FileNotFoundError):
            fd = os.open("/dev/vhost-vsock", os.O_RDWR)
            self.kept.append(fd)
            # The real one doesn't look at the answer.
            with contextlib.suppress(OSError):
                fcntl.ioctl(fd, SET_GUEST_CID, struct.pack("<Q", cid))
                _say(f"cid {cid} is taken")

    def serve(self, listener: socket.socket) -> None:
        """One client at a time; a command is what one read returns."""
        while True:
            client, _ = listener.accept()
            while data := client.recv(4096):
                if self.scenario == "garbled":
                    client.sendall(b"who is there?")
                elif self.scenario != "mute":
                    self._obey(client, json.loads(data))

    def _obey(self, client: socket.socket, command: dict[str, str]) -> None:
        match command:
            case {"command": "register_vm_event_client"}:
                self._send(client, {"ack": 0})
                self._play(client)
            case {"command": "blkrescan", "arguments": arguments}:
                done = self._rescan(arguments)
                if self.scenario == "late":
                    time.sleep(0.5)
                    # What it has to tell of the clock, which nobody asked for, and cut in two.
                    client.sendall(b'{\n\t"vm_event":\t0,\n\t"delta_ti')
                    client.sendall(b'me":\t3,\n\t"last_time":\t4\n}')
                self._send(client, {"ack": 0 if done else -1})
            case {"command": "destroy"}:
                self._send(client, {"ack": 0})
            case _:
                _say(f"Command {command} is not supported.")

    def _rescan(self, arguments: str) -> bool:
        slot, _, options = arguments.partition(",")
        if self.scenario == "refuses" or self.slots.get(int(slot)) != f"virtio-blk,{EMPTY}":
            _say("Replacing valid backend file not supported!")
            return False
        self._open(int(slot), options)
        return True

    def _play(self, client: socket.socket) -> None:
        _say("GUEST-READY")
        if self.scenario == "poweroff":
            self._send(client, {"vm_event": 1})
            _end(0)
        if self.scenario == "triple-fault":
            self._send(client, {"vm_event": 2}, {"vm_event": 1})
            _end(0)
        if self.scenario == "reset":
            assert self.ready is not None
            self.ready.close()

    @staticmethod
    def _send(client: socket.socket, *messages: dict[str, int]) -> None:
        data = b"".join(json.dumps(one, indent="\t").encode() for one in messages)
        # It sends its own end of the connection along.
        own = array.array("i", [client.fileno()]).tobytes()
        client.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, own)])


def _say(text: str) -> None:
    os.write(1, f"{text}\r\n".encode())


def _end(code: int, words: str = "") -> NoReturn:
    if words:
        _say(words)
    os._exit(code)


def main(scenario: str) -> None:
    """Play a scenario with the command line."""
    signal.signal(signal.SIGINT, lambda *_: os._exit(0))
    machine = FakeAcrn(scenario, sys.argv[1:])
    with socket.socket(socket.AF_UNIX) as listener:
        path = machine.options["--cmd_monitor"]
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        listener.bind(path)
        listener.listen(1)
        machine.make_devices()
        machine.serve(listener)
