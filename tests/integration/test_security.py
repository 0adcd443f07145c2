"""What a container may do: users, capabilities, limits, kernel settings, files, system calls."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.harness.ctr import Ctr, fresh_id
from tests.harness.oci_image import busybox_entries, write_rootfs

if TYPE_CHECKING:
    from tests.harness.node import Node

_ROOT, _SPEC = "/tmp/security-root", "/tmp/security-spec.json"
_STATUS = "grep -E '^(Uid|Gid|Groups|Cap[A-Z]|NoNewPrivs|Seccomp:)' /proc/self/status"
_MAPPING = "0:100000:65536"


@pytest.fixture
def rootfs(node: Node) -> Iterator[Path]:
    """A root file system in the node, at `_ROOT`."""
    directory = node.path(_ROOT)
    write_rootfs(busybox_entries(), directory)
    yield directory
    node.run(["rm", "-rf", _ROOT, _SPEC])


def default_spec(node: Node) -> dict[str, Any]:
    """What ctr runs containers with, in the root file system of `rootfs`."""
    made: dict[str, Any] = json.loads(node.run(["ctr", "oci", "spec"]).stdout)
    made["root"] = {"path": _ROOT}
    made["process"]["args"] = ["sleep", "1000"]
    return made


def start(ctr: Ctr, spec: dict[str, Any]) -> str:
    """Start a container of this spec without an image."""
    container = fresh_id("spec")
    ctr.node.write(_SPEC, json.dumps(spec))
    argv = ["ctr", "run", "-d", "--null-io", "--runtime", ctr.runtime, "--config", _SPEC, container]
    ctr.node.run(argv)
    return container


def restricted(spec: dict[str, Any]) -> None:
    """The fields of a pod's security context, all of them at once."""
    process, linux = spec["process"], spec["linux"]
    process["user"] = {"uid": 1000, "gid": 2000, "additionalGids": [3000, 3001]}
    few = ["CAP_CHOWN", "CAP_NET_RAW"]
    process["capabilities"] = {
        "bounding": few,
        "permitted": few,
        "effective": ["CAP_NET_RAW"],
        "inheritable": few,
        "ambient": ["CAP_NET_RAW"],
    }
    process["noNewPrivileges"] = True
    process["rlimits"] = [
        {"type": "RLIMIT_NOFILE", "soft": 77, "hard": 88},
        {"type": "RLIMIT_CORE", "soft": 0, "hard": 0},
    ]
    process["cwd"] = "/work/not/there"
    spec["root"]["readonly"] = True
    linux["maskedPaths"] = ["/etc/passwd", "/home", "/proc/kcore"]
    linux["readonlyPaths"] = ["/proc/sys"]
    linux["sysctl"] = {
        "net.ipv4.ip_forward": "1",
        "net.core.somaxconn": "77",
        "kernel.shm_rmid_forced": "1",
        # Of the whole machine, which is the pod's own.
        "vm.max_map_count": "262144",
    }
    linux["seccomp"] = {
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [{"names": ["sethostname", "sync"], "action": "SCMP_ACT_ERRNO"}],
    }


def test_security_context_holds_for_a_container_and_its_execs(
    node: Node, ctr: Ctr, rootfs: Path
) -> None:
    spec = default_spec(node)
    restricted(spec)
    script = (
        f"{_STATUS}; pwd; ulimit -n; ulimit -Hn; ulimit -c; touch /new 2>&1; cat /etc/passwd; "
        "ls /home; cd /proc/sys; cat net/ipv4/ip_forward net/core/somaxconn kernel/shm_rmid_forced "
        "vm/max_map_count; { echo 0 >net/ipv4/ip_forward; } 2>&1"
    )
    said_all = f"{{ {script}; }} >/said/init; echo >/said/done; sleep 1000"
    spec["process"]["args"] = ["sh", "-c", said_all]
    (rootfs / "said").mkdir(mode=0o777)
    (rootfs / "said").chmod(0o777)
    os.mkfifo(rootfs / "said/done")
    (rootfs / "said/done").chmod(0o666)
    # A place to write to, though the root is read-only.
    spec["mounts"].append(
        {"destination": "/said", "type": "bind", "source": f"{_ROOT}/said", "options": ["rbind"]}
    )
    container = start(ctr, spec)
    done = ctr.exec(container, "sh", "-c", script)
    ctr.exec(container, "cat", "/said/done")
    said = (rootfs / "said/init").read_text()
    assert ctr.exec(container, "hostname", "other").returncode != 0  # by the profile alone
    ctr.remove(container)
    lines = done.stdout.splitlines()
    assert said.splitlines() == lines, "the exec's differ from the init's"
    status = dict(line.split(":\t") for line in lines if ":\t" in line)
    assert status["Uid"] == "1000\t1000\t1000\t1000"
    assert status["Gid"] == "2000\t2000\t2000\t2000"
    assert status["Groups"].split() == ["3000", "3001"]
    both, raw = 1 << 0 | 1 << 13, 1 << 13
    held = {name: int(value, 16) for name, value in status.items() if name.startswith("Cap")}
    assert held == {"CapInh": both, "CapPrm": raw, "CapEff": raw, "CapBnd": both, "CapAmb": raw}
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == "2"
    assert lines[10:14] == ["/work/not/there", "77", "88", "0"]
    assert "Read-only file system" in lines[14]
    assert lines[15:19] == ["1", "77", "1", "262144"]  # nothing of /etc/passwd and /home
    assert "Read-only file system" in lines[19] or "Permission denied" in lines[19]


def test_privileged_container_has_everything_of_its_machine_and_nothing_of_the_host(
    ctr: Ctr, kata_only: None
) -> None:
    container = fresh_id("privileged")
    ctr.start(container, "sleep", "1000", options=["--privileged"])
    script = (
        f"{_STATUS}; cat /proc/sys/kernel/cap_last_cap; ls /dev; "
        "echo 1 >/proc/sys/net/ipv4/ip_forward && mount -t tmpfs t /mnt && echo mounted"
    )
    done = ctr.exec(container, "sh", "-c", f"mkdir -p /mnt; {script}")
    assert done.returncode == 0, done
    lines = done.stdout.splitlines()
    status = dict(line.split(":\t") for line in lines if ":\t" in line)
    # What this machine can give, which runs ctr as well, and the guest's kernel knows.
    own = Path("/proc/self/status").read_text().partition("CapBnd:\t")[2].split()[0]
    (last,) = (line for line in lines if line.isdigit())
    assert int(status["CapEff"], 16) == int(own, 16) & (1 << int(last) + 1) - 1
    assert lines[-1] == "mounted"
    devices = lines[lines.index(last) + 1 : -1]
    assert set(devices) <= {
        "console", "core", "fd", "full", "fuse", "kmsg", "mqueue", "null", "ptmx", "pts", "random",
        "shm", "stderr", "stdin", "stdout", "tty", "urandom", "zero", "net",
    }  # fmt: skip
    ctr.remove(container)


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler for the watcher")
def test_container_that_may_trace_meets_no_process_of_the_agents(
    node: Node, ctr: Ctr, rootfs: Path, kata_only: None
) -> None:
    source = Path(__file__).parents[1] / "guest/watcher.c"
    subprocess.run(["cc", "-O2", "-static", "-o", rootfs / "bin/watcher", source], check=True)
    spec = default_spec(node)
    spec["process"]["args"] = ["sh", "-c", "watcher guest >/said; sleep 1000"]
    for names in spec["process"]["capabilities"].values():
        names.append("CAP_SYS_PTRACE")
    container = start(ctr, spec)
    for _ in range(25):
        ctr.exec(container, "true", check=True)
    (rootfs / "tmp/stop").touch()
    wait = "until grep -q ^done /said; do usleep 20000; done; cat /said"
    report = ctr.exec(container, "timeout", "20", "sh", "-c", wait, check=True).stdout
    ctr.remove(container)
    assert "BAD" not in report, report


def test_user_namespace_has_its_files_and_no_power_over_the_guest(
    ctr: Ctr, kata_only: None
) -> None:
    container = fresh_id("users")
    options = ["--uidmap", _MAPPING, "--gidmap", _MAPPING]
    ctr.start(container, "sleep", "1000", options=options)
    script = (
        "cat /proc/self/uid_map; stat -c '%u %g' /bin/busybox /; echo x >/made; "
        "stat -c %u /made; id -u; mount -t tmpfs t /tmp 2>&1; "
        "{ echo 1 >/proc/sys/kernel/panic; } 2>&1; echo end"
    )
    done = ctr.exec(container, "sh", "-c", script)
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["0", "100000", "65536"], done
    assert lines[1:5] == ["0 0", "0 0", "0", "0"], done
    assert "ermission denied" in lines[-3] or "not permitted" in lines[-3], done
    assert "ermission denied" in lines[-2] or "Read-only" in lines[-2], done
    ctr.remove(container)


def test_id_mapped_layers_are_refused(node: Node, ctr: Ctr, kata_only: None) -> None:
    if node.version.major < 2:
        pytest.skip("containerd 1.6 makes no id-mapped layers")
    container = fresh_id("idmap")
    options = ["--rm", "--uidmap", _MAPPING, "--gidmap", _MAPPING, "--remap-labels"]
    done = ctr.run(container, "true", options=options)
    assert done.returncode != 0
    assert "id-mapped layers (uidmap=0:100000:65536) cannot be shared with the VM" in done.stderr
    ctr.remove(container)


def test_propagation_of_a_root_is_no_obstacle(ctr: Ctr) -> None:
    done = ctr.run(
        fresh_id("shared"),
        "awk",
        '$5 == "/" {print $7}',
        "/proc/self/mountinfo",
        options=["--rm", "--rootfs-propagation", "rshared"],
    )
    assert done.stdout.startswith("shared:"), done
