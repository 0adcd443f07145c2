"""A containerd of a chosen version inside a node: its configuration, start, kill and restart."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tests.harness import pod_network, registry
from tests.harness.patience import patient

if TYPE_CHECKING:
    from tests.harness.node import Node

ADDRESS = "/run/containerd/containerd.sock"
STATE = "/run/containerd"
ROOT = "/run/containerd-root"
CONTAINERD_2 = "2.2.2"
CRI_TOOLS = "1.34.0"
_NOTIFY = "/run/.node/notify"
_START_S = 30.0

# Source: containerd docs/man/containerd-config.toml.5.md; a version 2 file is understood by 1.6
# and by 2.x. restrict_oom_score_adj: without CAP_SYS_RESOURCE a lower score can't be set.
_CONFIG = """\
version = 2
root = "{root}"
state = "{state}"
[grpc]
  address = "{address}"
[debug]
  level = "{level}"
[plugins."io.containerd.internal.v1.opt"]
  path = "{root}/opt"
[plugins."io.containerd.grpc.v1.cri"]
  restrict_oom_score_adj = true
  sandbox_image = "docker.io/library/pause:latest"
  stream_server_port = "0"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{cni_plugins}"
    conf_dir = "{cni_configuration}"
  [plugins."io.containerd.grpc.v1.cri".registry]
    config_path = "{registries}"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.kata]
    runtime_type = "io.containerd.kata.v2"
    pod_annotations = ["io.katacontainers.*"]
    privileged_without_host_devices = true
"""

# What only containerd 2.x has: pods without a pause container. It can't have options besides.
_SANDBOX_API = """\
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.kata-sandbox]
    runtime_type = "io.containerd.kata.v2"
    sandboxer = "shim"
    privileged_without_host_devices = true
"""

# How long containerd waits for shims, in seconds: as patient as the tests. A `delete` that it kills
# halfway leaves what it has not come to.
# Source: containerd core/runtime/v2/shim.go, plugins/services/tasks/local.go; 1.6 has the same.
_TIMEOUTS_S = {"shim.cleanup": 5, "shim.load": 5, "shim.shutdown": 3, "task.state": 2}

# A snapshotter of 2.x whose snapshots are ext4 in files, which begin as copies of an empty one.
# Source: containerd docs/snapshotters/blockfile.md.
_BLOCKFILE = """\
[plugins."io.containerd.snapshotter.v1.blockfile"]
  root_path = "{root}/blockfile"
  scratch_file = "{scratch}"
  fs_type = "ext4"
  mount_options = []
  recreate_scratch = true
"""
_SCRATCH = f"{ROOT}/scratch.img"
_SCRATCH_SIZE = "64M"


class ContainerdMissing(Exception):
    """This version of containerd isn't on the machine."""


class CriToolsMissing(Exception):
    """crictl and critest aren't on the machine."""


@dataclass(frozen=True)
class ContainerdVersion:
    """A containerd with the ctr and the runc shim of the same build, all in `directory`."""

    name: str
    directory: Path

    @property
    def major(self) -> int:
        return int(self.name.partition(".")[0])


def tool_cache() -> Path:
    """Return the directory that keeps downloaded tools over clean clones."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("KATA_CACHE") or home / "kata-shimv2")


def find_containerd(major: int) -> ContainerdVersion:
    """Return the distribution's containerd (1) or the one of the tool cache (2).

    Raises ContainerdMissing with the fix.
    """
    if major == 1:
        binary = shutil.which("containerd", path="/usr/bin:/usr/local/bin")
        if binary is None:
            raise ContainerdMissing("no containerd in /usr/bin: install the package containerd")
        return ContainerdVersion("1.6", Path(binary).parent)
    directory = tool_cache() / f"containerd-{CONTAINERD_2}"
    if not (directory / "containerd").exists():
        raise ContainerdMissing(f"no containerd in {directory}: run `make tools`")
    return ContainerdVersion(CONTAINERD_2, directory)


def find_cri_tool(name: str) -> Path:
    """Return `crictl` or `critest` of the tool cache; raises CriToolsMissing with the fix."""
    program = tool_cache() / f"cri-tools-{CRI_TOOLS}" / name
    if not program.exists():
        raise CriToolsMissing(f"no {program}: run `make tools`")
    return program


class ContainerdDaemon:
    """The containerd of a node. Its tasks survive `kill` and `restart`."""

    def __init__(self, node: Node, version: ContainerdVersion) -> None:
        self.version = version
        self.pid = 0
        self._node = node
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def log_path(self) -> Path:
        return self._node.log_directory / f"{self._node.name}-containerd.log"

    def start(self) -> None:
        """Start the daemon and return when it serves; raises RuntimeError with its last lines."""
        level = os.environ.get("KATA_TEST_CONTAINERD_LOG", "info")
        config = _CONFIG.format(
            root=ROOT,
            state=STATE,
            address=ADDRESS,
            level=level,
            cni_plugins=pod_network.plugins(),
            cni_configuration=pod_network.CONFIGURATION,
            registries=registry.CONFIGURATION,
        )
        config += pod_network.handlers()
        if self.version.major > 1:
            config += self._blockfile()
            config += _SANDBOX_API
        config += "[timeouts]\n"
        for name, seconds in _TIMEOUTS_S.items():
            config += f'  "io.containerd.timeout.{name}" = "{patient(seconds):g}s"\n'
        self._node.write("/etc/containerd/config.toml", config)
        notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        with notify, self.log_path.open("ab") as log:
            self._node.path(_NOTIFY).unlink(missing_ok=True)
            notify.bind(str(self._node.path(_NOTIFY)))
            notify.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            self._process = self._node.popen(
                [str(self.version.directory / "containerd"), "-c", "/etc/containerd/config.toml"],
                env={"NOTIFY_SOCKET": _NOTIFY},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
            self.pid = self._wait_ready(notify)

    def _blockfile(self) -> str:
        scratch = self._node.path(_SCRATCH)
        if not scratch.exists():
            scratch.parent.mkdir(parents=True, exist_ok=True)
            subprocess.run(
                ["mkfs.ext4", "-q", str(scratch), _SCRATCH_SIZE], check=True, capture_output=True
            )
        return _BLOCKFILE.format(root=ROOT, scratch=_SCRATCH)

    def _wait_ready(self, notify: socket.socket) -> int:
        notify.settimeout(patient(_START_S))
        try:
            while True:
                message, ancillary, _, _ = notify.recvmsg(256, socket.CMSG_SPACE(12))
                if b"READY=1" in message:
                    return int(struct.unpack("iii", ancillary[0][2])[0])
        except TimeoutError:
            tail = self.log_path.read_text(errors="replace")[-2000:]
            raise RuntimeError(f"containerd {self.version.name} isn't ready:\n{tail}") from None

    def kill(self) -> None:
        """Kill the daemon with SIGKILL, as a crash would, and wait until it is gone."""
        if self._process is None:
            return
        os.kill(self.pid, signal.SIGKILL)
        self._process.wait(patient(10))
        self._process = None

    def restart(self) -> None:
        """Kill the daemon and start it again on the same root and state."""
        self.kill()
        self.start()
