"""`delete`: give back what a shim that is gone still holds, from its journal alone.

containerd runs it after *every* connection it lost, which is also the end of every ordinary task:
so there is usually nothing to do, and its start-up time lies on the way of each deletion. It needs
no config.json, may be repeated, prints a DeleteResponse and nothing else, and leaves a pod alone
when only one of the pod's containers is meant. Source: containerd docs/runtime-v2.md "delete".
"""

from __future__ import annotations

import _socket
import posix
import select
import time

from shimv2 import bootstrap
from shimv2.errors import ShimError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from shimv2.bootstrap import Flags, ShimInvocation
    from shimv2.state_dir import StateDir

EXIT_STATUS = 137  # Source: kata containerd-shim-v2 service.go Cleanup: as if killed by SIGKILL
GRACE_S = 1.0
"""How long a shim that has just answered its last Shutdown may take to be gone by itself."""

KILL_DEADLINE_S = 2.0
HANGUP_S = 0.5
"""How long the children of a shim that is gone may take to follow it."""

_SIGTERM, _SIGINT, _SIGPIPE, _SIGKILL = 15, 2, 13, 9


def run(flags: Flags) -> int:
    """Clean up after `-id`, then write the DeleteResponse. Raises `ShimError` for bad flags."""
    import _signal  # type: ignore[import-not-found,unused-ignore]  # the C half of `signal`

    for number in (_SIGTERM, _SIGINT, _SIGPIPE):
        _signal.signal(number, _signal.SIG_IGN)  # half a cleanup is worse than a late one
    invocation = bootstrap.read_invocation(flags, posix.environ)
    problems = list(_clean(invocation))
    for problem in problems:
        posix.write(2, f"{bootstrap.RUNTIME_NAME}: left behind: {problem}\n".encode()[:4000])
    posix.write(1, delete_response(time.time_ns()))
    return 0


def delete_response(now_ns: int) -> bytes:
    """Encode DeleteResponse{exit_status, exited_at}; pid 0 is not written."""
    seconds, nanos = divmod(now_ns, 1_000_000_000)
    stamp = b"\x08" + varint(seconds) + b"\x10" + varint(nanos)
    return b"\x10" + varint(EXIT_STATUS) + b"\x1a" + varint(len(stamp)) + stamp


def varint(value: int) -> bytes:
    digits = bytearray()
    while value > 0x7F:
        digits.append(value & 0x7F | 0x80)
        value >>= 7
    digits.append(value)
    return bytes(digits)


def remove_state(state_dir: StateDir) -> list[str]:
    """Undo a sandbox's journal and remove its directory; return what could not be undone.

    The directory stays if something outside of it did, or hooks are still to be run (which they
    can't be within an event loop): the next cleanup needs its journal. Cheap when there is nothing.
    The caller knows that no shim works in it any more.
    """
    if not state_dir.exists():
        return []
    from shimv2 import journal

    left = journal.replay_all(state_dir.journal)
    if any(journal.outlasts(one.entry, state_dir.path) for one in left):
        return [one.problem for one in left]
    # What could not be removed one by one goes with the directory, or is named again here.
    return state_dir.remove()


def state_dir_of(invocation: ShimInvocation) -> StateDir:
    """Return the state directory of the invocation's sandbox."""
    from shimv2.state_dir import StateDir

    return StateDir.of_sandbox(
        invocation.containerd_address, invocation.namespace, invocation.sandbox_id
    )


def unlink_own_socket(invocation: ShimInvocation) -> None:
    """Remove the socket that this process's `start` bound, unless a later shim took its place."""
    try:
        if posix.lstat(invocation.socket_path).st_ino == invocation.socket_inode:
            posix.unlink(invocation.socket_path)
    except OSError:
        return


def _clean(invocation: ShimInvocation) -> Iterator[str]:
    try:
        bootstrap.classify(invocation)
    except ShimError:
        # An unreadable config.json: its own id then is the sandbox's, or nothing is found by it.
        invocation.kind = bootstrap.SANDBOX
    if invocation.kind == bootstrap.CONTAINER:
        yield from _clean_container(invocation)
        return
    yield from _end_shim(invocation)
    yield from remove_state(state_dir_of(invocation))
    _unlink_dead_socket(invocation.socket_path)


def _clean_container(invocation: ShimInvocation) -> Iterator[str]:
    """Undo what a dead shim held for one container. A living one does that itself, in Delete."""
    state_dir = state_dir_of(invocation)
    if not state_dir.exists():
        return
    from shimv2 import journal
    from shimv2.host_process import is_alive

    head, _ = journal.read(state_dir.journal)
    if head is not None and is_alive(head.shim, head.shim_start):
        return
    yield from journal.replay(state_dir.journal, container=invocation.id)


def _end_shim(invocation: ShimInvocation) -> Iterator[str]:
    """Wait shortly for the sandbox's shim to exit, then kill it: containerd has given it up.

    `shim.pid` is only believed if that process's command line names this program and this sandbox.
    """
    pid = _shim_pid(invocation)
    if pid is None:
        return
    import _signal  # type: ignore[import-not-found,unused-ignore]

    try:
        descriptor = posix.pidfd_open(pid)
    except OSError:
        return
    try:
        if _shim_pid(invocation) != pid:
            return
        poller = select.poll()
        poller.register(descriptor, select.POLLIN)
        if poller.poll(GRACE_S * 1000):
            return
        _signal.pidfd_send_signal(descriptor, _SIGKILL)
        if not poller.poll(KILL_DEADLINE_S * 1000):
            yield f"shim (pid {pid}) survived SIGKILL for {KILL_DEADLINE_S:g} s"
    except ProcessLookupError:
        return
    finally:
        posix.close(descriptor)


def _shim_pid(invocation: ShimInvocation) -> int | None:
    """Return the pid in the bundle's `shim.pid`, if that process is this sandbox's shim."""
    try:
        pid = int(_read(f"{invocation.bundle_path}/shim.pid"))
        arguments = _read(f"/proc/{pid}/cmdline").split(b"\0")
        state = _read(f"/proc/{pid}/stat").rpartition(b")")[2].split()[0]
    except (OSError, ValueError, IndexError):
        return None
    named = [argument for argument in arguments if b"containerd-shim-" in argument]
    name = invocation.id.encode()
    meant = any(argument == name or argument.endswith(b"id=" + name) for argument in arguments)
    is_ours = bool(named) and meant and b"start" in arguments
    return pid if is_ours and state not in (b"Z", b"X") and pid != posix.getpid() else None


def _unlink_dead_socket(path: str) -> None:
    """Remove the sandbox's socket unless somebody serves it.

    A child that the dead shim had forked a moment ago may still hold the listener, until it notices
    its parent's end: then the connection is accepted by nobody and hung up.
    """
    probe = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
    try:
        probe.connect(path)
        poller = select.poll()
        poller.register(probe, select.POLLIN)
        if poller.poll(HANGUP_S * 1000):
            posix.unlink(path)
    except ConnectionRefusedError:
        posix.unlink(path)
    except OSError:
        return  # not there at all
    finally:
        probe.close()


def _read(path: str) -> bytes:
    descriptor = posix.open(path, posix.O_RDONLY | posix.O_CLOEXEC)
    try:
        return posix.read(descriptor, 1 << 16)
    finally:
        posix.close(descriptor)
