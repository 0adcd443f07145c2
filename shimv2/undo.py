"""How each kind of journalled resource is given back. Every function may be run on what is gone.

A function returns None when the resource is gone, or a sentence about what is left. OSError is told
apart by errno, never by text.
"""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

from shimv2 import host_process

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

Outcome = str | None


def is_below(directory: str, path: str) -> bool:
    """Tell whether `path`, which need not exist, lies below `directory`: by name, links aside."""
    return path.startswith(f"{directory}/") and ".." not in path.split("/")


KILL_DEADLINE_S = 2.0
"""A killed VMM gives its memory back within this; longer means it hangs in the kernel."""


def process(fields: Mapping[str, str | int]) -> Outcome:
    """Kill the very process (pid and start time) and wait until it is dead."""
    name = str(fields.get("name", "process"))
    pid = int(fields["pid"])
    return host_process.kill_and_wait(pid, int(fields["start_time"]), name, KILL_DEADLINE_S)


def mount(fields: Mapping[str, str | int]) -> Outcome:
    """Lazily unmount `target`; in another mount namespace than its own there is nothing to do."""
    from shimv2 import mounts

    mounts.detach(str(fields["target"]))
    return None


def directory(fields: Mapping[str, str | int]) -> Outcome:
    """Remove a directory that should be empty; what lies in it is not ours to delete."""
    path = str(fields["path"])
    try:
        os.rmdir(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        return f"{path}: {error.strerror}"
    return None


def socket(fields: Mapping[str, str | int]) -> Outcome:
    """Unlink a unix socket, and nothing else that may have taken its place."""
    return _unlink(str(fields["path"]), stat.S_ISSOCK)


def file(fields: Mapping[str, str | int]) -> Outcome:
    """Unlink a file, fifo or link; never a directory, and never what a link leads to."""
    return _unlink(str(fields["path"]), lambda mode: not stat.S_ISDIR(mode))


def cgroup(fields: Mapping[str, str | int]) -> Outcome:
    """Kill what is in a cgroup (where the kernel can) and remove it."""
    path = str(fields["path"])
    try:
        with open(f"{path}/cgroup.kill", "w", encoding="ascii") as control:
            control.write("1")
    except OSError:
        pass  # cgroup v1, or gone: the processes have entries of their own
    return directory(fields)


def network(fields: Mapping[str, str | int]) -> Outcome:
    """Take the wiring of a pod's network back, if its namespace is still there."""
    from netns.network import undo_recorded

    return undo_recorded(fields)


def poststop(fields: Mapping[str, str | int]) -> Outcome:
    """Run the poststop hooks of a container that a shim left, unless they have been run.

    Not for a running event loop: a living shim runs them itself, at Delete.
    """
    from shimv2.host_hooks import run_recorded

    return run_recorded(str(fields["path"]))


UNDO: dict[str, Callable[[Mapping[str, str | int]], Outcome]] = {
    "process": process,
    "hook": process,
    "mount": mount,
    "directory": directory,
    "socket": socket,
    "file": file,
    "cgroup": cgroup,
    "network": network,
    "poststop": poststop,
}
"""Kind -> undo. A package with resources of another kind adds its own before it takes the first."""


def _unlink(path: str, is_expected: Callable[[int], bool]) -> Outcome:
    try:
        if not is_expected(os.lstat(path).st_mode):
            return f"{path} became something else and was left"
        os.unlink(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        return f"{path}: {error.strerror}"
    return None
