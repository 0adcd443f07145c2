"""What one sandbox keeps on disk: where it is, and how all of it goes.

    /run/kata/<key>/            0700, owned by root
        journal                 what the sandbox holds on this host (journal.py)
        share/                  what virtio-fs shows to the guest
        *.sock                  sockets of the VMM and its helpers

`key` is derived from what containerd puts on every command line, so `delete` finds the directory
with no index and no look-up (decision 0003).
"""

from __future__ import annotations

import os
import stat

from shimv2.errors import InvalidArgument
from shimv2.naming import sandbox_digest

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pathlib import Path

DEFAULT_ROOT = "/run/kata"
REPORTS_ROOT = "/run/kata-reports"
MAX_SOCKET_PATH_BYTES = 106
"""Source: sys/un.h: sun_path holds 108 bytes; containerd refuses more than 106."""

_KEY_DIGITS = 24
_MAX_DEPTH = 64


class StateDir:
    """The directory of one sandbox. Making the object touches nothing."""

    __slots__ = ("key", "path", "root")

    def __init__(self, key: str, root: str = DEFAULT_ROOT) -> None:
        self.key = key
        self.root = root
        self.path = f"{root}/{key}"

    @classmethod
    def of_sandbox(
        cls, containerd_address: str, namespace: str, sandbox_id: str, root: str = DEFAULT_ROOT
    ) -> StateDir:
        """Return the directory that every command line with these three values means."""
        digest = sandbox_digest(containerd_address, namespace, sandbox_id)
        return cls(digest[:_KEY_DIGITS], root)

    @property
    def journal(self) -> str:
        return f"{self.path}/journal"

    @property
    def directory(self) -> Path:
        return self._as_path(self.path)

    def socket(self, name: str) -> Path:
        """Return the path of a unix socket called `name`; raises `InvalidArgument` if too long."""
        path = f"{self.path}/{name}"
        if len(os.fsencode(path)) > MAX_SOCKET_PATH_BYTES:
            raise InvalidArgument(f"socket path {path} exceeds {MAX_SOCKET_PATH_BYTES} bytes")
        return self._as_path(path)

    def create(self) -> None:
        """Make root and directory, 0700 whatever the umask; an existing one is used as it is.

        Raises `InvalidArgument` when something that is not root's own directory stands there.
        """
        for path in (self.root, self.path):
            try:
                os.mkdir(path, 0o700)
            except FileExistsError:
                _refuse_foreign(path)
            os.chmod(path, 0o700)

    def exists(self) -> bool:
        return os.path.isdir(self.path)

    def remove(self) -> list[str]:
        """Remove the directory and what is in it; return what could not be removed, and why.

        Never follows a link and never enters a mount: what is mounted here is somebody's data.
        """
        problems: list[str] = []
        try:
            parent = os.open(self.root, os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return problems
        try:
            _remove_entry(parent, self.key, self.path, problems, _MAX_DEPTH)
        finally:
            os.close(parent)
        return problems

    @staticmethod
    def _as_path(path: str) -> Path:
        from pathlib import Path  # costs `start` and `delete` milliseconds they don't have

        return Path(path)


def _refuse_foreign(path: str) -> None:
    found = os.lstat(path)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise InvalidArgument(f"{path} is not a directory of this user; remove it")


def _remove_entry(parent: int, name: str, shown: str, problems: list[str], depth: int) -> None:
    try:
        if stat.S_ISDIR(os.lstat(name, dir_fd=parent).st_mode):
            _remove_directory(parent, name, shown, problems, depth)
        else:
            os.unlink(name, dir_fd=parent)
    except FileNotFoundError:
        return
    except OSError as error:
        problems.append(f"{shown}: {error.strerror}")


def _remove_directory(parent: int, name: str, shown: str, problems: list[str], depth: int) -> None:
    from shimv2 import mounts

    if depth == 0:
        problems.append(f"{shown}: nested too deeply")
        return
    resolve = mounts.RESOLVE_NO_XDEV | mounts.RESOLVE_BENEATH | mounts.RESOLVE_NO_SYMLINKS
    directory = mounts.open_beneath(
        parent, name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, resolve=resolve
    )
    try:
        for entry in os.listdir(directory):
            _remove_entry(directory, entry, f"{shown}/{entry}", problems, depth - 1)
    finally:
        os.close(directory)
    os.rmdir(name, dir_fd=parent)
