"""The network of a node's pods: a CNI bridge with an IPv4 and an IPv6 address for each pod.

Source: CNI specification 1.0 "Network configuration format"; the plugins' own pages bridge,
host-local and portmap on cni.dev.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.harness.node import Node

CONFIGURATION = "/etc/cni/net.d"
BRIDGE = "cni0"
#: Where host-local keeps the addresses that it gave away: a file each, named by the address.
ADDRESSES = "/run/cni"
GATEWAYS = ("10.88.0.1", "fd00:88::1")
_NETWORK = {
    "cniVersion": "1.0.0",
    "name": "pods",
    "plugins": [
        {
            "type": "bridge",
            "bridge": BRIDGE,
            "isGateway": True,
            "hairpinMode": True,
            "ipam": {
                "type": "host-local",
                "dataDir": ADDRESSES,
                "ranges": [[{"subnet": "10.88.0.0/16"}], [{"subnet": "fd00:88::/64"}]],
                "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
            },
        },
        {"type": "portmap", "capabilities": {"portMappings": True}, "snat": True},
    ],
}


def plugins() -> str:
    """Return the directory of the CNI plugins: Debian's, else upstream's."""
    debian, upstream = "/usr/lib/cni", "/opt/cni/bin"
    return debian if Path(debian, "bridge").exists() else upstream


def configure(node: Node) -> None:
    """Give the node its network; CRI reads the file when containerd starts and when it changes."""
    node.write(f"{CONFIGURATION}/10-pods.conflist", json.dumps(_NETWORK))
