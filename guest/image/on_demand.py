"""The modules that a guest loads when a workload needs them: a directory on the host.

Owns which they are. It is the list of what the guest's kernel may be made to load: any process in
the guest makes a kernel ask for modules (a socket of a rare family is enough), so what pods have no
use for and what has a history of holes is left out. Nothing of it is in the initrd, whose content
stays in every pod's memory; see docs/decisions, "modules on demand".
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from guest.image import kernel

if TYPE_CHECKING:
    from pathlib import Path

# Paths below the package's `kernel/`.
WANTED: Final = re.compile(
    "|".join((
        # Firewalls, address translation, traffic control, tunnels, IPsec.
        r"net/(ipv4|ipv6|netfilter|bridge|802|8021q|llc|sched|xfrm|openvswitch|nsh|psample)/.*",
        r"net/(sctp|tls|unix|netlink|packet|mptcp)/.*",
        # Links that container networks are made of.
        r"drivers/net/(tun|tap|veth|dummy|ifb|macvlan|macvtap|vrf|geneve|bareudp|nlmon)",
        r"drivers/net/(vxlan|ipvlan|wireguard|bonding|team)/.*",
        # Block devices without hardware, and what is put on them.
        r"drivers/block/(nbd|loop|zram|brd)",
        r"drivers/block/zram/.*",
        r"drivers/md/.*",
        # Filesystems that pods mount themselves, those of a network included.
        r"fs/(fuse|overlayfs|squashfs|erofs|xfs|btrfs|fat|isofs|udf|nls|autofs|9p|ceph)/.*",
        r"fs/(nfs|nfs_common|lockd|smb/client|smb/common|cifs|fscache|netfs)/.*",
        r"net/(sunrpc|9p|ceph|dns_resolver)/.*",
        # Algorithms that IPsec, WireGuard, TLS and encrypted disks ask for.
        r"crypto/.*",
        r"arch/x86/crypto/.*",
    ))
)  # fmt: skip
# The kernel's cryptography for programs, tests, and what drags hardware in.
UNWANTED: Final = re.compile(
    r"crypto/(af_alg|algif_.*|crypto_user|tcrypt)|net/sunrpc/xprtrdma/.*|drivers/md/(faulty|.*-test)"
)
# Aliases of devices are asked for by udev, which the guest doesn't have.
_PATTERN: Final = re.compile(r"[*?\[]")


def files(package: kernel.KernelPackage) -> dict[str, bytes]:
    """Return the directory's content: modules, `modules.dep` and `modules.alias`, by name.

    Each module's dependencies are with it.
    """
    directory = package.root / "lib" / "modules" / package.release
    chosen = [path for path in _all(directory) if _is_wanted(_name_below(directory, path))]
    needed = _with_dependencies(directory, chosen)
    modules = dict(kernel.module_bytes(path) for path in needed)
    index = kernel.module_index(package, sorted(modules))
    aliases = _aliases(directory, {name.removesuffix(".ko") for name in modules})
    return modules | {
        "modules.dep": index["modules.dep"].encode(),
        "modules.alias": aliases.encode(),
    }


def _is_wanted(name: str) -> bool:
    return WANTED.fullmatch(name) is not None and UNWANTED.fullmatch(name) is None


def _all(directory: Path) -> list[Path]:
    return sorted((directory / "kernel").rglob("*.ko*"))


def _name_below(directory: Path, path: Path) -> str:
    return str(path.relative_to(directory / "kernel")).split(".ko")[0]


def _with_dependencies(directory: Path, chosen: list[Path]) -> list[Path]:
    found = set(chosen)
    for line in (directory / "modules.dep").read_text().splitlines():
        module, _, dependencies = line.partition(":")
        if directory / module in found:
            # The line names the farther dependencies as well. Source: modules.dep(5).
            found |= {directory / name for name in dependencies.split()}
    return sorted(found)


def _aliases(directory: Path, modules: set[str]) -> str:
    """Return `alias module` lines, with underscores as the kernel compares them."""
    known = {name.replace("-", "_") for name in modules}
    lines = set()
    for line in (directory / "modules.alias").read_text().splitlines():
        words = line.split()
        if len(words) == 3 and words[0] == "alias" and not _PATTERN.search(words[1]):
            alias, module = (word.replace("-", "_") for word in words[1:])
            if module in known:
                lines.add(f"{alias} {module}\n")
    return "".join(sorted(lines))
