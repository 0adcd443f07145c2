"""`start`: have a shim listening for the sandbox, print its address, and be gone within 15 ms.

    start                                     its child, the daemon
      read flags, stdin, config.json
      bind + listen, write `address`
      fork ------------------------------->   own session, /dev/null on 0-2, nothing else inherited
      write `shim.pid`, print, open the gate  import (containerd connects and waits meanwhile)
      exit                                    gate: a byte, or the end of the pipe: start died, so
                                              nobody will ever call; unlink the socket and exit

containerd reads until *every* holder of the output pipe has closed it, and takes each stray byte
for part of the address. Imports: as in bootstrap.py.
"""

from __future__ import annotations

import _socket
import posix

from shimv2 import bootstrap
from shimv2.errors import InvalidArgument, ShimError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

    from shimv2.bootstrap import Flags, ShimInvocation

_EADDRINUSE = 98
_MAX_SOCKET_PATH_BYTES = 106
_BACKLOG = 128


def run(flags: Flags) -> NoReturn:
    """Do what the module says. Leaves by `_exit`, in both processes. Raises `ShimError`."""
    invocation = bootstrap.read_invocation(flags, posix.environ, stdin=bootstrap.read_stdin())
    bootstrap.classify(invocation)
    if invocation.kind == bootstrap.CONTAINER:
        # The sandbox's shim serves this one too; if it died, containerd finds out by connecting.
        write_file(invocation.bundle_path, "address", invocation.address)
        finish(invocation.answer)
    listener = listen(invocation.socket_path)
    if listener is None:
        write_file(invocation.bundle_path, "address", invocation.address)
        finish(invocation.answer)
    try:
        _leave_daemon(invocation, listener)
    except BaseException:
        # containerd runs no `delete` after a failed start. A daemon that was forked already finds
        # its gate closed, and goes.
        posix.unlink(invocation.socket_path)
        raise
    posix._exit(0)


def _leave_daemon(invocation: ShimInvocation, listener: _socket.socket) -> None:
    """Fork the daemon and say where it listens; only when both worked does it serve."""
    invocation.socket_inode = posix.lstat(invocation.socket_path).st_ino
    write_file(invocation.bundle_path, "address", invocation.address)
    gate, opener = posix.pipe()
    child = posix.fork()
    if child == 0:
        posix.close(opener)
        become_daemon(invocation, listener.detach(), gate)
    write_file(invocation.bundle_path, "shim.pid", str(child))
    write_all(1, invocation.answer.encode())
    posix.write(opener, b"1")


def finish(answer: str) -> NoReturn:
    """Print where a shim that runs already is, and exit."""
    write_all(1, answer.encode())
    posix._exit(0)


def listen(path: str) -> _socket.socket | None:
    """Bind and listen on `path`, 0600 in a directory 0700; None if a live shim listens there.

    What a dead shim left is replaced. Raises `ShimError` with the path and the reason.
    """
    if len(path.encode()) > _MAX_SOCKET_PATH_BYTES:
        raise InvalidArgument(f"socket path {path} exceeds {_MAX_SOCKET_PATH_BYTES} bytes")
    try:
        make_private_directory(path.rpartition("/")[0])
        listener = _bind(path)
        if listener is None:
            if _answers(path):
                return None
            posix.unlink(path)
            listener = _bind(path)
    except OSError as error:
        raise ShimError(f"listening on {path}: {error.strerror}") from error
    if listener is None:
        raise ShimError(f"listening on {path}: another shim took it at the same moment")
    return listener


def _bind(path: str) -> _socket.socket | None:
    kind = _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC | _socket.SOCK_NONBLOCK
    listener = _socket.socket(_socket.AF_UNIX, kind)
    before = posix.umask(0o177)  # so that it has no other mode even for a moment
    try:
        listener.bind(path)
    except OSError as error:
        listener.close()
        if error.errno == _EADDRINUSE:
            return None
        raise
    finally:
        posix.umask(before)
    listener.listen(_BACKLOG)
    return listener


def _answers(path: str) -> bool:
    probe = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
    try:
        probe.connect(path)
    except OSError:
        return False
    finally:
        probe.close()
    return True


def make_private_directory(path: str) -> None:
    """Make `path` and its parents; the last one 0700 whatever the umask says."""
    position = 0
    while position >= 0:
        position = path.find("/", position + 1)
        part = path if position < 0 else path[:position]
        try:
            posix.mkdir(part, 0o700 if position < 0 else 0o711)
        except FileExistsError:
            continue
    if posix.stat(path).st_mode & 0o777 != 0o700:
        posix.chmod(path, 0o700)


def write_file(directory: str, name: str, text: str) -> None:
    """Write a small file of the bundle, all of it or nothing. Raises `ShimError`."""
    temporary = f"{directory}/.{name}"
    try:
        flags = posix.O_WRONLY | posix.O_CREAT | posix.O_TRUNC | posix.O_CLOEXEC | posix.O_NOFOLLOW
        descriptor = posix.open(temporary, flags, 0o644)
        try:
            write_all(descriptor, text.encode())
        finally:
            posix.close(descriptor)
        posix.rename(temporary, f"{directory}/{name}")
    except OSError as error:
        raise ShimError(f"writing {directory}/{name}: {error.strerror}") from error


def write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[posix.write(descriptor, data) :]


def become_daemon(invocation: ShimInvocation, listener: int, gate: int) -> NoReturn:
    """Leave everything of `start` behind, then import the rest and serve. Never returns."""
    status = 1
    try:
        posix.setsid()
        null = posix.open("/dev/null", posix.O_RDWR)
        for standard in (0, 1, 2):
            posix.dup2(null, standard)
        _close_all_but({0, 1, 2, listener, gate})
        posix.umask(0o022)
        posix.chdir(invocation.bundle_path)
        _raise_oom_score()
        import gc

        gc.disable()  # a collection during imports finds nothing and costs milliseconds
        from shimv2 import daemon

        status = daemon.run(invocation, listener, gate)
    finally:
        posix._exit(status)


def _close_all_but(kept: set[int]) -> None:
    for name in posix.listdir("/proc/self/fd"):
        if int(name) not in kept:
            try:
                posix.close(int(name))
            except OSError:
                continue  # the descriptor of the listing itself


def _raise_oom_score() -> None:
    """Be killed before containerd, as runc's shim is; a kernel that says no is obeyed.

    Source: containerd pkg/shim/util_linux.go AdjustOOMScore: the parent's score + 1, at most 1000.
    """
    path = "/proc/self/oom_score_adj"
    try:
        descriptor = posix.open(path, posix.O_RDWR | posix.O_CLOEXEC)
        try:
            score = min(int(posix.read(descriptor, 16)) + 1, 1000)
            posix.write(descriptor, str(score).encode())
        finally:
            posix.close(descriptor)
    except OSError:
        return
