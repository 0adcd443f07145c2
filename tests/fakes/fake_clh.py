"""A program that speaks as Cloud Hypervisor does and runs no guest: for tests without KVM.

    path = write_program(directory, "panic")       # an executable; the word is its scenario

What it answers is what version 53 was heard to say (tests/vectors/clh). Scenarios change one thing:

    mute             answers nothing at all              old         says that it is version 51
    refuses-create   500 to vm.create                    no-address  a disk without a PCI address
    reboot, panic    what the guest does after the boot  poweroff    the same, and ends
    keeps-devices    the guest gives no device back      slow        a vCPU back after 2 s
    garbled          cut and foreign events              strange     answers that are no JSON
    link             its vsock socket leads elsewhere

Its vCPUs are threads that wait; while one is on its way out, vm.resize is answered with 429.
"""

from __future__ import annotations

import ctypes
import json
import os
import socket
import sys
import threading
from functools import partial
from pathlib import Path
from typing import Any

import trio

from tests.fakes.fake_http_peer import ScriptedApi, Seen, answer

API = "/api/v1"
PR_SET_NAME = 15
LOCKED = ["Error from API", "The disk could not be added to the VM", "Disk is locked"]


def write_program(directory: Path, scenario: str = "") -> Path:
    """Write the executable that plays this scenario."""
    path = directory / f"cloud-hypervisor-{scenario or 'plain'}"
    root = str(Path(__file__).parents[2])
    path.write_text(
        f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {root!r})\n"
        f"from tests.fakes.fake_clh import main\nmain({scenario!r})\n"
    )
    path.chmod(0o755)
    return path


class FakeVmm:
    """One machine's state, and what is answered to each request."""

    def __init__(self, scenario: str, monitor: int) -> None:
        self.scenario = scenario
        self.config: dict[str, Any] = {}
        self.booted = False
        self.slots: dict[str, int] = {}
        self.paths: dict[str, str] = {}
        self.informed = trio.Event()
        self._monitor = monitor
        self._vcpus: list[tuple[threading.Event, threading.Thread]] = []
        self._leaving: list[threading.Thread] = []
        self._vsock: socket.socket | None = None

    def emit(self, source: str, name: str, **properties: str) -> None:
        event = {
            "timestamp": {"secs": 0, "nanos": 1},
            "source": source,
            "event": name,
            "properties": properties or None,
        }
        os.write(self._monitor, json.dumps(event, indent=2).encode() + b"\n\n")

    async def reply(self, action: str, seen: Seen) -> bytes:
        if self.scenario == "mute":
            await trio.sleep_forever()
        await trio.lowlevel.checkpoint()
        method = getattr(self, action.replace("vm.", "").replace("-", "_").replace("vmm.", ""))
        result: bytes = method(seen.body)
        return result

    def ping(self, _: Any) -> bytes:
        if self.scenario == "strange":
            return answer(200, b"version 53")
        version = "v51.1" if self.scenario == "old" else "v53.0"
        return answer(200, {"build_version": version, "version": version, "pid": os.getpid()})

    def create(self, body: Any) -> bytes:
        if self.scenario == "refuses-create":
            return answer(500, ["Error from API", "The VM could not be created", "no such kernel"])
        self.config = body
        for device in (
            body.get("rng"),
            body.get("vsock"),
            *body.get("disks", ()),
            *body.get("fs", ()),
        ):
            if device is not None and "id" in device:
                self._place(device["id"])
        return answer(204)

    def boot(self, _: Any) -> bytes:
        if vsock := self.config.get("vsock"):
            if self.scenario == "link":
                os.symlink("/run/somebody-elses.sock", vsock["socket"])
            else:
                self._vsock = socket.socket(socket.AF_UNIX)
                self._vsock.bind(vsock["socket"])
                self._vsock.listen()
        self.booted = True
        self._have_vcpus(self.config["cpus"]["boot_vcpus"])
        self.emit("vm", "booting")
        self.emit("vm", "booted")
        os.write(1, b"GUEST-READY\r\n")
        if self.scenario == "garbled":
            os.write(self._monitor, b'{\n  "source": "vm", "ev\n\n[]\n\n' + b"x" * 40000 + b"\n\n")
            self.emit("vm", "paused")
        if self.scenario == "reboot":
            self.emit("vm", "rebooting")
        if self.scenario == "panic":
            os.write(1, b"Kernel panic - not syncing: sysrq\r\n")
            self.emit("guest", "panic", event="panic")
        return answer(204)

    def info(self, _: Any) -> bytes:
        self.informed.set()
        tree = {
            f"_virtio-pci-{name}": {"pci_bdf": f"0000:00:{slot:02x}.0", "children": [name]}
            for name, slot in self.slots.items()
        }
        return answer(
            200, {"config": self.config, "state": "Running", "device_tree": tree | {"__ioapic": {}}}
        )

    def add_net(self, body: Any) -> bytes:
        return self._added(body)

    def add_disk(self, body: Any) -> bytes:
        if not body["readonly"] and body["path"] in self.paths.values():
            return answer(500, LOCKED)
        if self.scenario == "no-address":
            return answer(200, {"id": body["id"]})
        self.paths[body["id"]] = body["path"]
        return self._added(body)

    def _added(self, body: Any) -> bytes:
        slot = self._place(body["id"])
        if not self.booted:
            return answer(204)
        return answer(200, {"id": body["id"], "bdf": f"0000:00:{slot:02x}.0"})

    def _place(self, name: str) -> int:
        slot = next(n for n in range(1, 32) if n not in self.slots.values())
        self.slots[name] = slot
        return slot

    def remove_device(self, body: Any) -> bytes:
        if body["id"] not in self.slots:
            return answer(404, ["Error from API", "No such device"])
        if self.scenario != "keeps-devices":
            slot = self.slots.pop(body["id"])
            self.paths.pop(body["id"], None)
            self.emit("vm", "device-removed", id=body["id"], bdf=f"0000:00:{slot:02x}.0")
        return answer(204)

    def resize(self, body: Any) -> bytes:
        if "desired_ram" in body:
            self.config["memory"]["size"] = body["desired_ram"]
        if "desired_vcpus" in body:
            if any(thread.is_alive() for thread in self._leaving):
                return answer(429, ["Too Many Requests"])
            self._have_vcpus(body["desired_vcpus"])
        return answer(204)

    def _have_vcpus(self, count: int) -> None:
        while len(self._vcpus) < count:
            end, named = threading.Event(), threading.Event()
            arguments = (len(self._vcpus), named, end)
            thread = threading.Thread(target=_vcpu, args=arguments, daemon=True)
            thread.start()
            named.wait()
            self._vcpus.append((end, thread))
        while len(self._vcpus) > count:
            end, thread = self._vcpus.pop()
            timer = threading.Timer(2 if self.scenario == "slow" else 0.01, end.set)
            timer.daemon = True
            timer.start()
            self._leaving.append(thread)

    def pause(self, _: Any) -> bytes:
        self.emit("vm", "paused")
        return answer(204)

    def resume(self, _: Any) -> bytes:
        self.emit("vm", "resumed")
        return answer(204)

    def power_button(self, _: Any) -> bytes:
        return answer(204)

    def shutdown(self, _: Any) -> bytes:
        self.emit("vmm", "shutdown")
        os._exit(0)


ACTIONS = {
    "GET": ("vmm.ping", "vm.info"),
    "PUT": (
        "vm.create", "vm.boot", "vm.add-net", "vm.add-disk", "vm.remove-device", "vm.resize",
        "vm.pause", "vm.resume", "vm.power-button", "vmm.shutdown",
    ),
}  # fmt: skip


def _vcpu(number: int, named: threading.Event, end: threading.Event) -> None:
    # Not by /proc: for a VMM every file system is read-only.
    ctypes.CDLL(None).prctl(PR_SET_NAME, f"vcpu{number}".encode(), 0, 0, 0)
    named.set()
    end.wait()


async def _serve(scenario: str, api_fd: int, monitor_fd: int) -> None:
    vmm = FakeVmm(scenario, monitor_fd)
    vmm.emit("vmm", "starting")
    api = ScriptedApi()
    for method, actions in ACTIONS.items():
        for action in actions:
            api.on(method, f"{API}/{action}", partial(vmm.reply, action))
    listener = trio.socket.from_stdlib_socket(socket.socket(fileno=api_fd))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(api.serve, listener)
        if scenario == "poweroff":
            await vmm.informed.wait()
            # Its answer, the last one of the launch, is still on its way.
            await trio.sleep(0.05)
            vmm.shutdown(None)


def main(scenario: str) -> None:
    """Play a scenario with the descriptors of the command line."""
    arguments = dict(zip(sys.argv[1::2], sys.argv[2::2], strict=True))
    if arguments.pop("--seccomp") != "true":
        sys.exit("no seccomp")
    api, monitor = (int(arguments.pop(name).removeprefix("fd=")) for name in
                    ("--api-socket", "--event-monitor"))  # fmt: skip
    if arguments:
        sys.exit(f"unknown arguments {arguments}")
    trio.run(_serve, scenario, api, monitor)
