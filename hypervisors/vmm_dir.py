"""A directory that belongs to one VMM's own user, and what is handed to it there.

    <run_dir>/<name>/        0700, the VMM's user, until it has made what it needs; then root's
        v.sock               the VMM listens here: the guest as the host reaches it
        v.sock_<port>        we listen here: the host as the guest reaches it

The sandbox's directory is closed to that user, so sockets appear in both places as hard links of
each other, and the VMM finds its directory by descriptor.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pathlib import Path

    from .child_exec import Account
    from .machine import HybridVsock

SOCKET_NAME: Final = "v.sock"


class VmmDirectory:
    """Made by `create`, removed by `remove`; what is left after a crash goes with `run_dir`."""

    def __init__(self, path: Path, account: Account | None) -> None:
        self.path = path
        self._account = account
        self._published: list[Path] = []

    @classmethod
    def create(cls, run_dir: Path, name: str, account: Account | None) -> VmmDirectory:
        """Make the directory, empty. Raises OSError."""
        made = cls(run_dir / name, account)
        made.remove()
        os.mkdir(made.path, 0o700)
        made.give(made.path)
        return made

    def give(self, path: Path) -> None:
        """Make a file, directory or socket of this machine the VMM's user's own."""
        if self._account is not None:
            os.chown(path, self._account.uid, self._account.gid, follow_symlinks=False)

    def admit_listeners(self, device: HybridVsock) -> None:
        """Let the guest reach whoever listens at `<uds_path>_<port>` now."""
        prefix = f"{device.uds_path.name}_"
        for entry in os.listdir(device.uds_path.parent):
            path = device.uds_path.parent / entry
            port = entry.removeprefix(prefix)
            if (
                entry.startswith(prefix)
                and port.isdecimal()
                and stat.S_ISSOCK(path.lstat().st_mode)
            ):
                os.link(path, self.path / f"{SOCKET_NAME}_{port}")
                self.give(path)

    def publish(self, device: HybridVsock) -> None:
        """Put `uds_path` where the VMM listens, which it does by now.

        Raises:
            OSError: it doesn't; ENOTSOCK when something else stands there.
        """
        device.uds_path.unlink(missing_ok=True)
        self._published.append(device.uds_path)
        os.link(self.path / SOCKET_NAME, device.uds_path, follow_symlinks=False)
        # The directory is the VMM's: were this a link, we would call whoever it leads to, as root.
        if not stat.S_ISSOCK(device.uds_path.lstat().st_mode):
            raise OSError(errno.ENOTSOCK, os.strerror(errno.ENOTSOCK), str(device.uds_path))

    def seal(self) -> None:
        """From here on the VMM can use what is there, and make, rename or remove nothing.

        The host's /run, which must not run full, ends there for a VMM that its guest takes over.
        Raises OSError.
        """
        if self._account is not None:
            os.chown(self.path, 0, self._account.gid)
            os.chmod(self.path, 0o710)

    def remove(self) -> None:
        """Remove the directory and what was published. Idempotent; never follows a link.

        What a hostile VMM made irremovable is left to whoever removes `run_dir`.
        """
        for path in self._published:
            path.unlink(missing_ok=True)
        self._published.clear()
        with contextlib.suppress(RecursionError):
            shutil.rmtree(self.path, ignore_errors=True)
