"""Runs as a program inside of a node: starts shims as containerd does and times them.

    start_probe.py ROUNDS

Prints {shim: {"printed": [ms …], "answered": [ms …]}}. Standard library only, spawning by
posix_spawn: the probe's own share of the time is small and the same for each shim.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import sys
import tempfile
import time
from pathlib import Path

_SHIMS = ("containerd-shim-kata-v2", "containerd-shim-runc-v2")
_CONTAINERD = "/run/containerd/containerd.sock"
_HEADER = struct.Struct(">IIBB")
_SERVICE = b"containerd.task.v2.Task"
_CONFIG = {
    "ociVersion": "1.0.2",
    "process": {"args": ["true"], "cwd": "/", "user": {"uid": 0, "gid": 0}},
    "root": {"path": "rootfs"},
    "linux": {},
}


def frame(stream: int, method: bytes, container: str) -> bytes:
    """A ttrpc request whose message has the id as its first field, as those used here do."""
    message = b"\x0a" + bytes([len(container)]) + container.encode()
    fields = ((0x0A, _SERVICE), (0x12, method), (0x1A, message))
    body = b"".join(bytes([tag, len(value)]) + value for tag, value in fields)
    return _HEADER.pack(len(body), stream, 1, 0) + body


def start(shim: str, name: str, bundle: Path) -> tuple[float, float]:
    """Start a shim, ask it for a container's state, and end it; both times in milliseconds."""
    environment = {
        **os.environ,
        "TTRPC_ADDRESS": f"{_CONTAINERD}.ttrpc",
        "GRPC_ADDRESS": _CONTAINERD,
        "NAMESPACE": "bench",
        "GOMAXPROCS": "2",
        "MAX_SHIM_VERSION": "2",
    }
    argv = [shim, "-namespace", "bench", "-address", _CONTAINERD]
    argv += ["-publish-binary", "/usr/bin/containerd", "-id", name, "start"]
    os.chdir(bundle)
    log = os.open("log", os.O_RDWR | os.O_NONBLOCK)  # containerd is the fifo's reader
    ours, theirs = os.pipe()
    actions = [
        (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
        (os.POSIX_SPAWN_DUP2, theirs, 1),
        (os.POSIX_SPAWN_DUP2, theirs, 2),
    ]
    begin = time.perf_counter()
    pid = os.posix_spawnp(shim, argv, environment, file_actions=actions)
    os.close(theirs)
    with open(ours, "rb") as output:
        address = output.read().decode().strip()
    printed = time.perf_counter()
    os.waitpid(pid, 0)
    if not address.startswith("unix://"):
        raise SystemExit(f"{shim} start said: {address}")
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(10)
        connection.connect(address.removeprefix("unix://"))
        connection.sendall(frame(1, b"Connect", name))
        connection.recv(65536)
        answered = time.perf_counter()
        connection.sendall(frame(3, b"Shutdown", name))
        while connection.recv(65536):
            pass  # until the shim is gone: the next start has the machine for itself
    os.close(log)
    return (printed - begin) * 1000, (answered - printed) * 1000


def main() -> None:
    """Measure; the first round only warms the page cache."""
    rounds = int(sys.argv[1])
    found: dict[str, dict[str, list[float]]] = {
        shim: {"printed": [], "answered": []} for shim in _SHIMS
    }
    with tempfile.TemporaryDirectory() as directory:
        for number in range(rounds + 1):
            for shim in _SHIMS:
                bundle = Path(directory, f"{shim[17:21]}{number}")
                (bundle / "rootfs").mkdir(parents=True)
                (bundle / "config.json").write_text(json.dumps(_CONFIG))
                os.mkfifo(bundle / "log", 0o700)
                printed, answered = start(shim, bundle.name, bundle)
                if number:
                    found[shim]["printed"].append(printed)
                    found[shim]["answered"].append(answered)
        os.chdir("/")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
