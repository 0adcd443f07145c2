"""The OCI runtime inside the guest: the distribution's crun and the libraries it loads.

Owns which files are needed for it to start. libsystemd and the five libraries behind it (3.4 MB
of every pod's memory) are replaced by a stub of the same name: crun calls them only to talk to a
systemd that the guest does not have. Knows nothing of the archive format.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Final

STUBBED: Final = "libsystemd.so.0"
# What every function of the stub returns: -ENOSYS, which crun reports like any failed call.
STUB_RESULT: Final = -38


class RuntimeMissing(Exception):
    """crun or a tool that takes it apart is missing; the text says the fix."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """`files` maps the path in the guest to the file on the host."""

    version: str
    files: dict[str, Path]


def collect(work: Path) -> Runtime:
    """Find crun with everything it loads; what is built goes below `work`."""
    found = shutil.which("crun")
    if found is None:
        raise RuntimeMissing("crun is not installed; apt-get install crun")
    program = Path(found)
    libraries = _resolved_libraries(program)
    files = {"/usr/bin/crun": program}
    pending = [program]
    while pending:
        for name in _needed(pending.pop()):
            path = libraries.get(name)
            if path is None:
                raise RuntimeMissing(f"crun needs {name}, which the dynamic linker does not find")
            guest_path = _guest_path(name, path)
            if guest_path in files:
                continue
            if name == STUBBED:
                files[guest_path] = _stub(program, work)
            else:
                files[guest_path] = path
                pending.append(path)
    version = _output(str(program), "--version").splitlines()[0].rpartition(" ")[2]
    return Runtime(version=version, files=files)


def _guest_path(name: str, path: Path) -> str:
    # The program names its interpreter by absolute path; the rest is searched for in the
    # multiarch directory, which is compiled into the interpreter.
    return str(path) if name.startswith("ld-linux") else f"/lib/x86_64-linux-gnu/{name}"


def _resolved_libraries(program: Path) -> dict[str, Path]:
    libraries = {}
    for line in _output("ldd", str(program)).splitlines():
        match line.split():
            case [name, "=>", path, _]:
                libraries[name] = Path(path)
            case [path, _] if path.startswith("/"):
                libraries[Path(path).name] = Path(path)
    return libraries


def _needed(binary: Path) -> list[str]:
    dynamic = _output("readelf", "--dynamic", "--wide", str(binary))
    return re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic)


def _stub(program: Path, work: Path) -> Path:
    """Compile a library that has each function of libsystemd that `program` refers to."""
    versions: dict[str, list[str]] = defaultdict(list)
    symbols = _output("objdump", "--dynamic-syms", str(program))
    for version, name in re.findall(r"\((LIBSYSTEMD_\d+)\)\s+(\w+)", symbols):
        versions[version].append(name)
    source, script, library = (work / f"stub.{suffix}" for suffix in ("c", "map", "so"))
    names = sorted(name for group in versions.values() for name in group)
    source.write_text("".join(f"int {name}(void) {{ return {STUB_RESULT}; }}\n" for name in names))
    nodes = (
        f"{version} {{ global: {'; '.join(sorted(group))}; }};\n"
        for version, group in sorted(versions.items())
    )
    script.write_text("".join(nodes))
    options = ("-Os", "-shared", "-fPIC", "-nostdlib", "-s")
    linking = (
        f"-Wl,-soname,{STUBBED},--version-script,{script},--build-id=none,-z,noseparate-code",
    )
    _output("cc", *options, *linking, "-o", str(library), str(source))
    return library


def _output(*command: str) -> str:
    environment = os.environ | {"LC_ALL": "C"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    except FileNotFoundError as exc:
        raise RuntimeMissing(f"{command[0]} is not installed; run make setup") from exc
    if done.returncode:
        raise RuntimeMissing(f"{' '.join(command)} failed: {done.stderr.strip()[-500:]}")
    return done.stdout
