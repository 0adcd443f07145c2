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


def hook(fields: Mapping[str, str | int]) -> Outcome:
    """Kill what a hook has started, and itself if it lives: all of its session, and wait for it.

    The hook alone has died with its shim; a CNI plugin of its would work beside the poststop hooks.
    """
    name = str(fields.get("name", "hook"))
    pid = int(fields["pid"])
    return host_process.kill_session(pid, int(fields["start_time"]), name, KILL_DEADLINE_S)


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


LEAVE_DEADLINE_S = 2.0
"""A process that was killed has left its cgroup within this."""

LIVE_LEAVE_DEADLINE_S = 0.05
"""The same for a shim that serves, and has waited for its processes before."""

_UNTOLD_MS = 20
_EBUSY = 16
_NO_CGROUP = (2, 19)  # ENOENT, ENODEV: it went before the write


def cgroup(fields: Mapping[str, str | int], *, deadline_s: float = LEAVE_DEADLINE_S) -> Outcome:
    """Remove an empty cgroup; this very process goes `back` first. Nothing is killed here.

    What we started has entries of its own, and is dead or dying by now; what somebody else put
    there is not ours to end.
    """
    import time

    path = str(fields["path"])
    deadline = time.monotonic() + deadline_s
    while True:
        try:
            os.rmdir(path)
            _remove_if_last(os.path.dirname(path))
            return None
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            if error.errno != _EBUSY:
                return f"{path}: {error.strerror}"
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            return f"{path}: processes {processes(path)} are still in it"
        _leave(path, str(fields.get("back", "")))
        _wait_for_a_change(path, left_s)


def _remove_if_last(parent: str) -> None:
    """Remove the directory that only sandboxes of ours are in, when none is left."""
    if parent.endswith("/kata_overhead"):
        try:
            os.rmdir(parent)
        except OSError:
            return  # another is in it


def live_cgroup(fields: Mapping[str, str | int]) -> Outcome:
    """Do as `cgroup` without holding up an event loop: what is not gone by now is left."""
    return cgroup(fields, deadline_s=LIVE_LEAVE_DEADLINE_S)


def processes(path: str) -> list[int]:
    try:
        with open(f"{path}/cgroup.procs", encoding="ascii") as stream:
            return [int(line) for line in stream]
    except OSError:
        return []


def _leave(path: str, back: str) -> None:
    if os.getpid() not in processes(path) or not back:
        return
    try:
        _move_to(back)
    except OSError as error:
        if error.errno not in _NO_CGROUP:
            raise
        # systemd removes a service's cgroup when it has stopped; the hierarchy's root stays.
        _move_to(_root_of(path))


def _move_to(cgroup: str) -> None:
    with open(f"{cgroup}/cgroup.procs", "w", encoding="ascii") as stream:
        stream.write(str(os.getpid()))


def _root_of(path: str) -> str:
    """Return the root of the hierarchy that the cgroup at `path` is in."""
    while os.path.exists(f"{os.path.dirname(path)}/cgroup.procs"):
        path = os.path.dirname(path)
    return path


def _wait_for_a_change(path: str, limit_s: float) -> None:
    """Wait until one of the processes has ended, or the kernel tells that the cgroup is empty."""
    import select

    poller = select.poll()
    descriptors = []
    try:
        for pid in processes(path):
            try:
                descriptors.append(os.pidfd_open(pid))
            except OSError:
                continue
            poller.register(descriptors[-1], select.POLLIN)
        limit_ms = limit_s * 1000
        if not descriptors:
            try:
                descriptors.append(os.open(f"{path}/cgroup.events", os.O_RDONLY | os.O_CLOEXEC))
            except OSError:
                limit_ms = _UNTOLD_MS  # version 1 tells nobody that the last one is out
            else:
                os.read(descriptors[-1], 4096)
                poller.register(descriptors[-1], select.POLLPRI)
                limit_ms = min(limit_ms, _UNTOLD_MS)  # it may have been told before we asked
        poller.poll(limit_ms)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def network(fields: Mapping[str, str | int]) -> Outcome:
    """Take the wiring of a pod's network back, if its namespace is still there."""
    from netns.network import undo_recorded

    return undo_recorded(fields)


def poststop(fields: Mapping[str, str | int]) -> Outcome:
    """Run the poststop hooks of a container that a shim left, unless they have been run.

    Until `give_up_ms` of the monotonic clock, which the replay adds. Not for a running event loop:
    a living shim runs them itself, at Delete.
    """
    import time

    from shimv2.host_hooks import run_recorded

    left_s = int(fields["give_up_ms"]) / 1000 - time.monotonic()
    return run_recorded(str(fields["path"]), left_s)


UNDO: dict[str, Callable[[Mapping[str, str | int]], Outcome]] = {
    "process": process,
    "hook": hook,
    "mount": mount,
    "directory": directory,
    "socket": socket,
    "file": file,
    "cgroup": cgroup,
    "network": network,
    "poststop": poststop,
}
"""Kind -> undo. A package with resources of another kind adds its own before it takes the first."""


LIVE: dict[str, Callable[[Mapping[str, str | int]], Outcome]] = {"cgroup": live_cgroup}
"""What a shim that serves does instead; what that leaves is undone at its exit, or by `delete`."""


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
