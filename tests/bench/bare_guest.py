"""The bare recipe: QEMU, the kernel, eight modules and a C init, timed from fork to vsock.

Nothing of the product runs but its kernel and modules. Source of the recipe: the fastest q35 boot
that was found under emulation (qboot, PVH, CPU model qemu64, uncompressed initrd of 1.2 MB).
"""

from __future__ import annotations

import select
import socket
import subprocess
import tempfile
import time
from pathlib import Path

from tests.harness.node import BUILD

_MODULES = ("virtio_ring", "virtio", "virtio_pci_modern_dev", "virtio_pci_legacy_dev",
            "virtio_pci", "vsock", "vmw_vsock_virtio_transport_common",
            "vmw_vsock_virtio_transport")
_CMDLINE = ("console=ttyS0 panic=-1 quiet tsc=reliable no_timer_check noreplace-smp "
            "cryptomgr.notests nokaslr mitigations=off")
_DEADLINE_S = 60


def build_initrd(directory: Path) -> Path:
    """Compile the init and pack it with the modules of the guest image; return the initrd."""
    init = directory / "init"
    subprocess.run(["cc", "-Os", "-static", "-nostdlib", "-fno-stack-protector", "-fno-pie",
                    "-no-pie", "-s", "-o", str(init), str(Path(__file__).with_name("bare_init.c"))],
                   check=True)
    files = read_newc((BUILD / "guest" / "initrd.img").read_bytes())
    modules = {Path(name).name: data for name, data in files.items() if name.endswith(".ko")}
    members = [("dev", 0o40755, b""), ("m", 0o40755, b""), ("init", 0o100755, init.read_bytes())]
    members += [(f"m/{number:02d}.ko", 0o100644, modules[f"{name}.ko"])
                for number, name in enumerate(_MODULES)]
    initrd = directory / "bare.img"
    initrd.write_bytes(write_newc(members))
    return initrd


def time_boot(initrd: Path) -> float:
    """Boot once; return the seconds from the start of QEMU to the guest's connection."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        vsock, hybrid = directory / "v", directory / "h"
        device = subprocess.Popen(
            [str(BUILD / "bin" / "vhost-device-vsock"), "--guest-cid=3", f"--socket={vsock}",
             f"--uds-path={hybrid}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(f"{hybrid}_9999")
                listener.listen()
                _wait_for(vsock)
                return _boot(initrd, vsock, listener)
        finally:
            device.kill()
            device.wait()


def _boot(initrd: Path, vsock: Path, listener: socket.socket) -> float:
    begin = time.perf_counter()
    qemu = subprocess.Popen(
        ["qemu-system-x86_64", "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none",
         "-M", "q35,accel=tcg,memory-backend=mem", "-bios", "qboot.rom", "-cpu", "qemu64",
         "-smp", "1", "-m", "512", "-object", "memory-backend-memfd,id=mem,size=512M,share=on",
         "-kernel", str(BUILD / "guest" / "vmlinux"), "-initrd", str(initrd),
         "-append", _CMDLINE, "-serial", f"file:{vsock.with_name('console')}",
         "-chardev", f"socket,id=v,path={vsock}", "-device", "vhost-user-vsock-pci,chardev=v"],
        stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        ready, _, _ = select.select([listener], [], [], _DEADLINE_S)
        if not ready:
            console = vsock.with_name("console").read_text(errors="replace")[-500:]
            raise RuntimeError(f"the bare guest isn't up after {_DEADLINE_S} s: {console}")
        return time.perf_counter() - begin
    finally:
        qemu.kill()
        qemu.wait()


def _wait_for(path: Path) -> None:
    deadline = time.monotonic() + 10
    while not path.exists():
        if time.monotonic() > deadline:
            raise RuntimeError(f"vhost-device-vsock made no socket {path}")
        time.sleep(0.01)


def read_newc(archive: bytes) -> dict[str, bytes]:
    """Return the files of a cpio archive in newc format."""
    files: dict[str, bytes] = {}
    position = 0
    while archive[position:position + 6] == b"070701":
        fields = [int(archive[position + 6 + 8 * n:position + 14 + 8 * n], 16) for n in range(13)]
        size, name_size = fields[6], fields[11]
        name = archive[position + 110:position + 110 + name_size - 1].decode()
        start = _aligned(position + 110 + name_size)
        if name == "TRAILER!!!":
            break
        files[name] = archive[start:start + size]
        position = _aligned(start + size)
    return files


def write_newc(members: list[tuple[str, int, bytes]]) -> bytes:
    """Return a cpio archive in newc format with these (name, mode, content)."""
    out = bytearray()
    for inode, (name, mode, data) in enumerate([*members, ("TRAILER!!!", 0, b"")], 1):
        values = (inode, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
        out += b"070701" + b"".join(b"%08X" % value for value in values)
        out += name.encode() + b"\0"
        out += bytes(_aligned(len(out)) - len(out)) + data
        out += bytes(_aligned(len(out)) - len(out))
    return bytes(out)


def _aligned(position: int) -> int:
    return (position + 3) & ~3
