"""Command line of the image builder: `python3 -m guest.image.build --output build/guest …`.

Owns the layout of the initrd and the manifest. Equal inputs give equal bytes: no time, no host
name and no order of a directory listing gets into the output.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from guest.image import cpio, kernel, on_demand

MODULE_DIRECTORY: Final = "/lib/modules"
# Loaded in this order by the agent. One absolute path a line.
MODULE_LIST: Final = "/etc/modules"
MOUNT_POINTS: Final = ("/dev", "/proc", "/sys", "/run", "/mnt", "/root", "/var", "/etc")
USER_DATABASE: Final = {
    "/etc/passwd": "root:x:0:0:root:/root:/sbin/nologin\n",
    "/etc/group": "root:x:0:\n",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """Everything the initrd is made of."""

    init: bytes
    kernel: kernel.KernelPackage


def initrd_tree(inputs: Inputs) -> tuple[cpio.Tree, list[str]]:
    """Lay out the initrd; return it with the names of the modules in load order."""
    tree = cpio.Tree()
    for path in MOUNT_POINTS:
        tree.directory(path)
    tree.directory("/tmp", 0o1777)
    # The kernel opens it for init's stdio before anything is mounted on /dev.
    tree.character_device("/dev/console", 5, 1)
    # What the agent's runtime puts there if the kernel has no console; it aborts without.
    tree.character_device("/dev/null", 1, 3, 0o666)
    tree.file("/init", inputs.init, 0o755)
    for path, text in USER_DATABASE.items():
        tree.file(path, text.encode())
    directory = f"{MODULE_DIRECTORY}/{inputs.kernel.release}"
    modules: list[str] = []
    for source in kernel.module_order(inputs.kernel):
        name, data = kernel.module_bytes(source)
        tree.file(f"{directory}/{name}", data)
        modules.append(name)
    for name, text in kernel.module_index(inputs.kernel, modules).items():
        tree.file(f"{directory}/{name}", text.encode())
    listing = "".join(f"{directory}/{name}\n" for name in modules)
    tree.file(MODULE_LIST, listing.encode())
    return tree, modules


def build(agent: Path, output: Path, cache: Path) -> dict[str, Any]:
    """Write the guest into `output`; return its manifest.

    That is vmlinux, the bzImage it was in, initrd.img, manifest.json and modules/. They are
    replaced one by one, the modules first, so that a reader never sees half of one. The modules of
    other releases stay, because sandboxes that run these kernels have `modules/` bound.
    Raises KernelError or OSError; nothing in `output` is changed if an input was the reason.
    """
    init = agent.read_bytes()  # first, because it is the input most likely to be missing
    with tempfile.TemporaryDirectory(prefix="guest-image-") as scratch:
        work = Path(scratch)
        print("guest: kernel from the distribution's package", flush=True)
        package = kernel.fetch(cache, work)
        bzimage = package.bzimage.read_bytes()
        elf = kernel.strip(kernel.extract_elf(bzimage), work)
        print(f"guest: kernel {package.release}, {len(elf) >> 20} MiB", flush=True)
        inputs = Inputs(init=init, kernel=package)
        tree, modules = initrd_tree(inputs)
        initrd = cpio.archive(tree)
        offered = on_demand.files(package)
    print(f"guest: initrd with {len(modules)} modules, {len(initrd) / 1e6:.1f} MB", flush=True)
    manifest = _manifest(inputs, elf, initrd)
    manifest["agent"]["version"] = _agent_version(agent)
    manifest["initrd"] |= {"files": len(tree.entries), "modules": modules}
    manifest["modules"] = {
        "files": len(offered),
        **_digest(b"".join(name.encode() + b"\0" + data for name, data in sorted(offered.items()))),
    }
    output.mkdir(parents=True, exist_ok=True)
    text = json.dumps(manifest, indent=2, sort_keys=True) + "\n"
    contents = {
        "vmlinux": elf,
        "bzImage": bzimage,
        "initrd.img": initrd,
        "manifest.json": text.encode(),
    }
    _replace_directory(output / "modules" / package.release, offered)
    for name, data in contents.items():
        _replace(output / name, data)
    return manifest


def _manifest(inputs: Inputs, elf: bytes, initrd: bytes) -> dict[str, Any]:
    return {
        "agent": _digest(inputs.init),
        "initrd": _digest(initrd),
        "kernel": {
            "package": inputs.kernel.package,
            "release": inputs.kernel.release,
            "version": inputs.kernel.version,
            **_digest(elf),
        },
    }


def _agent_version(agent: Path) -> str:
    done = subprocess.run(
        [agent.resolve(), "--version"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def _digest(data: bytes) -> dict[str, Any]:
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _replace(target: Path, data: bytes) -> None:
    if target.exists() and target.read_bytes() == data:
        return  # an unchanged file keeps its time, so nothing that depends on it is made again
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    partial.write_bytes(data)
    partial.replace(target)


def _replace_directory(target: Path, contents: dict[str, bytes]) -> None:
    """Put a complete directory at `target`; it is missing only from one rename to the next."""
    if target.is_dir() and {path.name: path.read_bytes() for path in target.iterdir()} == contents:
        return
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    partial.mkdir(parents=True)
    for name, data in contents.items():
        (partial / name).write_bytes(data)
    aside = target.with_name(f"{partial.name}.old")
    if target.exists():
        target.rename(aside)
    partial.rename(target)
    if aside.exists():
        shutil.rmtree(aside)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="guest.image.build", description=__doc__)
    parser.add_argument(
        "--agent", type=Path, required=True, help="static binary that becomes /init"
    )
    parser.add_argument("--output", type=Path, required=True, help="directory for the three files")
    parser.add_argument("--cache", type=Path, required=True, help="directory for downloads")
    options = parser.parse_args(arguments)
    try:
        build(options.agent, options.output, options.cache)
    except (kernel.KernelError, cpio.ArchiveError, OSError) as error:
        print(f"guest: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
