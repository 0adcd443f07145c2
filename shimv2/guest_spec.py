"""The OCI spec as containerd gives it -> the OCI spec as the agent in the guest wants it.

Pure: no I/O and no clock. What needs the host (sharing a bind mount's source) is planned here as
data and done by `rootfs`. Facts about the agent's expectations: docs/protocols.md "Guest spec";
Source: Kata virtcontainers/kata_agent.go constrainGRPCSpec, runtime-rs amend_spec.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from copy import copy
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

from agent_proto.pb import oci_pb2
from shimv2.bundle import Bundle, ContainerKind, JsonObject
from shimv2.errors import InvalidArgument, Unimplemented
from shimv2.oci_messages import message_from_json
from shimv2.volume_plan import kubelet_volume

# Source: Kata virtcontainers/kata_agent.go: where the guest sees the share, and the pod's shm.
SHARED_DIRECTORY: Final = PurePosixPath("/run/kata-containers/shared/containers")
GUEST_SHM: Final = PurePosixPath("/run/kata-containers/sandbox/shm")

# Filesystems that the guest's kernel provides by itself.
_GUEST_FILESYSTEMS: Final = frozenset((
    "proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup", "cgroup2", "securityfs", "debugfs",
    "tracefs", "bpf", "hugetlbfs", "binfmt_misc", "devtmpfs", "configfs", "fusectl",
))  # fmt: skip
_PROPAGATIONS: Final = frozenset(("private", "slave", "shared", "unbindable"))
_HOST_SYSTEM_DIRECTORIES: Final = ("/proc", "/sys", "/dev")
# cgroup namespaces are kept: the guest has cgroup v2 and hides its own tree that way.
_KEPT_NAMESPACES: Final = frozenset({"ipc", "uts", "mount", "user", "cgroup"})
# Devices that every Linux has under the same numbers and that reach no hardware of the host:
# null, zero, full, random, urandom, kmsg; tty, console, ptmx; tun, fuse. Source: devices.txt.
_GUEST_DEVICES: Final = frozenset(
    {(1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (1, 11), (5, 0), (5, 1), (5, 2), (10, 200), (10, 229)}
)
# What every container gets unasked. Source: OCI runtime-spec config-linux.md "Default Devices".
_DEFAULT_DEVICES: Final = {
    "/dev/null": (1, 3), "/dev/zero": (1, 5), "/dev/full": (1, 7), "/dev/random": (1, 8),
    "/dev/urandom": (1, 9), "/dev/tty": (5, 0),
}  # fmt: skip
_TYPE_ANNOTATION: Final = "io.katacontainers.pkg.oci.container_type"
_AGENT_KINDS: Final = {
    ContainerKind.SINGLE: "single_container",
    ContainerKind.SANDBOX: "pod_sandbox",
    ContainerKind.MEMBER: "pod_container",
}
_HOSTNAME_MAX: Final = 63


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedMount:
    """A bind mount of the spec whose source lies on the host and must be shared."""

    index: int  # in the spec's list of mounts
    source: Path
    destination: PurePosixPath
    read_only: bool
    is_recursive: bool
    # Whether what is mounted below a read-only source is read-only, too (`rro`).
    is_read_only_below: bool = True
    # Whether mounts that the host makes below it later appear in it (`rslave` of the specification,
    # Kubernetes' HostToContainer, and what ctr's plain binds have), and those of the container's
    # should appear on the host (`rshared`, Bidirectional), which no VM can do.
    follows_host: bool = True
    leads_host: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockDevice:
    """A disk of the host that the spec lists among its devices."""

    path: str  # in the container
    major: int
    minor: int
    read_only: bool


def check_spec(spec: JsonObject) -> None:
    """Refuse what no guest can be given. Cheap: asked before anything is taken for a container.

    Raises:
        ShimError: InvalidArgument or Unimplemented, with what to do about it.
    """
    shared_mounts(spec)
    linux = spec.get("linux") or {}
    _guest_devices(linux)
    kinds = {one.get("type") for one in linux.get("namespaces") or [] if isinstance(one, dict)}
    for mappings in ("uidMappings", "gidMappings"):
        if "user" in kinds and not linux.get(mappings):
            raise InvalidArgument(f"linux.{mappings} is empty; a user namespace needs id mappings")


def check_hooks(spec: JsonObject) -> None:
    """Refuse hooks that can't be run.

    Raises:
        InvalidArgument: naming the field.
    """
    if spec.get("hooks"):  # few have any: the others do without the module
        from shimv2.hooks import parse_hooks

        parse_hooks(spec)


def shared_mounts(spec: JsonObject) -> list[SharedMount]:
    """List the mounts that need something of the host, in the spec's order.

    Raises:
        ShimError: InvalidArgument or Unimplemented for a mount that no guest can have.
    """
    found = []
    for index, mount in enumerate(spec.get("mounts") or []):
        if not _is_bind(mount):
            _check_guest_filesystem(mount)
            continue
        if _uses_guest_source(mount):
            continue
        options = _options(mount)
        propagation = _propagation(options)
        if not mount.get("source"):
            raise InvalidArgument(f"mount {mount['destination']}: a bind needs a source")
        if "idmap" in options or "ridmap" in options or mount.get("uidMappings"):
            raise Unimplemented(
                f"mount {mount['destination']}: id-mapped mounts cannot be shared with the VM",
            )
        found.append(
            SharedMount(
                index=index,
                source=Path(str(mount.get("source", ""))),
                destination=PurePosixPath(mount["destination"]),
                # "rro" alone is a mount of the whole tree read-only as well. Source: runc,
                # libcontainer/specconv: recursive attributes are set after the plain ones.
                read_only="ro" in options or "rro" in options,
                is_recursive="bind" not in options or "rbind" in options,
                is_read_only_below="rro" in options,
                follows_host=propagation not in ("private", "unbindable"),
                leads_host=propagation == "shared",
            )
        )
    return found


def guest_spec(
    bundle: Bundle,
    *,
    guest_root: PurePosixPath,
    sources: Mapping[int, PurePosixPath],
    hosts_read_only: Collection[int] = (),
    terminal: bool,
    seccomp: bool = False,
) -> oci_pb2.Spec:
    """Build what CreateContainer carries.

    `sources` gives the guest's path for each mount that `shared_mounts` named; those in
    `hosts_read_only` are read-only by the host's word alone, as not all of them is.

    Raises:
        InvalidArgument: naming the part of config.json that can't be used.
    """
    spec = bundle.spec
    edited: JsonObject = {
        "ociVersion": spec.get("ociVersion", ""),
        "process": guest_process(bundle.process, terminal=terminal),
        "root": {"path": str(guest_root), "readonly": bool(spec["root"].get("readonly"))},
        "hostname": spec.get("hostname") or "",
        "mounts": _guest_mounts(spec, sources, hosts_read_only),
        "annotations": _guest_annotations(bundle),
        "linux": _guest_linux(bundle, seccomp=seccomp),
    }
    if in_guest := (spec.get("hooks") or {}).get("startContainer"):
        edited["hooks"] = {"startContainer": in_guest}  # all others run on the host
    return message_from_json(oci_pb2.Spec, edited, "config.json")


def guest_process(process: JsonObject, *, terminal: bool) -> JsonObject:
    """An OCI process as the guest runs it: the caller's word on the terminal, no host labels.

    Capabilities, rlimits and no-new-privileges stay as they are.
    """
    edited = copy(process)
    edited["terminal"] = terminal
    # The guest has neither AppArmor profiles nor SELinux policy of the host.
    edited.pop("apparmorProfile", None)
    edited.pop("selinuxLabel", None)
    return edited


def guest_process_message(process: JsonObject, *, terminal: bool) -> oci_pb2.Process:
    """The process of an exec as ExecProcess carries it.

    Raises:
        InvalidArgument: naming the field.
    """
    edited = guest_process(process, terminal=terminal)
    return message_from_json(oci_pb2.Process, edited, "process")


def guest_resources(resources: JsonObject) -> JsonObject:
    """Linux resources that mean something in the guest.

    Host CPU numbers, NUMA nodes, device numbers and network classes don't; block devices of the
    host don't exist there.
    """
    edited = {
        key: value
        for key, value in resources.items()
        if key in ("memory", "pids", "hugepageLimits") and value is not None
    }
    cpu = resources.get("cpu")
    if isinstance(cpu, dict):
        edited["cpu"] = {k: v for k, v in cpu.items() if k not in ("cpus", "mems")}
    if _allows_all_devices(resources):
        edited["devices"] = [{"allow": True, "access": "rwm"}]
    return edited


def shares_sandbox_pid_namespace(spec: JsonObject) -> bool:
    """Whether the container joins its pod's pid namespace instead of having its own."""
    return any(
        namespace.get("type") == "pid" and namespace.get("path")
        for namespace in (spec.get("linux") or {}).get("namespaces") or []
    )


def sandbox_hostname(bundle: Bundle) -> str:
    """The name the VM gets."""
    return str(bundle.spec.get("hostname") or bundle.sandbox_id)[:_HOSTNAME_MAX]


def _is_bind(mount: JsonObject) -> bool:
    options = _options(mount)
    return mount.get("type") == "bind" or "bind" in options or "rbind" in options


def _options(mount: JsonObject) -> list[str]:
    return list(mount.get("options") or [])


def _propagation(options: list[str]) -> str:
    names = [option.removeprefix("r") for option in options]
    return next((name for name in reversed(names) if name in _PROPAGATIONS), "")


def pod_shm(spec: JsonObject) -> str | None:
    """The host's directory of the /dev/shm that a pod's containers have in common, if any."""
    for mount in spec.get("mounts") or []:
        if _is_bind(mount) and _is_pod_shm(mount):
            return str(mount["source"])
    return None


def _is_pod_shm(mount: JsonObject) -> bool:
    # Source: containerd pkg/cri sandboxes/<id>/shm, CRI-O userdata/shm, Docker mounts/shm; the
    # host's own for hostIPC. An emptyDir that is mounted there is a volume like others.
    source = PurePosixPath(str(mount.get("source", "")))
    is_named_so = mount["destination"] == "/dev/shm" and source.name == "shm"
    return is_named_so and kubelet_volume(source) is None


def _uses_guest_source(mount: JsonObject) -> bool:
    """A bind whose source exists in every Linux: the guest's own is bound, not the host's."""
    if _is_pod_shm(mount):
        return True
    source = str(mount.get("source", ""))
    return any(
        source == directory or source.startswith(directory + "/")
        for directory in _HOST_SYSTEM_DIRECTORIES
    )


def _check_guest_filesystem(mount: JsonObject) -> None:
    kind = mount.get("type") or "none"
    if kind not in _GUEST_FILESYSTEMS:
        raise InvalidArgument(
            f"mount {mount['destination']}: filesystem type {kind!r} cannot be mounted in the VM; "
            "mount it on the host and bind it",
        )


def _guest_mounts(
    spec: JsonObject, sources: Mapping[int, PurePosixPath], hosts_read_only: Collection[int]
) -> list[JsonObject]:
    mounts = []
    for index, mount in enumerate(spec.get("mounts") or []):
        edited = {key: mount[key] for key in ("destination", "source", "type") if mount.get(key)}
        edited["options"] = _options(mount)
        if index in hosts_read_only:
            edited["options"] = [option for option in _options(mount) if option != "ro"]
        if index in sources:
            edited["source"] = str(sources[index])
            edited["type"] = "bind"
        elif _is_bind(mount) and _is_pod_shm(mount):
            edited["source"] = str(GUEST_SHM)
            edited["type"] = "bind"
        mounts.append(edited)
    return mounts


def _guest_annotations(bundle: Bundle) -> dict[str, str]:
    kept = {
        str(key): str(value)
        for key, value in bundle.annotations.items()
        # Initdata is consumed by the host and can be megabytes.
        if not str(key).endswith("cc_init_data")
    }
    kept[_TYPE_ANNOTATION] = _AGENT_KINDS[bundle.kind]
    return kept


def _guest_linux(bundle: Bundle, *, seccomp: bool) -> JsonObject:
    linux = bundle.spec.get("linux") or {}
    edited = {
        key: linux[key]
        for key in (
            "uidMappings",
            "gidMappings",
            "sysctl",
            "rootfsPropagation",
            "maskedPaths",
            "readonlyPaths",
        )
        if linux.get(key) is not None
    }
    edited["cgroupsPath"] = f"/{bundle.container_id}"
    edited["namespaces"] = _guest_namespaces(linux)
    edited["devices"] = _guest_devices(linux)
    edited["resources"] = guest_resources(linux.get("resources") or {})
    if seccomp and linux.get("seccomp"):
        edited["seccomp"] = linux["seccomp"]
    return edited


def _guest_namespaces(linux: JsonObject) -> list[JsonObject]:
    # A path names a namespace of the host; in the guest the sandbox has one of each to share.
    return [
        {"type": namespace["type"], "path": ""}
        for namespace in linux.get("namespaces") or []
        if namespace.get("type") in _KEPT_NAMESPACES
    ]


def block_devices(spec: JsonObject) -> list[BlockDevice]:
    """List the host's disks that the spec gives to the container, one by one."""
    linux = spec.get("linux") or {}
    return [
        BlockDevice(
            path=str(device["path"]),
            major=int(device["major"]),
            minor=int(device["minor"]),
            read_only="w" not in access,
        )
        for device in linux.get("devices") or []
        if (access := _disk_access(device, linux)) is not None
    ]


def _disk_access(device: JsonObject, linux: JsonObject) -> str | None:
    """How a container may use a disk that its spec lists; None if that is no disk of its own.

    A privileged container lists every disk of the host: its own have a rule that names them.
    """
    numbers = (device.get("major"), device.get("minor"))
    if device.get("type") != "b" or not all(isinstance(one, int) for one in numbers):
        return None
    resources = linux.get("resources") or {}
    for rule in reversed(resources.get("devices") or []):
        is_its = rule.get("type") == "b" and (rule.get("major"), rule.get("minor")) == numbers
        if is_its:
            return str(rule.get("access") or "rwm") if rule.get("allow") else None
    return None if _allows_all_devices(resources) else "rwm"


def _guest_devices(linux: JsonObject) -> list[JsonObject]:
    # A privileged container lists all of the host's devices; what it may use are its machine's.
    is_privileged = _allows_all_devices(linux.get("resources") or {})
    kept = []
    for device in linux.get("devices") or []:
        number = (device.get("major"), device.get("minor"))
        is_guests = device.get("type") in ("c", "u") and number in _GUEST_DEVICES
        if is_guests and _is_default(device):
            continue  # Kata's agent makes its own first, and stumbles over a second
        # The agent puts in the guest's numbers of a disk.
        if is_guests or _disk_access(device, linux) is not None:
            kept.append(device)
        elif not is_privileged:
            raise InvalidArgument(
                f"device {device.get('path')} ({device.get('type')} {number[0]}:{number[1]}) is "
                "the host's and cannot be given to a VM; remove it"
            )
    return kept


def _is_default(device: JsonObject) -> bool:
    number = (device.get("major"), device.get("minor"))
    is_roots = not device.get("uid") and not device.get("gid")
    has_usual_mode = (device.get("fileMode") or 0o666) & 0o7777 == 0o666
    return _DEFAULT_DEVICES.get(device.get("path", "")) == number and is_roots and has_usual_mode


def _allows_all_devices(resources: JsonObject) -> bool:
    allowed = False
    for rule in resources.get("devices") or []:
        is_general = rule.get("type") in (None, "", "a") and rule.get("major") in (None, -1)
        if is_general and "rwm" in str(rule.get("access", "rwm")):
            allowed = bool(rule.get("allow"))
    return allowed
