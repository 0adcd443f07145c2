"""The bare recipe: how fast QEMU, this kernel and the least of an init get to a vsock connection.

The machine: q35, qboot, the kernel by PVH, an initrd with eight modules and
a static init, a vsock device and nothing else. What our sandboxes take longer is our own.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Self

from guest.image.cpio import Tree, archive
from hypervisors.accel import choose_accelerator
from tests.harness.node import BUILD

_PORT: Final = 1030
_DEADLINE_S: Final = 20.0
_LAST_MODULE: Final = "vmw_vsock_virtio_transport.ko"
_CMDLINE: Final = (
    "console=ttyS0 panic=-1 quiet tsc=reliable no_timer_check noreplace-smp cryptomgr.notests"
)
_TCG_CMDLINE: Final = "nokaslr mitigations=off"
_NEWC_HEADER: Final = 110


def read_cpio(data: bytes) -> dict[str, bytes]:
    """Return the regular files of a newc archive. Source: buffer-format.rst, as in guest/image."""
    files: dict[str, bytes] = {}
    at = 0
    while True:
        fields = [int(data[at + 6 + 8 * n : at + 14 + 8 * n], 16) for n in range(13)]
        size, name_size = fields[6], fields[11]
        name = data[at + _NEWC_HEADER : at + _NEWC_HEADER + name_size - 1].decode()
        if name == "TRAILER!!!":
            return files
        start = at + _NEWC_HEADER + name_size + 3 & ~3
        if fields[1] & 0o170000 == 0o100000:
            files[name] = data[start : start + size]
        at = start + size + 3 & ~3


def build_initrd(directory: Path) -> Path:
    """Compile the init and pack it with the vsock modules of our own initrd."""
    init = directory / "bare_init"
    source = Path(__file__).with_name("bare_init.c")
    subprocess.run(["cc", "-Os", "-static", "-s", "-Wall", "-o", init, source], check=True)
    ours = read_cpio((BUILD / "guest" / "initrd.img").read_bytes())
    modules = ours["etc/modules"].decode().split()
    last = next(n for n, path in enumerate(modules) if path.endswith("/" + _LAST_MODULE))
    tree = Tree()
    for path in modules[: last + 1]:
        tree.file(path, ours[path.lstrip("/")])
    tree.file("/etc/modules", "".join(f"{path}\n" for path in modules[: last + 1]).encode())
    tree.directory("/dev")
    tree.character_device("/dev/console", 5, 1)
    tree.file("/init", init.read_bytes(), 0o755)
    target = directory / "bare.img"
    target.write_bytes(archive(tree))
    return target


class BareRecipe:
    """Boots the bare guest as often as asked. A context manager: its directory is temporary."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self._accelerator = choose_accelerator("auto")

    def __enter__(self) -> Self:
        self._directory = Path(
            self._stack.enter_context(tempfile.TemporaryDirectory(prefix="kata-bare-"))
        )
        self._initrd = build_initrd(self._directory)
        return self

    def __exit__(self, *details: object) -> None:
        self._stack.close()

    def boot_ms(self) -> float:
        """Milliseconds from the fork of QEMU until the guest's connection arrives."""
        with self._vsock_device(), contextlib.ExitStack() as stack:
            listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            path = self._directory / f"uds_{_PORT}"
            listener.bind(str(path))
            stack.callback(path.unlink)
            listener.listen(1)
            listener.settimeout(_DEADLINE_S)
            started = time.perf_counter()
            stack.enter_context(_killed(subprocess.Popen(self._argv(), stderr=subprocess.PIPE)))
            connection, _ = listener.accept()
            took = time.perf_counter() - started
            connection.close()
            return took * 1000

    @contextlib.contextmanager
    def _vsock_device(self) -> Iterator[None]:
        sockets = [self._directory / "vhost", self._directory / "uds"]
        program = BUILD / "bin" / "vhost-device-vsock"
        argv = [str(program), "--guest-cid=3", f"--socket={sockets[0]}", f"--uds-path={sockets[1]}"]
        with _killed(subprocess.Popen(argv, stderr=subprocess.PIPE)):
            deadline = time.monotonic() + 5
            while not all(path.exists() for path in sockets):
                if time.monotonic() > deadline:
                    raise TimeoutError("vhost-device-vsock made no sockets")
                time.sleep(0.001)  # outside of what is measured
            yield
        for path in sockets:
            path.unlink(missing_ok=True)

    def _argv(self) -> list[str]:
        is_tcg = self._accelerator == "tcg"
        program = shutil.which("qemu-system-x86_64")
        assert program is not None
        # fmt: off
        return [
            program, "-no-user-config", "-nodefaults", "-no-reboot", "-display", "none",
            "-M", f"q35,accel={self._accelerator},memory-backend=mem",
            "-cpu", "qemu64" if is_tcg else "host", "-smp", "1", "-m", "512",
            "-object", "memory-backend-memfd,id=mem,size=512M,share=on",
            "-bios", "qboot.rom", "-kernel", str(BUILD / "guest" / "vmlinux"),
            "-initrd", str(self._initrd),
            "-append", f"{_CMDLINE} {_TCG_CMDLINE if is_tcg else ''} bare_port={_PORT}",
            "-serial", f"file:{self._directory}/console",
            "-chardev", f"socket,id=vsock,path={self._directory}/vhost",
            "-device", "vhost-user-vsock-pci,chardev=vsock",
        ]
        # fmt: on


@contextlib.contextmanager
def _killed(process: subprocess.Popen[bytes]) -> Iterator[None]:
    try:
        yield
    finally:
        process.kill()
        process.communicate()
