"""Taking the kernel out of its package: the ELF in the bzImage, its PVH note, packed modules."""

from __future__ import annotations

import gzip
import lzma
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from guest.image import kernel


def elf_with_note(name: bytes, kind: int) -> bytes:
    """Build the smallest ELF whose only program header is a note."""
    padded = name + bytes(-len(name) % 4)
    note = struct.pack("<III", len(name), 8, kind) + padded + bytes(8)
    header = bytearray(64)
    header[:4] = b"\x7fELF"
    struct.pack_into("<Q", header, 32, 64)
    struct.pack_into("<HH", header, 54, 56, 1)
    program = struct.pack("<IIQQQQQQ", 4, 4, 120, 0, 0, len(note), len(note), 4)
    return bytes(header) + program + note


PVH_ELF = elf_with_note(b"Xen\0", 18)


def packed(program: str, *options: str) -> bytes:
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")
    return subprocess.run(
        [program, *options], input=PVH_ELF, capture_output=True, check=True
    ).stdout


@pytest.mark.parametrize("packing", ["lz4", "zstd", "xz"])
def test_elf_is_found_behind_boot_code_and_before_trailing_bytes(packing: str) -> None:
    stream = {
        "lz4": lambda: packed("lz4", "-l", "-c"),
        "zstd": lambda: packed("zstd", "-c"),
        "xz": lambda: lzma.compress(PVH_ELF),
    }[packing]()
    assert kernel.extract_elf(b"MZ boot code" + stream + b"\1\2\3\4") == PVH_ELF


def test_magic_by_chance_before_the_real_stream_is_passed_over() -> None:
    boot_code = b"\xfd7zXZ\x00 not a stream "
    assert kernel.extract_elf(boot_code + lzma.compress(PVH_ELF)) == PVH_ELF


def test_bzimage_without_an_elf_is_refused() -> None:
    with pytest.raises(kernel.KernelError, match="unknown compression"):
        kernel.extract_elf(bytes(1000))


@pytest.mark.parametrize("elf", [elf_with_note(b"Xen\0", 17), elf_with_note(b"Linux\0", 18)])
def test_kernel_without_pvh_entry_is_refused(elf: bytes) -> None:
    with pytest.raises(kernel.KernelError, match="PVH"):
        kernel.extract_elf(lzma.compress(elf))


def test_packed_modules_are_unpacked(tmp_path: Path) -> None:
    (tmp_path / "a.ko").write_bytes(b"plain")
    (tmp_path / "b.ko.xz").write_bytes(lzma.compress(b"by xz"))
    (tmp_path / "c.ko.gz").write_bytes(gzip.compress(b"by gzip"))
    found = [kernel.module_bytes(path) for path in sorted(tmp_path.iterdir())]
    assert found == [("a.ko", b"plain"), ("b.ko", b"by xz"), ("c.ko", b"by gzip")]


def test_modules_lose_their_signature(tmp_path: Path) -> None:
    path = tmp_path / "a.ko"
    info = struct.pack(">8xI", 5)
    path.write_bytes(b"\x7fELF code" + b"signd" + info + kernel.SIGNED)
    assert kernel.module_bytes(path) == ("a.ko", b"\x7fELF code")
    path.write_bytes(struct.pack(">8xI", 5) + kernel.SIGNED)
    with pytest.raises(kernel.KernelError, match="longer than the module"):
        kernel.module_bytes(path)


def test_module_packed_in_an_unknown_way_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.ko.br"
    path.write_bytes(b"")
    with pytest.raises(kernel.KernelError, match=r"a\.ko\.br"):
        kernel.module_bytes(path)
