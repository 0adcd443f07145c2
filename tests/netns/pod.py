"""A network namespace to test in, and a look at all that the kernel has in it.

The looks are by `ip` and `tc`: other readers than those under test.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest


def _unusable() -> str:
    if os.geteuid() != 0:
        return "making network namespaces needs root"
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        return "/dev/net/tun cannot be opened"
    return ""


NEEDS_TAPS = [
    pytest.mark.root,
    pytest.mark.skipif(bool(_unusable()), reason=_unusable() or "usable"),
]

# One pod: eth0 as a CNI plugin leaves it, its other end in a namespace of its own ("the bridge").
# The link-local address is what the kernel would make a moment after the carrier; a test that
# compares before and after can't have it come in between.
POD = """
ip link set lo up
ip link add eth0 mtu 1450 type veth peer name peer netns {outside}
ip link set eth0 address 02:00:00:00:00:07 addrgenmode none
ip addr add fe80::ff:fe00:7/64 dev eth0 nodad
ip addr add 10.9.0.2/24 dev eth0
ip addr add fd00:9::2/64 dev eth0 nodad
ip link set eth0 up
"""
OUTSIDE = "ip link set lo up; ip link set peer mtu 1450 up"
ROUTES = """
ip route add default via 10.9.0.1
ip route add 10.7.0.0/16 via 10.9.0.9 src 10.9.0.2 mtu 1400
ip route add 169.254.1.1 dev eth0 scope link
ip -6 route add default via fd00:9::1
ip neigh add 10.9.0.1 lladdr 02:00:00:00:00:01 dev eth0 nud permanent
"""


class Holder:
    """A process in a network namespace of its own, which lives as long as it."""

    def __init__(self) -> None:
        argv = ["unshare", "--net", "sh", "-c", "echo ready; read _"]
        self._process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"ready\n"
        self.pid = self._process.pid
        self.path = Path(f"/proc/{self.pid}/ns/net")

    def run(self, script: str) -> str:
        """Run shell commands inside; any that fails fails the test."""
        argv = ["nsenter", f"--net={self.path}", "sh", "-ec", script]
        done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=30)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def everything(self) -> str:
        """Show links, addresses, qdiscs, filters, routes and fixed neighbours, without counters."""
        links = [line.split(":")[1].split("@")[0].strip() for line in self._links()]
        filters = "; ".join(f"tc filter show dev {link} ingress || true" for link in links)
        shown = self.run(
            f"ip -d addr; tc qdisc; {filters}; ip route show table all; "
            "ip -6 route show table all; ip neigh show nud permanent; ip rule"
        )
        # What the carrier changes, which comes and goes on its own time.
        timed = (
            r"(expires|valid_lft|preferred_lft) \S+|state \S+|NO-CARRIER,|,LOWER_UP| linkdown"
            r"| tentative"
        )
        return "\n".join(sorted(re.sub(timed, "", shown).splitlines()))

    def close(self) -> None:
        self._process.communicate(timeout=10)

    def _links(self) -> list[str]:
        return self.run("ip -o link").splitlines()
