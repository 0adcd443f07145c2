"""Put the shim, its configuration and the guest where they run from.

    install.py tree                     build/bin, build/etc: runs from the checkout, for tests
    install.py install --destdir D      /usr, /etc below D, all that a machine needs

Both fill the same templates, launcher and configuration, with other paths. Templates name what
they need as @NAME@ (see `Layout.values`). Runs in build/venv, so that the dependencies installed
are the pinned ones.
"""

from __future__ import annotations

import argparse
import compileall
import errno
import importlib.metadata
import os
import py_compile
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

import versions
from pins import pins

REPOSITORY: Final = Path(__file__).resolve().parents[1]
BUILD: Final = REPOSITORY / "build"
PACKAGES: Final = ("ttrpc", "agent_proto", "hypervisors", "netns", "shimv2")
SHIM: Final = "containerd-shim-kata-v2"
# Where backends of other distributions are put (docs/writing-a-backend.md); ours is replaced whole.
OTHERS: Final = Path("/opt/kata-shimv2")
VIRTIOFSD_PLACES: Final = ("/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd")
# What a runtime's name may add (io.containerd.kata-clh.v2, as Kata's links are called), each with a
# configuration of its own; the first is what the plain name means.
VARIANTS: Final = ("qemu", "microvm", "acrn", "clh", "fc")
PLACEHOLDER: Final = re.compile(r"@([A-Z_]+)@")


class InstallError(Exception):
    """Something to be installed is missing or in the way; the text says the fix."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Absolute paths as the running shim sees them; what is written goes below a DESTDIR."""

    bin: Path
    library: tuple[Path, ...]  # put on sys.path by the launcher, in this order
    configuration: Path
    guest: Path
    vsock_device: Path

    def values(self) -> dict[str, str]:
        """Return what the templates' placeholders stand for."""
        return {
            "PYTHON": os.path.realpath(sys.executable),
            "LIBRARY_DIRS": ", ".join(repr(str(path)) for path in self.library),
            "CONFIGURATION": str(self.configuration),
            "ACRN": _program("acrn-dm", "/usr/bin/acrn-dm"),
            "CLOUD_HYPERVISOR": _program("cloud-hypervisor", "/usr/bin/cloud-hypervisor"),
            "FIRECRACKER": _program("firecracker", "/usr/bin/firecracker"),
            "QEMU": _program("qemu-system-x86_64", "/usr/bin/qemu-system-x86_64"),
            "VIRTIOFSD": next(filter(os.path.exists, VIRTIOFSD_PLACES), VIRTIOFSD_PLACES[-1]),
            "VSOCK_DEVICE": str(self.vsock_device),
            "KERNEL": str(self.guest / "vmlinux"),
            "BZIMAGE": str(self.guest / "bzImage"),
            "INITRD": str(self.guest / "initrd.img"),
            "MODULES": str(self.guest / "modules"),
        }


TREE: Final = Layout(
    bin=BUILD / "bin",
    library=(REPOSITORY, Path(sysconfig.get_path("purelib")), OTHERS),
    configuration=BUILD / "etc" / "configuration.toml",
    guest=BUILD / "guest",
    vsock_device=BUILD / "bin" / "vhost-device-vsock",
)
SYSTEM: Final = Layout(
    bin=Path("/usr/bin"),
    library=(Path("/usr/lib/kata-shimv2"), OTHERS),
    configuration=Path("/etc/kata-containers/configuration.toml"),
    guest=Path("/usr/share/kata-containers"),
    vsock_device=Path("/usr/libexec/kata-shimv2/vhost-device-vsock"),
)


def tree() -> None:
    """Make build/bin and build/etc, whose shim runs the checkout's code."""
    TREE.bin.mkdir(parents=True, exist_ok=True)
    _write(TREE.bin / SHIM, _filled(f"{SHIM}.in", TREE), 0o755)
    for name in _link_names():
        _link(TREE.bin / name)
    for path, text in _configurations(TREE).items():
        _write(path, text, 0o644)
    for package in PACKAGES:
        _compile(REPOSITORY / package, py_compile.PycInvalidationMode.TIMESTAMP)
    print(f"shim: {TREE.bin / SHIM}, configuration: {TREE.configuration}")


def install(destination: Path) -> None:
    """Install for the whole machine below `destination` (/ for this machine)."""

    def below(path: Path) -> Path:
        return destination / path.relative_to("/")

    _install_library(below(SYSTEM.library[0]))
    _write(below(SYSTEM.bin / SHIM), _filled(f"{SHIM}.in", SYSTEM), 0o755)
    for name in _link_names():
        _link(below(SYSTEM.bin / name))
    for path, text in _configurations(SYSTEM).items():
        _install_configuration(below(path), text)
    for name in ("vmlinux", "bzImage", "initrd.img", "manifest.json"):
        _copy(BUILD / "guest" / name, below(SYSTEM.guest / name), 0o644)
    _copy_modules(BUILD / "guest" / "modules", below(SYSTEM.guest / "modules"))
    _copy(BUILD / "bin" / "vhost-device-vsock", below(SYSTEM.vsock_device), 0o755)
    documents = below(Path("/usr/share/doc/kata-shimv2"))
    for source in ("packaging/containerd-kata.toml", "README.md", "LICENSE", "CHANGELOG.md"):
        _copy(REPOSITORY / source, documents / Path(source).name, 0o644)
    print(f"next: merge {SYSTEM_SNIPPET} into /etc/containerd/config.toml, restart containerd")


SYSTEM_SNIPPET: Final = "/usr/share/doc/kata-shimv2/containerd-kata.toml"


def _copy_modules(source: Path, target: Path) -> None:
    """Replace the modules as a whole; a running sandbox keeps what it has bound.

    The earlier ones lie beside them, under another name, for as long as one has.
    """
    if not source.is_dir():
        raise InstallError(f"{source} is missing; run make guest")
    scratch = target.with_name(f".{target.name}.new")
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(source, scratch)
    if target.exists():
        # The inode is what tells it from others, and is what a sandbox holds.
        target.rename(target.with_name(f".{target.name}.replaced-{target.stat().st_ino}"))
    scratch.rename(target)
    for replaced in target.parent.glob(f".{target.name}.replaced-*"):
        if not _may_be_mounted(replaced.name):
            shutil.rmtree(replaced)


def _may_be_mounted(name: str) -> bool:
    """Tell whether a directory of this unique name is bound in any mount namespace.

    One that can't be looked into may have it bound.
    """
    for process in Path("/proc").glob("[0-9]*"):
        try:
            mounts = (process / "mountinfo").read_text(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended
        except OSError as error:
            if error.errno == errno.EINVAL:
                continue  # a zombie has no mounts
            return True
        # The fourth field is what is mounted, by its present name.
        roots = (line.split(" ")[3] for line in mounts.splitlines())
        if any(root.endswith(f"/{name}") for root in roots):
            return True
    return False


def _install_library(library: Path) -> None:
    """Replace the installed library as a whole, in one step; shims that run keep their own."""
    scratch = library.with_name(library.name + ".new")
    shutil.rmtree(scratch, ignore_errors=True)
    ignored = shutil.ignore_patterns("__pycache__", "*.proto")
    for package in PACKAGES:
        shutil.copytree(REPOSITORY / package, scratch / package, ignore=ignored)
    version = scratch / "shimv2" / "version.py"
    version.write_text(version.read_text().replace('"unknown"', f'"{_commit()}"'))
    for distribution in _closure(pins([])):
        _copy_distribution(distribution, scratch)
    # Never compared with the sources again: a packager may change their times.
    _compile(scratch, py_compile.PycInvalidationMode.UNCHECKED_HASH)
    versions.put(scratch, library)
    print(f"installed {library}")


def _commit() -> str:
    """Return what is being installed: the commit, marked when files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def _closure(requirements: list[str]) -> list[importlib.metadata.Distribution]:
    """Return the installed distributions that `requirements` name, and what those need."""
    found: dict[str, importlib.metadata.Distribution] = {}
    pending = list(requirements)
    while pending:
        requirement = pending.pop()
        if "extra ==" in requirement:
            continue
        name = re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0].lower().replace("_", "-")
        if name in found:
            continue
        try:
            found[name] = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            if ";" in requirement:
                continue  # wanted on another platform or Python only
            raise InstallError(f"{name} is not in build/venv; run make setup") from None
        pending += found[name].requires or []
    return [found[name] for name in sorted(found)]


def _copy_distribution(distribution: importlib.metadata.Distribution, target: Path) -> None:
    for file in distribution.files or []:
        if ".." in file.parts or "__pycache__" in file.parts:
            continue  # console scripts and another interpreter's bytecode
        destination = target.joinpath(*file.parts)
        destination.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(str(file.locate()), destination)


def _compile(directory: Path, mode: py_compile.PycInvalidationMode) -> None:
    if not directory.is_dir():
        raise InstallError(f"{directory} is missing")
    if not compileall.compile_dir(directory, quiet=1, invalidation_mode=mode):
        raise InstallError(f"{directory} holds a file that does not compile")


def _install_configuration(target: Path, text: str) -> None:
    """Leave a configuration that somebody has edited, and put the new one beside it."""
    pristine = target.with_name(f".{target.name}.installed")
    edited = target.exists() and (
        not pristine.exists() or pristine.read_text() != target.read_text()
    )
    if edited and target.read_text() != text:
        _write(target.with_name(f"{target.name}.new"), text, 0o644)
        print(f"{target} was edited and stays; the new one is {target.name}.new beside it")
        return
    _write(target, text, 0o644)
    _write(pristine, text, 0o644)


def _link_names() -> list[str]:
    return [SHIM.replace("kata", f"kata-{variant}") for variant in VARIANTS]


def _configurations(layout: Layout) -> dict[Path, str]:
    """Return the files by path: the plain one, and one for each variant."""
    main = layout.configuration
    found: dict[Path, str] = {}
    for variant in VARIANTS:
        hypervisor = _filled(f"hypervisor-{variant}.toml.in", layout)
        text = _filled("configuration.toml.in", layout, {"HYPERVISOR": hypervisor})
        found.setdefault(main, text)
        found[main.with_stem(f"{main.stem}-{variant}")] = text
    return found


def _filled(template: str, layout: Layout, more: Mapping[str, str] = MappingProxyType({})) -> str:
    path = REPOSITORY / "packaging" / template
    values = {**layout.values(), **more}

    def value(match: re.Match[str]) -> str:
        if match[1] not in values:
            raise InstallError(f"{path} names @{match[1]}@, which nothing stands for")
        return values[match[1]]

    return PLACEHOLDER.sub(value, path.read_text())


def _program(name: str, otherwise: str) -> str:
    return shutil.which(name) or otherwise


def _copy(source: Path, target: Path, mode: int) -> None:
    if not source.exists():
        raise InstallError(f"{source} is missing; run make setup guest")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    shutil.copyfile(source, partial)
    partial.chmod(mode)
    partial.replace(target)
    print(f"installed {target}")


def _link(target: Path) -> None:
    """Make `target` another name of the shim beside it."""
    partial = target.with_name(f".{target.name}.partial")
    partial.unlink(missing_ok=True)
    partial.symlink_to(SHIM)
    partial.replace(target)


def _write(target: Path, text: str, mode: int) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    partial.write_text(text)
    partial.chmod(mode)
    partial.replace(target)


def main() -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="install.py", description=__doc__)
    parser.add_argument("action", choices=("tree", "install"))
    parser.add_argument("--destdir", type=Path, default=Path("/"), help="root of what is installed")
    options = parser.parse_args()
    try:
        if options.action == "tree":
            tree()
        else:
            install(options.destdir.absolute())
    except (InstallError, OSError) as error:
        print(f"install: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
