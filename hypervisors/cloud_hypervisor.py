"""The Cloud Hypervisor backend: checks a specification, launches the VMM and takes control of it.

    launch ── spawn ── ping, create, add-net …, boot ──> ClhMachine.run
                                                          ├── monitor reader  events
                                                          ├── console reader  ring
                                                          └── child           pidfd, stderr

The VMM gets its API socket as a descriptor, already listening and without a name in any directory.
It runs as a user that owns nothing but one directory (vmm_dir.py); what it opens by path it finds
below /proc/self/fd.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

import trio

from . import accel, clh_config, isolation, spec_check
from .child import spawn
from .clh_devices import API, NAME
from .clh_machine import ClhMachine
from .disk_lease import lease
from .disk_nodes import DiskNodes
from .empty_root import CLONE_NEWNS, read_only_root
from .errors import (
    CommandTimeout,
    ControlError,
    ControlLost,
    HttpRejected,
    LaunchFailed,
    PreconditionFailed,
    Unsupported,
)
from .http_api import HttpApi
from .machine import (
    BlockDevice,
    Capabilities,
    HybridVsock,
    KernelVsock,
    NetDevice,
    Rng,
    SharedDirectory,
    UnixVsock,
)
from .supervision import EXIT_GRACE_S, close_socket
from .vmm_dir import SOCKET_NAME, VmmDirectory

if TYPE_CHECKING:
    from .bounded_json import JsonValue
    from .child import Child, Recorder
    from .child_exec import Account
    from .machine import MachineSpec

# Alone it takes 0.1 s; most of it is the kernel's copy into the guest's memory.
LAUNCH_DEADLINE_S: Final = 30.0
MIN_VERSION: Final = 52
# Where x86's first numbering of processors ends.
MAX_VCPUS: Final = 254
FIX: Final = "install cloud-hypervisor, or correct the hypervisor path"
FIRST_FD: Final = 3
API_BACKLOG: Final = 8


class CloudHypervisor:
    """Machines of Cloud Hypervisor, which needs KVM."""

    name = NAME

    def capabilities(self, spec: MachineSpec) -> Capabilities:
        """See `Hypervisor.capabilities`."""
        room = spec.hotplug_ports > 0
        growth = spec.max_memory_mib - spec.memory_mib
        return Capabilities(
            shared_directory=True,
            block_hotplug=room,
            block_unplug=room,
            net_hotplug=room,
            vcpu_hotplug=spec.max_vcpus > spec.vcpus,
            vcpu_unplug=True,
            memory_hotplug=growth >= clh_config.MEMORY_STEP_MIB,
            pause=True,
            panic_event=True,
            hybrid_vsock=True,
            kernel_vsock=False,
            unix_vsock=False,
            max_vcpus=MAX_VCPUS,
            memory_step_mib=clh_config.MEMORY_STEP_MIB,
        )

    def check(self, spec: MachineSpec) -> None:
        """See `Hypervisor.check`."""
        spec_check.check_program("Cloud Hypervisor", spec.binary, FIX)
        accel.require_kvm(self.name, "Cloud Hypervisor", spec.accelerator)
        self._check_layout(spec)
        spec_check.check_values(spec, clh_config.kernel_cmdline(spec))
        spec_check.check_kernel(spec.kernel)
        if spec.initrd is not None:
            spec_check.check_initrd(spec.initrd)
        if _account(spec) is not None:
            spec_check.check_executable_by_all("Cloud Hypervisor", spec.binary.resolve())
            spec_check.check_readable_by_all("guest kernel", spec.kernel)
            if spec.initrd is not None:
                spec_check.check_readable_by_all("guest initrd", spec.initrd)

    async def launch(self, spec: MachineSpec, *, record: Recorder) -> ClhMachine:
        """See `Hypervisor.launch`."""
        self.check(spec)
        account = _account(spec)
        async with contextlib.AsyncExitStack() as undo:
            directory = VmmDirectory.create(spec.run_dir, "clh", account)
            undo.callback(directory.remove)
            nodes = _disk_nodes(spec, directory, account, undo)
            has_landlock = isolation.has_landlock() and (nodes is not None or not _has_disks(spec))
            monitor, console = _Pair(undo), _Pair(undo)
            shown = undo.enter_context(contextlib.ExitStack())
            with contextlib.ExitStack() as theirs:
                theirs.callback(monitor.theirs.close)
                theirs.callback(console.theirs.close)
                listener, api = _bind_api(spec, undo)
                theirs.callback(listener.close)
                table = _Handover(theirs)
                host = _open_host_side(spec, directory, table, has_landlock)
                if nodes is not None:
                    host = replace(host, images=_show_disks(spec, nodes, host, shown, undo))
                namespaces = isolation.machine_namespaces(spec.network_namespace)
                if isolation.hides_files():
                    namespaces["unshare"] |= CLONE_NEWNS
                child = await spawn(
                    NAME,
                    _argv(spec, table.add(listener.fileno()), table.add(monitor.theirs.fileno())),
                    record=record,
                    pass_fds=table.pass_fds,
                    stdout=console.theirs.fileno(),
                    user=account,
                    no_new_privileges=True,
                    **namespaces,
                )
                undo.push_async_callback(child.aclose)
            machine = ClhMachine(
                spec, child, api, monitor.ours, console.ours,
                nodes=nodes, directory=host.directory,
            )  # fmt: skip
            await _start(machine, spec, child, api, clh_config.vm_config(spec, host))
            if isolation.hides_files():
                await read_only_root(NAME, child.pid)
            shown.close()
            directory.seal()
            _publish(spec, directory)
            machine.keep(undo.pop_all())
            return machine

    def _check_layout(self, spec: MachineSpec) -> None:
        def refuse(operation: str, why: str, hint: str) -> None:
            raise Unsupported(self.name, operation, why, hint)

        slots = len(spec.devices) + spec.hotplug_ports
        if slots > clh_config.MAX_DEVICES or spec.hotplug_ports < 0:
            refuse(
                f"have {len(spec.devices)} devices and {spec.hotplug_ports} hot-plug ports",
                f"the bus has {clh_config.MAX_DEVICES} slots for them",
                "lower hotplug_ports",
            )
        if spec.max_vcpus > MAX_VCPUS:
            refuse(f"have {spec.max_vcpus} vCPUs", f"it ends at {MAX_VCPUS}", "lower the maximum")
        for kind, what in ((HybridVsock, "vsock devices"), (Rng, "entropy sources")):
            if (count := sum(isinstance(device, kind) for device in spec.devices)) > 1:
                refuse(f"have {count} {what}", "it has room for one", "leave the others out")
        for device in spec.devices:
            match device:
                case KernelVsock() | UnixVsock():
                    refuse(
                        f"use a {type(device).__name__}",
                        "its vsock device is its own",
                        "give it a HybridVsock",
                    )
                case NetDevice() if len(device.tap_fds) > spec.vcpus:
                    refuse(
                        f"give {device.id} {len(device.tap_fds)} queues",
                        f"the machine starts with {spec.vcpus} vCPUs",
                        "lower network_queues",
                    )


@dataclass(slots=True)
class _Handover:
    """Numbers descriptors for the child, and closes our own copies when it has them."""

    ours: contextlib.ExitStack
    pass_fds: dict[int, int] = field(default_factory=dict)

    def add(self, fd: int) -> int:
        number = FIRST_FD + len(self.pass_fds)
        self.pass_fds[number] = fd
        return number

    def open(self, path: Path, flags: int) -> str:
        """Open a file for the child; returns the path by which it opens it again."""
        fd = os.open(path, flags | os.O_CLOEXEC)
        self.ours.callback(os.close, fd)
        return f"/proc/self/fd/{self.add(fd)}"


class _Pair:
    def __init__(self, undo: contextlib.AsyncExitStack) -> None:
        self.ours, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        undo.callback(close_socket, self.ours)
        self.ours.setblocking(False)


def _account(spec: MachineSpec) -> Account | None:
    return isolation.machine_account(spec.id, "kvm") if spec.unprivileged else None


def _argv(spec: MachineSpec, api_fd: int, monitor_fd: int) -> list[str]:
    return [
        str(spec.binary),
        "--api-socket",
        f"fd={api_fd}",
        "--event-monitor",
        f"fd={monitor_fd}",
        "--seccomp",
        "true",
    ]


def _bind_api(spec: MachineSpec, undo: contextlib.AsyncExitStack) -> tuple[socket.socket, HttpApi]:
    """A listening socket for the VMM and a client for it, which reaches it by a descriptor.

    The name exists only in between: nobody else can connect, and nothing is left of it.
    """
    path = spec.run_dir / "clh-api.sock"
    path.unlink(missing_ok=True)
    with contextlib.ExitStack() as failure:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        failure.callback(listener.close)
        listener.bind(str(path))
        try:
            handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
        finally:
            path.unlink()
        undo.callback(os.close, handle)
        listener.listen(API_BACKLOG)
        failure.pop_all()
    api = HttpApi(f"/proc/self/fd/{handle}")
    undo.callback(api.close)
    return listener, api


def _open_host_side(
    spec: MachineSpec, directory: VmmDirectory, table: _Handover, has_landlock: bool
) -> clh_config.HostSide:
    """Open what the VMM needs, as far as it can be by descriptor, and hand the rest to its user.

    Raises:
        LaunchFailed: a device's daemon is not there.
        OSError: a file is gone since `check`.
    """
    shares: dict[str, str] = {}
    images: dict[str, str] = {}
    for device in spec.devices:
        match device:
            case BlockDevice():
                images[device.id] = str(device.path)
            case SharedDirectory():
                try:
                    # A handle on the socket itself: its directory is closed to the VMM's user.
                    shares[device.id] = table.open(device.socket, os.O_PATH)
                    directory.give(device.socket)
                except OSError as error:
                    raise LaunchFailed(
                        f"the daemon of {device.id}",
                        f"refused {device.socket} ({error.strerror})",
                        (),
                    ) from error
            case HybridVsock():
                directory.admit_listeners(device)
    own = table.open(directory.path, os.O_RDONLY | os.O_DIRECTORY)
    return clh_config.HostSide(
        kernel=table.open(spec.kernel, os.O_RDONLY),
        initrd=table.open(spec.initrd, os.O_RDONLY) if spec.initrd is not None else None,
        directory=own,
        vsock=f"{own}/{SOCKET_NAME}",
        shares=shares,
        images=images,
        has_landlock=has_landlock,
    )


def _has_disks(spec: MachineSpec) -> bool:
    return spec.hotplug_ports > 0 or any(isinstance(one, BlockDevice) for one in spec.devices)


def _disk_nodes(
    spec: MachineSpec,
    directory: VmmDirectory,
    account: Account | None,
    undo: contextlib.AsyncExitStack,
) -> DiskNodes | None:
    """Where disks are shown to a VMM that cannot open them by their own paths."""
    confined = account is not None or isolation.has_landlock()
    if not confined or os.geteuid() != 0 or not _has_disks(spec):
        return None
    nodes = DiskNodes(directory.path / clh_config.DISKS_NAME, account)
    try:
        nodes.mount()
    except OSError as error:
        raise PreconditionFailed(
            "directory for the VMM's disks", path=directory.path, why="cannot be mounted",
            errno=error.errno, fix="run the shim as root with CAP_SYS_ADMIN, or hotplug_ports = 0",
        ) from error  # fmt: skip
    undo.callback(nodes.unmount)
    return nodes


def _show_disks(
    spec: MachineSpec,
    nodes: DiskNodes,
    host: clh_config.HostSide,
    shown: contextlib.ExitStack,
    undo: contextlib.AsyncExitStack,
) -> dict[str, str]:
    """Show the disks of the specification until `shown` is closed, and lease them until `undo`."""
    images: dict[str, str] = {}
    for device in spec.devices:
        if isinstance(device, BlockDevice):
            leased = lease(device)
            undo.callback(leased.close)
            name = shown.enter_context(nodes.exposed(device, leased))
            images[device.id] = f"{host.directory}/{clh_config.DISKS_NAME}/{name}"
    return images


def _publish(spec: MachineSpec, directory: VmmDirectory) -> None:
    for device in spec.devices:
        if isinstance(device, HybridVsock):
            try:
                directory.publish(device)
            except OSError as error:
                ending = f"has no vsock for {device.uds_path} ({error.strerror})"
                raise LaunchFailed(NAME, ending, ()) from error


async def _start(
    machine: ClhMachine,
    spec: MachineSpec,
    child: Child,
    api: HttpApi,
    config: clh_config.Body,
) -> None:
    """Build the machine and let it run.

    Raises:
        PreconditionFailed: the VMM is too old.
        LaunchFailed: it ended, refused, or stayed mute.
    """
    ending = f"gave no answer within {LAUNCH_DEADLINE_S:g} s"
    cause: Exception | None = None
    with trio.move_on_after(LAUNCH_DEADLINE_S):
        try:
            await _take_control(machine, spec, api, config)
        except HttpRejected as error:
            ending, cause = f"refused {error.target}: {error.text}", error
        except ControlLost as error:
            ending, cause = f"does not serve its API ({error.why})", error
            with trio.move_on_after(EXIT_GRACE_S):
                ending = str(await child.wait())
        except CommandTimeout as error:
            cause = error
        except ControlError as error:
            ending, cause = f"broke its control protocol: {error}", error
        else:
            return
    raise LaunchFailed(NAME, ending, child.stderr_tail) from cause


async def _take_control(
    machine: ClhMachine, spec: MachineSpec, api: HttpApi, config: clh_config.Body
) -> None:
    async def ask(
        method: str,
        action: str,
        body: clh_config.Body | None = None,
        fds: tuple[int, ...] = (),
    ) -> JsonValue:
        target = f"{API}/{action}"
        return await api.request(method, target, body, fds=fds, timeout_s=LAUNCH_DEADLINE_S)

    _check_version(spec, await ask("GET", "vmm.ping"))
    await ask("PUT", "vm.create", config)
    for device in spec.devices:
        if isinstance(device, NetDevice):
            body = clh_config.net_config(device)
            await ask("PUT", "vm.add-net", body, fds=device.tap_fds)
    await ask("PUT", "vm.boot")
    known = clh_config.device_addresses(await ask("GET", "vm.info"))
    machine.place({device.id: known[device.id] for device in spec.devices if device.id in known})


def _check_version(spec: MachineSpec, answer: JsonValue) -> None:
    version = answer.get("version") if isinstance(answer, dict) else None
    found = re.match(r"v?(\d+)\.", version) if isinstance(version, str) else None
    if found is None or int(found[1]) < MIN_VERSION:
        raise PreconditionFailed(
            "Cloud Hypervisor",
            path=spec.binary,
            why=f"its version is {version!r:.40}",
            fix=f"install version {MIN_VERSION} or newer",
        )
