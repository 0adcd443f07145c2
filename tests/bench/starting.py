"""Runs inside a node: times a shim's `start` as containerd calls it, cold each time.

    python -m tests.bench.starting BINARY COUNT

Prints one JSON line a run: milliseconds from the exec to the address on stdout, and from there to
the first answer (Connect). Each shim is then told to shut down.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.harness.shim_client import ShimClient

_ADDRESS = "/run/containerd/containerd.sock"


def make_bundle(directory: Path) -> None:
    """Lay out what containerd's bundle holds before `start`."""
    (directory / "rootfs").mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(
        {"ociVersion": "1.0.2", "process": {"args": ["true"], "cwd": "/"}, "annotations": {}}))
    os.mkfifo(directory / "log", 0o700)


def time_start(binary: str, name: str, bundle: Path) -> tuple[float, float]:
    """Start one shim, ask it one question, and end it; return both times in milliseconds."""
    reader = os.open(bundle / "log", os.O_RDWR | os.O_NONBLOCK)
    argv = [binary, "-namespace", "bench", "-address", _ADDRESS, "-publish-binary",
            "/usr/bin/containerd", "-id", name, "start"]
    environment = {**os.environ, "GOMAXPROCS": "2", "TTRPC_ADDRESS": f"{_ADDRESS}.ttrpc",
                   "GRPC_ADDRESS": _ADDRESS, "NAMESPACE": "bench", "MAX_SHIM_VERSION": "2"}
    begin = time.perf_counter()
    with subprocess.Popen(argv, cwd=bundle, env=environment, stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None
        address = process.stdout.read().decode()
        printed = time.perf_counter()
    path = address.strip().removeprefix("unix://")
    if not path.startswith("/"):
        raise RuntimeError(f"{binary} start said: {address}")
    with ShimClient(Path(path)) as shim:
        shim.connect(name)
        answered = time.perf_counter()
        with contextlib.suppress(ConnectionError):  # it may be gone before it has answered
            shim.shutdown(name)
    os.close(reader)
    return (printed - begin) * 1000, (answered - printed) * 1000


def main() -> None:
    """Measure COUNT starts of BINARY."""
    binary, count = sys.argv[1], int(sys.argv[2])
    with tempfile.TemporaryDirectory() as directory:
        for number in range(count):
            bundle = Path(directory, f"bench{number}")
            make_bundle(bundle)
            print(json.dumps(time_start(binary, bundle.name, bundle)), flush=True)


if __name__ == "__main__":
    main()
