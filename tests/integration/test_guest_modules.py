"""Kernel modules that workloads make the guest's kernel ask for."""

from __future__ import annotations

import shutil

import pytest

from tests.harness.ctr import Ctr, fresh_id

pytestmark = pytest.mark.usefixtures("kata_only")

# The host's own programs with their libraries, where they look for them.
_HOST_PROGRAMS = [
    word
    for source, target in (("/usr", "/usr"), ("/usr/lib", "/lib"), ("/usr/lib64", "/lib64"))
    for word in ("--mount", f"type=bind,src={source},dst={target},options=rbind:ro")
]


@pytest.mark.needs("shared_directory")
@pytest.mark.parametrize("program", ["iptables-legacy", "nft"])
def test_firewall_rules_of_a_container_that_may_make_them(ctr: Ctr, program: str) -> None:
    if shutil.which(program, path="/usr/sbin:/usr/bin:/sbin") is None:
        pytest.skip(f"{program} is not installed on this machine")
    script = {
        "iptables-legacy": (
            "iptables-legacy -t nat -A OUTPUT -p tcp --dport 81 -m owner --uid-owner 7 "
            "-m comment --comment here -j REDIRECT --to-ports 82 && iptables-legacy -t nat -S && "
            "ip6tables-legacy -A INPUT -m conntrack --ctstate INVALID -j DROP && "
            "ip6tables-legacy -S"
        ),
        "nft": (
            "nft add table inet t && "
            "nft add chain inet t c '{ type nat hook output priority -100; }' && "
            "nft add rule inet t c meta skuid 7 tcp dport 81 counter redirect to :82 && "
            "nft list ruleset"
        ),
    }[program]
    container = fresh_id("rules")
    ctr.start(container, "sleep", "1000", options=["--cap-add", "CAP_NET_ADMIN", *_HOST_PROGRAMS])
    done = ctr.exec(container, "/bin/sh", "-c", script)
    assert done.returncode == 0, done
    if program == "nft":
        assert "skuid 7 tcp dport 81 counter packets 0 bytes 0 redirect to :82" in done.stdout
    else:
        assert "-A OUTPUT -p tcp -m tcp --dport 81 -m owner --uid-owner 7" in done.stdout
        assert "-A INPUT -m conntrack --ctstate INVALID -j DROP" in done.stdout
    ctr.remove(container)


@pytest.mark.needs("shared_directory")
def test_links_and_filesystems_of_a_privileged_container(ctr: Ctr) -> None:
    container = fresh_id("links")
    ctr.start(container, "sleep", "1000", options=["--privileged", *_HOST_PROGRAMS])
    script = (
        "ip=/usr/bin/ip; mkdir -p /dev/net; mknod /dev/net/tun c 10 200 2>/dev/null; "
        "$ip tuntap add dev tun7 mode tun && $ip link add v0 type veth peer v1 && "
        "$ip link add wg7 type wireguard && $ip -br link && "
        "{ grep -c -w squashfs /proc/filesystems; "
        "mount -t squashfs none /tmp 2>/dev/null; grep -w squashfs /proc/filesystems; }"
    )
    done = ctr.exec(container, "/bin/sh", "-c", script)
    assert done.returncode == 0, done
    for name in ("tun7", "v0@v1", "wg7"):
        assert name in done.stdout
    assert done.stdout.endswith("0\n\tsquashfs\n")
    ctr.remove(container)


def test_idle_guest_holds_none_of_them(ctr: Ctr) -> None:
    container = fresh_id("idle")
    ctr.start(container, "sleep", "1000")
    modules = ctr.exec(container, "cat", "/proc/modules", check=True).stdout
    loaded = {line.split()[0] for line in modules.splitlines()}
    assert not loaded & {"tun", "ip_tables", "nf_tables", "nf_conntrack", "bridge"}
    # What pods have no use for is not offered, and a socket of any family is one to ask for.
    script = (
        "for f in 21 30 43; do nc -h 2>/dev/null; done; ls /sys/module | grep -x -e rds -e tipc"
    )
    assert ctr.exec(container, "sh", "-c", script).stdout == ""
    ctr.remove(container)
