"""The guest's kernel: the distribution's own, taken out of its package, never installed.

Owns the choice of package, its download, the ELF inside the bzImage, and the modules in the order
in which they must be loaded. Knows nothing of the agent or of the archive format.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import shutil
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

# The metapackages whose dependency is the kernel for virtual machines, first found wins:
# Debian's cloud kernel, then Ubuntu's.
METAPACKAGES: Final = ("linux-image-cloud-amd64", "linux-image-virtual")

# Loaded by the agent at boot, in this order. vsock comes first because the agent's readiness
# travels over it; everything that a pod nearly always uses follows.
BOOT_MODULES: Final = (
    "virtio_pci",
    "virtio_mmio",
    "vmw_vsock_virtio_transport",
    "virtiofs",
    "virtio_rng",
    "pvpanic-pci",
    "pvpanic-mmio",
    "overlay",
    "virtio_blk",
    "virtio_net",
)

# How the kernel build may have packed the ELF, by the magic of the format.
# Source: Linux lib/decompress.c, scripts/extract-vmlinux
LZ4_LEGACY: Final = b"\x02\x21\x4c\x18"
ZSTD: Final = b"\x28\xb5\x2f\xfd"
ELF_MAGIC: Final = b"\x7fELF"
# What follows the signature behind a module. Source: linux/module_signature.h, MODULE_SIG_STRING.
SIGNED: Final = b"~Module signature appended~\n"
_SIGNATURE_INFO_BYTES: Final = 12
PVH_NOTE_TYPE: Final = 18  # Source: Xen public/elfnote.h XEN_ELFNOTE_PHYS32_ENTRY


class KernelError(Exception):
    """The kernel can't be had or isn't what the virtual machine needs; the text says the fix."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelPackage:
    """The unpacked package: `root` holds boot/ and lib/modules/."""

    package: str
    version: str
    release: str
    root: Path

    @property
    def bzimage(self) -> Path:
        return self.root / "boot" / f"vmlinuz-{self.release}"


def fetch(cache: Path, work: Path, metapackages: tuple[str, ...] = METAPACKAGES) -> KernelPackage:
    """Download (into `cache`, once for each version) and unpack the kernel package below `work`."""
    names, version = _resolve(metapackages)
    root = work / "kernel"
    shutil.rmtree(root, ignore_errors=True)
    for name in names:
        _run("dpkg-deb", "-x", str(_download(name, version, cache)), str(root))
    modules = root / "lib" / "modules"
    if not modules.is_dir():
        modules = root / "usr" / "lib" / "modules"
    releases = sorted(path.name for path in modules.iterdir())
    if len(releases) != 1:
        raise KernelError(f"package {names[0]} holds {len(releases)} kernel releases, not one")
    if modules.parent.parent != root:
        (root / "lib").mkdir(exist_ok=True)
        (root / "lib" / "modules").symlink_to(modules)
    return KernelPackage(package=names[0], version=version, release=releases[0], root=root)


def _resolve(metapackages: tuple[str, ...]) -> tuple[tuple[str, ...], str]:
    """Name the packages (image, and modules where they are apart) and their version."""
    for meta in metapackages:
        image = _dependency(meta, "linux-image-")
        if image is None:
            continue
        names = [image]
        modules = _dependency(image, "linux-modules-")
        if modules is not None:
            names.append(modules)
        return tuple(names), _candidate(image)
    raise KernelError(
        f"no package {' or '.join(metapackages)} is known to apt; run apt-get update, and check"
        " that the distribution's main archive is among its sources"
    )


def _dependency(package: str, prefix: str) -> str | None:
    listing = _output("apt-cache", "depends", "--important", package, check=False)
    for line in listing.splitlines():
        kind, _, name = line.strip().partition(": ")
        if kind == "Depends" and name.startswith(prefix):
            return name
    return None


def _candidate(package: str) -> str:
    for line in _output("apt-cache", "policy", package).splitlines():
        key, _, value = line.strip().partition(": ")
        if key == "Candidate" and value != "(none)":
            return value
    raise KernelError(f"apt has no candidate for {package}; run apt-get update")


def _download(package: str, version: str, cache: Path) -> Path:
    directory = cache / f"{package}-{version.replace(':', '_')}"
    directory.mkdir(parents=True, exist_ok=True)
    target = directory / "package.deb"
    if target.exists():
        return target
    print(f"  downloading {package} {version} (about 27 MB)", flush=True)
    scratch = directory / f"part-{os.getpid()}"
    scratch.mkdir()
    try:
        _run("apt-get", "--quiet=2", "download", f"{package}={version}", cwd=scratch)
        (found,) = scratch.glob("*.deb")
        found.replace(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def extract_elf(bzimage: bytes) -> bytes:
    """Return the ELF kernel that a bzImage carries compressed.

    Raises KernelError when no known packing yields an ELF with a PVH entry, without which QEMU
    could not start it directly.
    """
    for magic, unpack in _UNPACKERS.items():
        start = bzimage.find(magic)
        while start >= 0:
            elf = unpack(bzimage[start:])
            if elf.startswith(ELF_MAGIC):
                if not has_pvh_entry(elf):
                    raise KernelError("the kernel has no PVH entry (CONFIG_PVH is off)")
                return elf
            start = bzimage.find(magic, start + 1)
    raise KernelError("no ELF kernel found in the bzImage: unknown compression")


def has_pvh_entry(elf: bytes) -> bool:
    """Tell whether a 64-bit ELF carries the note that QEMU's PVH loader starts from."""
    (phoff,) = struct.unpack_from("<Q", elf, 32)
    phentsize, phnum = struct.unpack_from("<HH", elf, 54)
    for index in range(phnum):
        header = struct.unpack_from("<IIQQQQQQ", elf, phoff + index * phentsize)
        kind, offset, size = header[0], header[2], header[5]
        if kind == 4 and _notes_name_pvh(elf[offset : offset + size]):  # PT_NOTE
            return True
    return False


def _notes_name_pvh(notes: bytes) -> bool:
    position = 0
    while position + 12 <= len(notes):
        name_size, data_size, kind = struct.unpack_from("<III", notes, position)
        name = notes[position + 12 : position + 12 + name_size].rstrip(b"\0")
        if kind == PVH_NOTE_TYPE and name == b"Xen":
            return True
        position += 12 + (name_size + 3) // 4 * 4 + (data_size + 3) // 4 * 4
    return False


def module_order(kernel: KernelPackage, wanted: tuple[str, ...] = BOOT_MODULES) -> list[Path]:
    """Return the .ko files of `wanted` and what they need, each after its dependencies."""
    _run("depmod", "-b", str(kernel.root), kernel.release)
    ordered: dict[Path, None] = {}
    for module in wanted:
        command = ("modprobe", "-d", str(kernel.root), "-S", kernel.release, "--show-depends")
        for line in _output(*command, module).splitlines():
            kind, _, rest = line.partition(" ")
            if kind == "insmod":
                ordered[Path(rest.split()[0])] = None
            elif kind != "builtin":
                raise KernelError(f"modprobe --show-depends {module} said: {line}")
    return list(ordered)


def module_index(kernel: KernelPackage, names: list[str]) -> dict[str, str]:
    """Return modules.dep, for `names` lying in one directory, and modules.builtin, by file name.

    Source: depmod(8), modules.dep(5): `module: nearest-dependency farther-dependency …`.
    """
    directory = kernel.root / "lib" / "modules" / kernel.release
    lines = []
    for line in (directory / "modules.dep").read_text().splitlines():
        module, _, dependencies = line.partition(":")
        if _plain_name(module) in names:
            needed = " ".join(map(_plain_name, dependencies.split()))
            lines.append(f"{_plain_name(module)}: {needed}".rstrip() + "\n")
    builtin = (directory / "modules.builtin").read_text()
    return {"modules.dep": "".join(sorted(lines)), "modules.builtin": builtin}


def _plain_name(path: str) -> str:
    name = path.rpartition("/")[2]
    return name if name.endswith(".ko") else name.rpartition(".")[0]


def module_bytes(path: Path) -> tuple[str, bytes]:
    """Return a module's name with .ko and its content, unpacked, without its signature."""
    data = path.read_bytes()
    match path.suffix:
        case ".ko":
            return path.name, without_signature(data)
        case ".xz":
            return path.stem, without_signature(lzma.decompress(data))
        case ".gz":
            return path.stem, without_signature(gzip.decompress(data))
        case ".zst":
            return path.stem, without_signature(_filter(("zstd", "-dc"), data))
    raise KernelError(f"module {path.name} is packed in an unknown way")


def without_signature(module: bytes) -> bytes:
    """Return a module without the signature of its distribution, which no guest insists on.

    Checking it is nearly half of the time that an emulated guest takes to load a module.
    Source: linux/module_signature.h: signature, 12 bytes that end with its length, the magic.
    """
    if not module.endswith(SIGNED):
        return module
    end = len(module) - len(SIGNED)
    (length,) = struct.unpack_from(">I", module, end - 4)
    start = end - _SIGNATURE_INFO_BYTES - length
    if start < 0:
        raise KernelError(f"a module's signature is longer than the module ({length} bytes)")
    return module[:start]


def strip(elf: bytes, work: Path) -> bytes:
    """Drop symbols and debug sections that a running kernel does not use."""
    path = work / "vmlinux.unstripped"
    path.write_bytes(elf)
    _run("strip", "--strip-all", "--remove-section=.comment", str(path))
    return path.read_bytes()


def _filter(command: tuple[str, ...], data: bytes, *, strict: bool = True) -> bytes:
    """Pipe `data` through a program; bytes after the packed stream are not an error if lenient."""
    try:
        done = subprocess.run(command, input=data, capture_output=True, check=False)
    except FileNotFoundError as exc:
        raise KernelError(f"{command[0]} is not installed; apt-get install {command[0]}") from exc
    if strict and done.returncode:
        raise KernelError(f"{command[0]} failed: {done.stderr.decode(errors='replace')[-300:]}")
    return done.stdout


def _lenient(unpack: Callable[[bytes], bytes], data: bytes) -> bytes:
    # A magic may occur by chance in the boot code, and bytes follow the real stream.
    try:
        return unpack(data)
    except (OSError, EOFError, ValueError, lzma.LZMAError):
        return b""


_UNPACKERS: Final[dict[bytes, Callable[[bytes], bytes]]] = {
    LZ4_LEGACY: lambda data: _filter(("lz4", "-dc"), data, strict=False),
    ZSTD: lambda data: _filter(("zstd", "-dc"), data, strict=False),
    b"\xfd7zXZ\x00": lambda data: _lenient(lzma.LZMADecompressor().decompress, data),
    b"BZh": lambda data: _lenient(bz2.BZ2Decompressor().decompress, data),
}


def _environment() -> dict[str, str]:
    # depmod and modprobe live in sbin, which an ordinary user's PATH lacks; C gives stable texts.
    return os.environ | {"LC_ALL": "C", "PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin"}


def _run(*command: str, cwd: Path | None = None) -> None:
    _call(command, cwd=cwd)


def _output(*command: str, check: bool = True) -> str:
    return _call(command, check=check)


def _call(command: tuple[str, ...], *, cwd: Path | None = None, check: bool = True) -> str:
    try:
        done = subprocess.run(
            command, cwd=cwd, env=_environment(), capture_output=True, text=True, check=False
        )
    except FileNotFoundError as exc:
        raise KernelError(f"{command[0]} is not installed; run make setup") from exc
    if check and done.returncode:
        raise KernelError(f"{' '.join(command)} failed: {done.stderr.strip()[-500:]}")
    return done.stdout
