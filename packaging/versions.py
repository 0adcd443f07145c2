"""Puts one version of the shim's library in the place of another, in one step.

    /usr/lib/kata-shimv2 ──> kata-shimv2-4f1d0c9a77e2/     what a shim that starts now runs from

The name is a link; the launcher follows it once (`containerd-shim-kata-v2.in`), so a shim imports
from the version that it began with for as long as it lives. The version before this one stays for
those that are just starting; older ones go when no process has anything of them in its memory.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
from pathlib import Path
from typing import Final

# Source: linux/fs.h RENAME_EXCHANGE, linux/fcntl.h AT_FDCWD
_RENAME_EXCHANGE: Final = 2
_AT_FDCWD: Final = -100
# A digest, or what an installation without versions became.
_SUFFIX: Final = r"-([0-9a-f]{12}|earlier)(\.\d+)?"


def put(scratch: Path, library: Path) -> None:
    """Make `library` the name of what is in `scratch`, which is moved beside it.

    At no time does the name lead nowhere. If it is a directory, as earlier versions installed it,
    that becomes the version before this one.
    """
    version = _free_name(library, _digest(scratch))
    scratch.rename(version)
    link = library.with_name(f".{library.name}.link")
    link.unlink(missing_ok=True)
    link.symlink_to(version.name)
    before = Path(os.readlink(library)).name if library.is_symlink() else ""
    if library.is_dir() and not library.is_symlink():
        _exchange(link, library)
        earlier = _free_name(library, "earlier")
        link.rename(earlier)
        before = earlier.name
    else:
        link.replace(library)
    ours = re.compile(re.escape(library.name) + _SUFFIX)
    for other in library.parent.iterdir():
        if not ours.fullmatch(other.name) or other.name in (version.name, before):
            continue
        if not _is_in_use(other.resolve()):
            shutil.rmtree(other)


def _free_name(library: Path, suffix: str) -> Path:
    """Return a path beside the library that nothing has; equal content may have been there."""
    names = (f"{library.name}-{suffix}{f'.{n}' if n else ''}" for n in range(1000))
    return next(path for name in names if not (path := library.with_name(name)).exists())


def _digest(directory: Path) -> str:
    """Tell the content apart from any other, the same on every machine."""
    total = hashlib.sha256()
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        content = hashlib.sha256(path.read_bytes()).digest()
        total.update(os.fsencode(path.relative_to(directory)) + b"\0" + content)
    return total.hexdigest()[:12]


def _exchange(one: Path, other: Path) -> None:
    """Let two paths change places, in one step where the file system can."""
    libc = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(one), os.fsencode(other)
    if libc.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
        return
    aside = one.with_name(f"{one.name}.aside")
    other.rename(aside)
    one.rename(other)
    aside.rename(one)


def _is_in_use(version: Path) -> bool:
    """Tell whether a process has mapped a file of this version: each shim has its extensions.

    One that can't be looked into is no shim's: who may replace the library may look into those.
    """
    for process in Path("/proc").glob("[0-9]*"):
        try:
            maps = (process / "maps").read_text(errors="replace")
        except OSError:
            continue  # it has ended, or see above
        if f" {version}/" in maps:
            return True
    return False
