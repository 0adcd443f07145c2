"""Make small OCI images without a registry: busybox, and a pause image of one tiny program.

The output depends on nothing but the busybox binary: same binary, same bytes. Standard library
only, so that it also runs before any Python environment exists:

    python3 tests/harness/oci_image.py build/images

Source: OCI image-spec "image-layout", "config", "layer"; containerd reads the image's name from
the annotation `io.containerd.image.name` of the index.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import shutil
import struct
import subprocess
import sys
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

BUSYBOX_IMAGE = "docker.io/library/busybox:latest"
PAUSE_IMAGE = "docker.io/library/pause:latest"

_DIRECTORIES = (
    "bin",
    "dev",
    "etc",
    "home",
    "proc",
    "root",
    "run",
    "sbin",
    "sys",
    "tmp",
    "usr",
    "usr/bin",
    "usr/sbin",
    "var",
    "var/log",
)
_ETC = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n",
    "etc/group": "root:x:0:\ntty:x:5:\nnobody:x:65534:\n",
    "etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
}
PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

# sigaction(TERM), sigaction(INT): exit(0); sigaction(CHLD): ignore, so that the kernel reaps; then
# pause() for ever. With handlers, because Kata agents turn a TERM that has none into a KILL.
_PAUSE_CODE = bytes.fromhex(
    "488d3547000000bf0f000000e824000000bf02000000e81a000000"  # act: TERM, INT
    "488d354c000000bf11000000e809000000"  # ign: CHLD
    "b8220000000f05ebf7"  # loop: pause()
    "b80d00000031d241ba080000000f05c3"  # rt_sigaction(edi, rsi, 0, 8)
    "b83c00000031ff0f05"  # handler: exit(0)
    "bd004000000000000000000400000000bd004000000000000000000000000000"  # act {handler, RESTORER}
    "0100000000000000000000000000000000000000000000000000000000000000"  # ign {SIG_IGN}
)


class BusyboxMissing(Exception):
    """No static busybox on this machine."""


@dataclass(frozen=True)
class Entry:
    """One member of a root filesystem; `data` is a file's content, `link` a symlink's target."""

    path: str
    mode: int
    data: bytes | None = None
    link: str | None = None


def busybox_entries(binary: Path | None = None) -> list[Entry]:
    """Describe the busybox root filesystem: the binary, a symlink per applet, /etc, empty dirs.

    Without `binary` it is the machine's static one; raises BusyboxMissing. With it, the caller
    adds the libraries.
    """
    binary = binary or _static_busybox()
    data = binary.read_bytes()
    listing = subprocess.run([binary, "--list-full"], check=True, capture_output=True, text=True)
    entries = [Entry(path, 0o1777 if path == "tmp" else 0o755) for path in _DIRECTORIES]
    entries.append(Entry("bin/busybox", 0o755, data=data))
    entries += [Entry(path, 0o644, data=text.encode()) for path, text in _ETC.items()]
    for applet in sorted(set(listing.stdout.split()) | {"bin/sh"}):
        if applet != "bin/busybox" and not applet.endswith("linuxrc"):
            entries.append(Entry(applet, 0o777, link="/bin/busybox"))
    return entries


def _static_busybox() -> Path:
    binary = shutil.which("busybox")
    if binary is None:
        raise BusyboxMissing("no busybox in PATH: install the package busybox-static")
    if _has_interpreter(Path(binary).read_bytes()):
        raise BusyboxMissing(f"{binary} is not static: install the package busybox-static")
    return Path(binary)


def pause_entries() -> list[Entry]:
    """Describe the pause image: one static program that sleeps until TERM or INT."""
    return [
        Entry("dev", 0o755),
        Entry("proc", 0o755),
        Entry("sys", 0o755),
        Entry("pause", 0o755, data=_elf(_PAUSE_CODE)),
    ]


def write_rootfs(entries: list[Entry], target: Path) -> None:
    """Lay the entries out below the directory `target`, as `ctr run --rootfs` wants them."""
    target.mkdir(parents=True, exist_ok=True)
    for entry in entries:
        path = target / entry.path
        if entry.link is not None:
            path.symlink_to(entry.link)
        elif entry.data is not None:
            path.write_bytes(entry.data)
            path.chmod(entry.mode)
        else:
            path.mkdir(parents=True, exist_ok=True)
            path.chmod(entry.mode)


def write_image(
    entries: list[Entry],
    name: str,
    process: Mapping[str, object],
    out: Path,
    more_names: Sequence[str] = (),
) -> Path:
    """Write an image of one layer as an OCI archive; return its path.

    `process` is the `config` object of the image: Cmd, Entrypoint, Env, WorkingDir, User.
    """
    layer = _layer(entries)
    packed = gzip.compress(layer, compresslevel=6, mtime=0)
    config = _json(
        {
            "architecture": "amd64",
            "os": "linux",
            "created": "1970-01-01T00:00:00Z",
            "config": dict(process),
            "rootfs": {"type": "layers", "diff_ids": [_digest(layer)]},
            "history": [{"created": "1970-01-01T00:00:00Z", "created_by": "oci_image.py"}],
        }
    )
    manifest = _json(
        {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": _descriptor("application/vnd.oci.image.config.v1+json", config),
            "layers": [_descriptor("application/vnd.oci.image.layer.v1.tar+gzip", packed)],
        }
    )
    files = {
        "oci-layout": _json({"imageLayoutVersion": "1.0.0"}),
        "index.json": _json(
            {
                "schemaVersion": 2,
                "manifests": [_listed(manifest, each) for each in (name, *more_names)],
                "mediaType": "application/vnd.oci.image.index.v1+json",
            }
        ),
        **{f"blobs/sha256/{_digest(blob)[7:]}": blob for blob in (config, packed, manifest)},
    }
    archive = _layer(
        [
            Entry("blobs", 0o755),
            Entry("blobs/sha256", 0o755),
            *(Entry(path, 0o644, data=data) for path, data in sorted(files.items())),
        ]
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f"{out.name}.{os.getpid()}.partial")
    partial.write_bytes(archive)
    partial.replace(out)
    return out


def write_busybox_image(directory: Path) -> Path:
    """Write `busybox.tar` (image docker.io/library/busybox:latest) into `directory`."""
    process = {"Env": [PATH], "Cmd": ["sh"], "WorkingDir": "/"}
    return write_image(busybox_entries(), BUSYBOX_IMAGE, process, directory / "busybox.tar")


def write_pause_image(directory: Path) -> Path:
    """Write `pause.tar` (image docker.io/library/pause:latest) into `directory`."""
    process = {"Env": [PATH], "Entrypoint": ["/pause"], "WorkingDir": "/"}
    return write_image(pause_entries(), PAUSE_IMAGE, process, directory / "pause.tar")


def _layer(entries: list[Entry]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for entry in entries:
            member = tarfile.TarInfo(entry.path)
            member.mode = entry.mode
            if entry.link is not None:
                member.type, member.linkname = tarfile.SYMTYPE, entry.link
            elif entry.data is None:
                member.type = tarfile.DIRTYPE
            else:
                member.size = len(entry.data)
            archive.addfile(member, io.BytesIO(entry.data) if entry.data is not None else None)
    return buffer.getvalue()


def _listed(manifest: bytes, name: str) -> dict[str, object]:
    return {
        **_descriptor("application/vnd.oci.image.manifest.v1+json", manifest),
        "platform": {"architecture": "amd64", "os": "linux"},
        "annotations": {
            "io.containerd.image.name": name,
            "org.opencontainers.image.ref.name": name.rpartition(":")[2],
        },
    }


def _json(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _digest(blob: bytes) -> str:
    return "sha256:" + hashlib.sha256(blob).hexdigest()


def _descriptor(media_type: str, blob: bytes) -> dict[str, object]:
    return {"mediaType": media_type, "digest": _digest(blob), "size": len(blob)}


def _elf(code: bytes) -> bytes:
    """Wrap code that runs at 0x400078 in the smallest static x86-64 executable.

    Source: System V ABI, ELF-64 object file format, file header and program header.
    """
    base, headers = 0x400000, 64 + 56
    size = headers + len(code)
    ident = b"\x7fELF\x02\x01\x01" + bytes(9)
    header = ident + struct.pack(
        "<HHIQQQIHHHHHH", 2, 62, 1, base + headers, 64, 0, 0, 64, 56, 1, 0, 0, 0
    )
    program = struct.pack("<IIQQQQQQ", 1, 5, 0, base, base, size, size, 0x1000)
    return header + program + code


def _has_interpreter(binary: bytes) -> bool:
    (offset,) = struct.unpack_from("<Q", binary, 32)
    size, count = struct.unpack_from("<HH", binary, 54)
    kinds = (struct.unpack_from("<I", binary, offset + size * n)[0] for n in range(count))
    return any(kind == 3 for kind in kinds)  # PT_INTERP


def main() -> int:
    """Write both images into the directory named by the first argument."""
    if len(sys.argv) != 2:
        print(f"usage: {sys.argv[0]} DIRECTORY", file=sys.stderr)
        return 2
    directory = Path(sys.argv[1])
    try:
        print(write_busybox_image(directory), write_pause_image(directory), sep="\n")
    except BusyboxMissing as problem:
        print(f"oci_image: {problem}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
