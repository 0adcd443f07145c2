"""PID 1 of a node: prepares the private mounts, says `ready`, then reaps orphans until killed.

Runs as a program inside fresh mount, net, pid, ipc and uts namespaces (see node.py), standard
library only. Its death ends every process of the node, because it is PID 1 of their namespace.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

_MS_BIND, _MS_MOVE, _MS_REC, _MS_PRIVATE, _MS_SHARED = 0x1000, 0x2000, 0x4000, 1 << 18, 1 << 20
_libc = ctypes.CDLL(None, use_errno=True)
#: Directories that a node has of its own, with their modes.
_PRIVATE = {"/run": 0o755, "/tmp": 0o1777, "/dev/shm": 0o1777}


def mount(source: str, target: str, kind: str, flags: int = 0, data: str = "") -> None:
    """Mount, or raise OSError naming the target."""
    if _libc.mount(source.encode(), target.encode(), kind.encode(), flags, data.encode()) != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), target)


def hide_directories(kept: list[str]) -> None:
    """Put a tmpfs over each private directory; what lies in it and is kept stays where it was."""
    for directory, mode in _PRIVATE.items():
        inside = [path for path in kept if path.startswith(directory + "/")]
        handles = [os.open(path, os.O_PATH) for path in inside]
        mount("node", directory, "tmpfs", 0, f"mode={mode:o},size=6g")
        for path, handle in zip(inside, handles, strict=True):
            Path(path).mkdir(parents=True, exist_ok=True)
            mount(f"/proc/self/fd/{handle}", path, "none", _MS_BIND | _MS_REC)
            os.close(handle)


def overlay(directory: str) -> None:
    """Let the node write below a directory without changing the machine's."""
    upper, work = (Path("/run/.node", kind + directory) for kind in ("upper", "work"))
    upper.mkdir(parents=True)
    work.mkdir(parents=True)
    options = f"lowerdir={directory},upperdir={upper},workdir={work}"
    mount("overlay", directory, "overlay", 0, options)


def prepare(name: str, kept: list[str]) -> None:
    """Make the node's mounts, its hostname and its loopback interface."""
    mount("none", "/", "none", _MS_REC | _MS_PRIVATE)
    hide_directories(kept)
    for directory in ("/run/netns", "/run/lock"):
        Path(directory).mkdir()
    overlay("/etc")
    overlay("/var/lib")
    # As with systemd: what is mounted later is seen in namespaces that were copied before.
    mount("none", "/", "none", _MS_REC | _MS_SHARED)
    socket.sethostname(name)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)


def reap_for_ever() -> None:
    """Wait for children that lost their parent; nothing else ends this process but SIGKILL."""
    while True:
        signal.sigwait({signal.SIGCHLD})
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            continue


def main() -> None:
    """Set the node up as the JSON of argv[1] says."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    settings = json.loads(sys.argv[1])
    prepare(settings["name"], settings["kept"])
    print("ready", flush=True)
    reap_for_ever()


if __name__ == "__main__":
    main()
