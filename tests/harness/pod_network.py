"""The networks of a node's pods, by the runtime handler that runs them.

Ordinarily a CNI bridge with an IPv4 and an IPv6 address for each pod; with `kata-two` a
point-to-point link beside it, with `kata-none` nothing at all.
Source: CNI specification 1.0 "Network configuration format"; the plugins' own pages bridge, ptp,
host-local, static and portmap on cni.dev.
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
#: The names of networks that give addresses away.
NETWORKS = ("pods", "second")
SECOND_MTU = 1400
_NETWORK: dict[str, object] = {
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

_SECOND: dict[str, object] = {
    "cniVersion": "1.0.0",
    "name": "second",
    "plugins": [
        {
            "type": "ptp",
            "mtu": SECOND_MTU,
            "ipam": {
                "type": "host-local",
                "dataDir": ADDRESSES,
                "ranges": [[{"subnet": "10.89.0.0/24"}], [{"subnet": "fd00:89::/64"}]],
            },
        },
    ],
}
# CRI wants an address of each pod, wherever it is: this plugin names one and makes no interface.
_NONE: dict[str, object] = {
    "cniVersion": "1.0.0",
    "name": "none",
    "plugins": [
        {"type": "static", "ipam": {"type": "static", "addresses": [{"address": "192.0.2.1/32"}]}}
    ],
}
_HANDLERS: dict[str, tuple[dict[str, object], ...]] = {
    "kata-two": (_NETWORK, _SECOND),
    "kata-none": (_NONE,),
}


def plugins() -> str:
    """Return the directory of the CNI plugins: Debian's, else upstream's."""
    debian, upstream = "/usr/lib/cni", "/opt/cni/bin"
    return debian if Path(debian, "bridge").exists() else upstream


def handlers() -> str:
    """Return what containerd's configuration says of the handlers with networks of their own."""
    table = '[plugins."io.containerd.grpc.v1.cri".containerd.runtimes'
    return "".join(
        f"""  {table}.{name}]
    runtime_type = "io.containerd.kata.v2"
    cni_conf_dir = "{_directory(name)}"
    cni_max_conf_num = {len(networks)}
"""
        for name, networks in _HANDLERS.items()
    )


def configure(node: Node) -> None:
    """Give the node its networks; CRI reads the files when containerd starts."""
    node.write(f"{CONFIGURATION}/10-pods.conflist", json.dumps(_NETWORK))
    for handler, networks in _HANDLERS.items():
        for number, network in enumerate(networks):
            path = f"{_directory(handler)}/{number}-{network['name']}.conflist"
            node.write(path, json.dumps(network))


def _directory(handler: str) -> str:
    return f"/etc/cni/{handler}.d"
