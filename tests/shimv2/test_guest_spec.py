"""config.json as ctr and CRI make it -> what the agent gets."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from shimv2.bundle import Bundle, ContainerKind
from shimv2.errors import InvalidArgument, ShimError, Unimplemented
from shimv2.guest_requests import container_request
from shimv2.guest_spec import (
    block_devices,
    check_spec,
    guest_process_message,
    guest_resources,
    guest_spec,
    pod_shm,
    sandbox_hostname,
    shared_mounts,
    shares_sandbox_pid_namespace,
)
from shimv2.rootfs import GuestPaths
from tests.harness.limitations import documented
from tests.shimv2.shim_bench import spec

VECTORS = Path(__file__).parent.parent / "vectors" / "oci"
_NO_TYPE = documented(
    "mount …: filesystem type '…' cannot be mounted in the VM; mount it on the host and bind it"
)
_NO_SOURCE = documented("mount …: a bind needs a source")
_ID_MAPPED = documented("mount …: id-mapped mounts cannot be shared with the VM")
ROOT = PurePosixPath("/run/kata-containers/shared/containers/c1/rootfs")


def bundle(config: dict[str, Any], kind: ContainerKind = ContainerKind.SINGLE) -> Bundle:
    return Bundle(container_id="c1", path=Path("/b"), spec=config, kind=kind, sandbox_id="c1")


def made(config: dict[str, Any], *, terminal: bool = False, seccomp: bool = False) -> Any:
    sources = {m.index: PurePosixPath("/share") / str(m.index) for m in shared_mounts(config)}
    return guest_spec(
        bundle(config), guest_root=ROOT, sources=sources, terminal=terminal, seccomp=seccomp
    )


def vector(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((VECTORS / name).read_text())
    return found


def test_a_spec_of_ctr_loses_only_what_is_the_hosts() -> None:
    config = vector("ctr-run.json")
    sent = made(config)
    assert sent.Version == config["ociVersion"]
    assert list(sent.Process.Args) == config["process"]["args"]
    assert list(sent.Process.Env) == config["process"]["env"]
    assert sent.Process.NoNewPrivileges
    assert list(sent.Process.Capabilities.Bounding) == config["process"]["capabilities"]["bounding"]
    assert sent.Process.Rlimits[0].Type == "RLIMIT_NOFILE"
    assert sent.Root.Path == str(ROOT)
    assert [m.destination for m in sent.Mounts] == [m["destination"] for m in config["mounts"]]
    assert [m.source for m in sent.Mounts] == [m["source"] for m in config["mounts"]]
    assert {n.Type: n.Path for n in sent.Linux.Namespaces} == {"ipc": "", "uts": "", "mount": ""}
    assert sent.Linux.CgroupsPath == "/c1"
    assert list(sent.Linux.MaskedPaths) == config["linux"]["maskedPaths"]
    assert list(sent.Linux.ReadonlyPaths) == config["linux"]["readonlyPaths"]
    assert not sent.Linux.Resources.Devices
    assert not sent.HasField("Hooks")
    assert not sent.Linux.HasField("Seccomp")


def test_a_container_of_cri_shares_its_files_and_joins_its_pod() -> None:
    config = vector("cri-container.json")
    planned = {str(m.destination): m for m in shared_mounts(config)}
    assert set(planned) == {"/etc/hosts", "/etc/hostname", "/etc/resolv.conf", "/data"}
    assert planned["/data"].read_only
    assert not planned["/etc/hosts"].read_only
    sent = made(config)
    mounts = {m.destination: m for m in sent.Mounts}
    assert mounts["/etc/hosts"].source.startswith("/share/")
    assert mounts["/dev/shm"].source == "/run/kata-containers/sandbox/shm"
    assert all(not n.Path for n in sent.Linux.Namespaces)
    assert sent.Process.OOMScoreAdj == 1000
    assert sent.Process.ApparmorProfile == ""
    assert sent.Linux.Resources.Memory.Limit == 64 << 20
    assert (sent.Linux.Resources.CPU.Quota, sent.Linux.Resources.CPU.Period) == (50000, 100000)
    assert sent.Linux.Resources.CPU.Cpus == ""
    assert not sent.Linux.HasField("Seccomp")
    assert made(config, seccomp=True).Linux.Seccomp.DefaultAction == "SCMP_ACT_ERRNO"
    assert not shares_sandbox_pid_namespace(config)


def test_a_shared_process_namespace_is_asked_of_the_agent() -> None:
    config = spec(linux={"namespaces": [{"type": "pid", "path": "/proc/7/ns/pid"}]})
    assert shares_sandbox_pid_namespace(config)
    assert not made(config).Linux.Namespaces


def test_processes_of_one_container_are_asked_for_by_its_name() -> None:
    joins = spec(linux={"namespaces": [{"type": "pid", "path": "/proc/7/ns/pid"}]})
    asker = bundle(joins, ContainerKind.MEMBER)
    paths = GuestPaths(root=PurePosixPath("/r"))

    def target(*neighbours: Bundle) -> dict[str, str]:
        made = container_request(asker, paths, terminal=False, seccomp=False, neighbours=neighbours)
        assert made.sandbox_pidns
        return {key: value for key, value in made.OCI.Annotations.items() if "pid-names" in key}

    alone = replace(bundle(spec(), ContainerKind.MEMBER), container_id="app")
    shares, pause = bundle(joins, ContainerKind.MEMBER), bundle(spec(), ContainerKind.SANDBOX)
    assert target(pause, shares) == {}
    assert target(pause, shares, alone) == {"kata-shimv2.pid-namespace-of": "app"}
    with pytest.raises(InvalidArgument, match=r"2 run in this VM, .*without --target"):
        target(alone, replace(alone, container_id="other"))


def test_hooks_of_the_host_never_reach_the_guest() -> None:
    assert not made(spec(hooks={"prestart": [{"path": "/bin/hook"}]})).HasField("Hooks")


def test_the_request_decides_on_the_terminal() -> None:
    assert made(spec(), terminal=True).Process.Terminal
    assert not made(spec(process={"terminal": True, "args": ["a"], "cwd": "/"})).Process.Terminal


def test_binds_of_the_hosts_system_directories_are_the_guests() -> None:
    config = spec(mounts=[{"destination": "/d", "type": "bind", "source": "/dev/null",
                           "options": ["bind"]}])  # fmt: skip
    assert not shared_mounts(config)
    assert made(config).Mounts[0].source == "/dev/null"


@pytest.mark.parametrize(
    ("options", "read_only"),
    [(["ro"], True), (["rbind", "rro"], True), (["bind", "rro", "rnosuid"], True), (["rw"], False)],
)
def test_a_recursively_read_only_mount_is_read_only_on_the_host(
    options: list[str], read_only: bool
) -> None:
    mount = {"destination": "/d", "type": "bind", "source": "/x", "options": options}
    assert shared_mounts(spec(mounts=[mount]))[0].read_only is read_only


def test_a_user_namespace_without_users_is_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"linux.uidMappings is empty"):
        check_spec(spec(linux={"namespaces": [{"type": "network"}, {"type": "user"}]}))


@pytest.mark.parametrize(
    ("mount", "error", "text"),
    [
        ({"type": "nfs", "source": "s:/x"}, InvalidArgument, _NO_TYPE),
        ({"type": "overlay", "source": "o"}, InvalidArgument, _NO_TYPE),
        ({"type": "bind", "source": ""}, InvalidArgument, _NO_SOURCE),
        ({"type": "bind", "source": "/x", "options": ["idmap"]}, Unimplemented, _ID_MAPPED),
    ],
)
def test_a_mount_no_guest_can_have_is_refused_with_a_sentence(
    mount: dict[str, Any], error: type[ShimError], text: re.Pattern[str]
) -> None:
    with pytest.raises(error, match=text):
        shared_mounts(spec(mounts=[{"destination": "/dest", **mount}]))


def test_devices_that_every_linux_has_are_kept_and_others_refused() -> None:
    fuse = {"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229}
    assert made(spec(linux={"devices": [fuse]})).Linux.Devices[0].Path == "/dev/fuse"
    loop = {"path": "/dev/loop-control", "type": "c", "major": 10, "minor": 237}
    with pytest.raises(
        InvalidArgument,
        match=documented(
            "device /dev/loop-control (c 10:237) is the host's and cannot be given to a VM; "
            "remove it"
        ),
    ):
        made(spec(linux={"devices": [loop]}))


def test_devices_that_every_container_has_are_left_out_unless_they_differ() -> None:
    null = {"path": "/dev/null", "type": "c", "major": 1, "minor": 3, "fileMode": 0o666, "uid": 0}
    assert not made(spec(linux={"devices": [null]})).Linux.Devices
    for other in ({"path": "/dev/nil"}, {"fileMode": 0o600}, {"gid": 5}, {"minor": 5}):
        assert made(spec(linux={"devices": [null | other]})).Linux.Devices


def disk_rule(access: str, *, allow: bool = True) -> dict[str, Any]:
    return {"allow": allow, "type": "b", "major": 8, "minor": 0, "access": access}


def test_disks_that_the_spec_lists_are_given_with_the_access_of_their_rule() -> None:
    disk = {"path": "/dev/xvda", "type": "b", "major": 8, "minor": 0}
    deny = {"allow": False, "access": "rwm"}
    for rules, read_only in (([], False), ([disk_rule("rwm")], False), ([disk_rule("rm")], True)):
        config = spec(linux={"devices": [disk], "resources": {"devices": [deny, *rules]}})
        (found,) = block_devices(config)
        assert (found.path, found.major, found.minor) == ("/dev/xvda", 8, 0)
        assert found.read_only is read_only
        assert made(config).Linux.Devices[0].Path == "/dev/xvda"
        assert not made(config).Linux.Resources.Devices  # the numbers are the host's
    denied = {"devices": [disk], "resources": {"devices": [disk_rule("rwm", allow=False)]}}
    assert block_devices(spec(linux=denied)) == []


def test_of_a_privileged_containers_disks_only_those_with_a_rule_are_its_own() -> None:
    disks = [
        {"path": f"/dev/{name}", "type": "b", "major": 8, "minor": minor}
        for minor, name in enumerate(("sda", "sdb"))
    ]
    resources = {"devices": [{"allow": True, "access": "rwm"}, disk_rule("rwm")]}
    config = spec(linux={"devices": disks, "resources": resources})
    assert [one.path for one in block_devices(config)] == ["/dev/sda"]
    assert [one.Path for one in made(config).Linux.Devices] == ["/dev/sda"]


def test_a_privileged_container_gets_no_device_of_the_host() -> None:
    disk = {"path": "/dev/sda", "type": "b", "major": 8, "minor": 0}
    resources = {"devices": [{"allow": True, "access": "rwm"}]}
    assert not made(spec(linux={"devices": [disk], "resources": resources})).Linux.Devices


def test_a_privileged_container_keeps_its_access_to_all_devices() -> None:
    deny = {"allow": False, "access": "rwm"}
    allow = {"allow": True, "access": "rwm"}
    assert guest_resources({"devices": [deny, allow]})["devices"] == [allow]
    assert "devices" not in guest_resources({"devices": [allow, deny]})
    one = {"allow": True, "type": "c", "major": 1, "minor": 3, "access": "rwm"}
    assert "devices" not in guest_resources({"devices": [deny, one]})


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"process": {"args": ["a"], "cwd": "/", "user": {"uid": "root"}}}, "process.user.uid"),
        ({"process": {"args": ["a"], "cwd": "/", "user": {"uid": -1}}}, "process.user.uid"),
        ({"process": {"args": ["a"], "cwd": "/", "env": "A=b"}}, "process.env"),
        ({"process": {"args": ["a"], "cwd": "/", "rlimits": [3]}}, r"process.rlimits\[0\]"),
        ({"linux": {"resources": {"memory": {"limit": 1 << 70}}}}, "memory.limit"),
        ({"linux": {"sysctl": ["a"]}}, "linux.sysctl"),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_by_its_path(
    change: dict[str, Any], where: str
) -> None:
    with pytest.raises(InvalidArgument, match=where):
        made({**spec(), **change})


def test_the_vm_is_named_after_the_pod() -> None:
    assert sandbox_hostname(bundle(spec(hostname="web-0"))) == "web-0"
    assert sandbox_hostname(bundle(spec())) == "c1"
    assert len(sandbox_hostname(bundle(spec(hostname="x" * 100)))) == 63


def test_an_execs_process_keeps_what_it_has() -> None:
    process = {"args": ["a"], "cwd": "/", "user": {"uid": 5, "additionalGids": [6]},
               "selinuxLabel": "s", "consoleSize": {"height": 24, "width": 80}}  # fmt: skip
    message = guest_process_message(process, terminal=True)
    assert (message.User.UID, list(message.User.AdditionalGids)) == (5, [6])
    assert message.SelinuxLabel == ""
    assert (message.ConsoleSize.Height, message.ConsoleSize.Width) == (24, 80)


def test_an_empty_dir_at_dev_shm_is_no_pods_shm() -> None:
    """Its name doesn't matter; the host's own and the pod's are the guest's."""
    kubelets = "/var/lib/kubelet/pods/u/volumes/kubernetes.io~empty-dir/shm"
    for source, is_shared in (("/dev/shm", False), ("/run/p1/shm", False), (kubelets, True)):
        mount = {"destination": "/dev/shm", "type": "bind", "source": source}
        config = spec(mounts=[mount])
        assert bool(shared_mounts(config)) is is_shared
        assert (pod_shm(config) is None) is is_shared


@pytest.mark.parametrize(
    ("options", "follows", "leads"),
    [
        (["rbind"], True, False),
        (["rbind", "rprivate"], False, False),
        (["rbind", "rprivate", "rslave"], True, False),
        (["bind", "shared"], True, True),
    ],
)
def test_the_last_word_on_propagation_counts(
    options: list[str], follows: bool, leads: bool
) -> None:
    mount = {"destination": "/d", "type": "bind", "source": "/x", "options": options}
    (planned,) = shared_mounts(spec(mounts=[mount]))
    assert (planned.follows_host, planned.leads_host) == (follows, leads)
