"""A node with real KVM, vhost-vsock, vhost-net and cgroup v2 on a machine that has none of them.

QEMU emulates a machine whose processor has AMD-V with nested paging; the guest's kernel package
runs on it, over this machine's own root file system: virtio-fs, read-only, below a tmpfs. One boot
runs one command as root, hands on its output as it comes, and returns its status.

    with ExitStack:  virtiofsd for each directory ── listening sockets without names
                     QEMU                         ── output, status, console: socket pairs
    select until QEMU has closed them, or the deadline

Nothing but processes is taken from the machine, and these die with the process that called `run`
(PDEATHSIG): no file, no named socket, no mount. Inside there is no network but loopback, and all
that is written outside of the `writable` directories is lost. Figures of time from inside mean
little: everything is emulated.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import shlex
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from guest.image import cpio
from guest.image.kernel import KernelPackage, module_bytes, module_order
from hypervisors import accel
from hypervisors.virtiofsd import flavour_of
from tests.kvm_node.kernel import unpacked_kernel

HERE = Path(__file__).parent
BUSYBOX = Path("/bin/busybox")
VIRTIOFSDS = (Path("/usr/libexec/virtiofsd"), Path("/usr/lib/qemu/virtiofsd"))
# What the first program needs; the second loads the rest from the machine's files.
_BOOT_MODULES = ("virtio_pci", "virtiofs", "overlay", "virtio_console")
_KERNEL_COMMAND_LINE = (
    "console=ttyS0 quiet panic=-1 tsc=reliable no_timer_check cryptomgr.notests mitigations=off"
    " init_on_alloc=0 audit=0 apparmor=0 random.trust_cpu=1"
)
# Everything that QEMU emulates, AMD-V and nested paging included, but: a fifth level of page
# tables; string instructions as the fast way to copy, which are a step for each byte here; and
# protection keys, whose place in the XSAVE area makes guests of this CPU complain.
_CPU = "max,la57=off,erms=off,fsrm=off,pku=off"
# More do not help where QEMU has two processors itself.
_VCPUS = 2
_CHUNK_BYTES = 1 << 16
_CONSOLE_BYTES = 8192
_POWER_OFF_S = 30.0
_REAP_S = 10.0


class NodeFailed(Exception):
    """The node ended without the command's status: no such program, a panic, the deadline."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What runs on the node. `writable` directories are the machine's own, at the same path."""

    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    directory: Path = Path("/")
    writable: tuple[Path, ...] = ()
    memory_mib: int = 4096
    deadline_s: float = 600.0


def run(job: Job, output: Callable[[bytes], object]) -> int:
    """Boot a node, run the job's command, return its status. Nothing is left afterwards.

    `output` gets the command's stdout and stderr, mixed, as they come.
    Raises NodeFailed, with the last lines of the node's console.
    """
    programs = _programs()
    package = unpacked_kernel()
    shares = {"machine": Path("/")}
    shares |= {f"writable{number}": path for number, path in enumerate(job.writable)}
    with contextlib.ExitStack() as stack:
        console, console_peer = _pair(stack)
        ports = {name: _pair(stack) for name in ("output", "status")}
        sockets = {
            tag: _serve(stack, programs["virtiofsd"], path, console_peer)
            for tag, path in shares.items()
        }
        initrd = os.memfd_create("initrd")
        stack.callback(os.close, initrd)
        with open(initrd, "wb", closefd=False) as stream:
            stream.write(cpio.archive(_initrd(job, package, shares)))
        peers = {name: pair[1] for name, pair in ports.items()} | {"console": console_peer}
        argv = [
            programs["qemu"],
            *_machine(job, package, initrd),
            *_chardevs({**sockets, **peers}),
            *_devices(shares, ports),
        ]
        descriptors = [initrd, *(one.fileno() for one in (*sockets.values(), *peers.values()))]
        qemu = _spawn(stack, argv, descriptors, console_peer)
        for one in (*sockets.values(), *peers.values()):
            one.close()
        reader = _Reader(output, ports["output"][0], ports["status"][0], console)
        return reader.read(qemu, job.deadline_s)


class _Reader:
    """Copies what the node says until QEMU has closed every socket, or the deadline."""

    def __init__(
        self,
        output: Callable[[bytes], object],
        output_socket: socket.socket,
        status_socket: socket.socket,
        console_socket: socket.socket,
    ) -> None:
        self._status = b""
        self._console = b""
        self._takers: dict[socket.socket, Callable[[bytes], object]] = {
            output_socket: output,
            status_socket: self._take_status,
            console_socket: self._take_console,
        }

    def read(self, qemu: subprocess.Popen[bytes], deadline_s: float) -> int:
        """Return the command's status."""
        deadline = time.monotonic() + deadline_s
        with selectors.DefaultSelector() as selector:
            for one in self._takers:
                selector.register(one, selectors.EVENT_READ)
            while selector.get_map():
                ready = selector.select(max(0.0, deadline - time.monotonic()))
                if not ready:
                    break
                for key, _ in ready:
                    if self._copy(key.fileobj):  # type: ignore[arg-type]  # sockets are registered
                        continue
                    selector.unregister(key.fileobj)
                if self._status:
                    deadline = min(deadline, time.monotonic() + _POWER_OFF_S)
        if self._status.strip().isdigit():
            return int(self._status)
        late = time.monotonic() >= deadline
        why = f"not done after {deadline_s:g} s" if late else f"QEMU exited: {qemu.wait(_REAP_S)}"
        console = self._console.decode(errors="replace").replace("\r", "")
        raise NodeFailed(f"the KVM node ended without a status: {why}; its console:\n{console}")

    def _copy(self, source: socket.socket) -> bool:
        try:
            data = source.recv(_CHUNK_BYTES)
        except ConnectionResetError:
            data = b""
        if data:
            self._takers[source](data)
        return bool(data)

    def _take_status(self, data: bytes) -> None:
        self._status += data

    def _take_console(self, data: bytes) -> None:
        self._console = (self._console + data)[-_CONSOLE_BYTES:]


def _programs() -> dict[str, str]:
    qemu = shutil.which("qemu-system-x86_64")
    virtiofsd = next((path for path in VIRTIOFSDS if path.exists()), None)
    if qemu is None or virtiofsd is None or not BUSYBOX.exists():
        raise NodeFailed("qemu-system-x86_64, virtiofsd or busybox is missing: run `make setup`")
    return {"qemu": qemu, "virtiofsd": str(virtiofsd)}


def _pair(stack: contextlib.ExitStack) -> tuple[socket.socket, socket.socket]:
    ours, theirs = socket.socketpair()
    stack.callback(ours.close)
    stack.callback(theirs.close)
    return ours, theirs


def _spawn(
    stack: contextlib.ExitStack, argv: Sequence[str], descriptors: Sequence[int], log: socket.socket
) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        ["setpriv", "--pdeathsig", "KILL", *argv],
        stdin=subprocess.DEVNULL,
        stdout=log.fileno(),
        stderr=log.fileno(),
        pass_fds=descriptors,
    )

    def end() -> None:
        process.kill()
        process.wait(_REAP_S)

    stack.callback(end)
    return process


def _serve(
    stack: contextlib.ExitStack, program: str, directory: Path, log: socket.socket
) -> socket.socket:
    """Start a virtiofsd for `directory` and return a connection to it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind("")  # an abstract name of the kernel's choice
        listener.listen(1)
        # What is below "/" does not change under a node, so that it may be remembered; and "/" can
        # be left only by chroot: pivot_root refuses it.
        cache = "always" if directory == Path("/") else "auto"
        argv = [program, f"--fd={listener.fileno()}"]
        if flavour_of(Path(program)) == "rust":
            argv += [f"--shared-dir={directory}", "--sandbox=chroot", f"--cache={cache}"]
        else:
            argv += ["-f", "-o", f"source={directory}", "-o", "sandbox=chroot"]
            argv += ["-o", f"cache={cache}", "-o", "log_level=err"]
        _spawn(stack, argv, [listener.fileno()], log)
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        stack.callback(connection.close)
        connection.connect(listener.getsockname())
    return connection


def _initrd(job: Job, package: KernelPackage, shares: Mapping[str, Path]) -> cpio.Tree:
    tree = cpio.Tree()
    tree.character_device("dev/console", 5, 1)
    tree.file("bin/busybox", BUSYBOX.read_bytes(), 0o755)
    tree.file("init", (HERE / "init.sh").read_bytes(), 0o755)
    names = []
    for path in module_order(package, _BOOT_MODULES):
        name, data = module_bytes(path)
        tree.file(f"boot-modules/{name}", data)
        names.append(f"/boot-modules/{name}\n")
    tree.file("modules", "".join(names).encode())
    writable = [f"{tag} {path}\n" for tag, path in shares.items() if tag != "machine"]
    modules = package.root / "lib" / "modules" / package.release
    settings = f"release={package.release}\nmodules={shlex.quote(str(modules))}\n"
    exports = [f"export {name}={shlex.quote(text)}" for name, text in job.environment.items()]
    command = [*exports, f"cd {shlex.quote(str(job.directory))}", f"exec {shlex.join(job.command)}"]
    tree.file("kvm-node/inside.sh", (HERE / "inside.sh").read_bytes(), 0o755)
    tree.file("kvm-node/settings", settings.encode())
    tree.file("kvm-node/writable", "".join(writable).encode())
    tree.file("kvm-node/command", ("\n".join(command) + "\n").encode())
    return tree


def _kernel_command_line() -> str:
    """Tell the kernel what it measures wrong on a busy machine: its clock would run too fast."""
    khz = accel.tsc_khz()
    return _KERNEL_COMMAND_LINE + (f" tsc_early_khz={khz}" if khz else "")


def _machine(job: Job, package: KernelPackage, initrd: int) -> list[str]:
    # fmt: off
    return [
        "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none",
        "-machine", "q35,memory-backend=memory",
        "-accel", "tcg,thread=multi",
        "-cpu", _CPU,
        "-smp", str(_VCPUS),
        "-m", str(job.memory_mib),
        "-object", f"memory-backend-memfd,id=memory,size={job.memory_mib}M,share=on",
        "-kernel", str(package.bzimage),
        "-initrd", f"/proc/self/fd/{initrd}",
        "-append", _kernel_command_line(),
    ]
    # fmt: on


def _chardevs(sockets: Mapping[str, socket.socket]) -> list[str]:
    argv = []
    for name, one in sockets.items():
        argv += ["-chardev", f"socket,id={name},fd={one.fileno()}"]
    return argv


def _devices(shares: Mapping[str, Path], ports: Mapping[str, object]) -> list[str]:
    argv = ["-serial", "chardev:console", "-device", "virtio-serial-pci"]
    for tag in shares:
        argv += ["-device", f"vhost-user-fs-pci,chardev={tag},tag={tag},queue-size=1024"]
    for name in ports:
        argv += ["-device", f"virtserialport,chardev={name},name={name}"]
    return argv
