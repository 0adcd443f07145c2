"""Drive a node's containerd through nerdctl, the way a person would who knows Docker.

Its data is below /var/lib and its networks are in the node's own network namespace: nothing of
either reaches the machine.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.harness import pod_network
from tests.harness.containerd_daemon import ADDRESS, tool_cache
from tests.harness.ctr import RUNTIME
from tests.harness.oci_image import BUSYBOX_IMAGE

if TYPE_CHECKING:
    from tests.harness.node import Node

VERSION = "2.0.3"
BRIDGE = "nerdctl0"
_DATA = "/var/lib/nerdctl"
_NETWORKS = "/etc/nerdctl-cni"
_ADDRESSES = "/var/lib/cni/networks"


class NerdctlMissing(Exception):
    """nerdctl isn't in the tool cache."""


def find_nerdctl() -> Path:
    """Return the nerdctl of the tool cache.

    Raises NerdctlMissing with the fix.
    """
    program = tool_cache() / f"nerdctl-{VERSION}" / "nerdctl"
    if not program.exists():
        raise NerdctlMissing(f"no {program}: run `make tools`")
    return program


class Nerdctl:
    """`nerdctl` on one node, with the runtime under test. Every call has a time limit."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self._program = str(find_nerdctl())

    def argv(self, *arguments: str) -> list[str]:
        """Return the argv of `nerdctl …`; `run` and `create` get the runtime."""
        if arguments[0] in {"run", "create"}:
            arguments = (arguments[0], "--runtime", RUNTIME, "--pull", "never", *arguments[1:])
        return [
            self._program,
            f"--address={ADDRESS}",
            f"--namespace={self.node.name}",
            f"--data-root={_DATA}",
            f"--cni-path={pod_network.plugins()}",
            f"--cni-netconfpath={_NETWORKS}",
            "--cgroup-manager=cgroupfs",
            "--insecure-registry",
            *arguments,
        ]

    def __call__(
        self, *arguments: str, check: bool = True, stdin: bytes = b"", timeout_s: float = 90
    ) -> subprocess.CompletedProcess[str]:
        """Run `nerdctl …` to its end."""
        argv = self.argv(*arguments)
        return self.node.run(argv, check=check, stdin=stdin, timeout_s=timeout_s)

    def inspect(self, container: str) -> dict[str, Any]:
        """Return what `nerdctl inspect` shows of a container."""
        (found,) = json.loads(self("inspect", container).stdout)
        assert isinstance(found, dict)
        return found

    def address(self, container: str) -> str:
        """Return a running container's address in its first network."""
        address: str = self.inspect(container)["NetworkSettings"]["IPAddress"]
        return address

    def held_addresses(self, network: str) -> list[str]:
        """List the addresses that CNI's host-local has given away in a network."""
        directory = self.node.path(f"{_ADDRESSES}/{network}")
        if not directory.exists():
            return []
        return sorted(path.name for path in directory.iterdir() if path.name[0].isdigit())

    def run(
        self, *options: str, command: Sequence[str] = (), image: str = BUSYBOX_IMAGE
    ) -> subprocess.CompletedProcess[str]:
        """`nerdctl run OPTIONS IMAGE COMMAND`, whatever its status."""
        return self("run", *options, image, *command, check=False)

    def remove_everything(self) -> None:
        """Remove all containers and networks, and what nerdctl and CNI leave with any runtime.

        Raises AssertionError if an address is still given away.
        """
        listed = self("ps", "-aq", check=False).stdout.split()
        if listed:
            self("rm", "-f", *listed, check=False)
        self("network", "prune", "-f", check=False)
        networks = self.node.path(_ADDRESSES)
        for network in networks.iterdir() if networks.exists() else ():
            held = self.held_addresses(network.name)
            assert not held, f"{network.name}: still given away: {held}"
        script = f"ip link delete {BRIDGE}; rm -rf {_ADDRESSES} /run/containerd/fifo/*"
        self.node.run(["sh", "-c", script])
