"""Runs as a program inside of a container: uses a volume in every way, and prints what came of it.

    python3 volume_probe.py files DIRECTORY TWIN  what one process can do there, and in the same
                                                  directory without devices and programs
    python3 volume_probe.py serve DIRECTORY       hold locks, a socket, a map there; until killed
    python3 volume_probe.py meet DIRECTORY        what another container finds of these
    python3 volume_probe.py watch FILE DIRECTORY  print how the file's content changes, and the
                                                  directory's inotify events; until killed

Standard library only. One line of JSON, or with `watch` one a change.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import mmap
import os
import select
import signal
import socket
import stat
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Found = dict[str, Any]
_IN_ALL = 0xFFF
_ODD_NAME = b"odd \xff\xfe\n\t\\ '\" name"
_MANY = 600
_GIB = 1 << 30


def tried(action: Callable[[], object]) -> object:
    """What an action returns, or the name of its error."""
    try:
        return action()
    except OSError as exc:
        return errno.errorcode[exc.errno or 0]


def files(top: Path, twin: Path) -> Found:
    """Modes, owners, links, special files, sizes and names."""
    found: Found = {"owner of the directory": owner(top)}
    plain = top / "plain"
    plain.write_text("x")
    plain.chmod(0o4751)
    found["mode"] = oct(plain.stat().st_mode & 0o7777)
    os.chown(plain, 12345, 54321)
    found["owner"] = owner(plain)
    os.link(plain, top / "hard")
    found["links"] = [plain.stat().st_nlink, plain.samefile(top / "hard")]
    os.symlink("/etc/passwd", top / "absolute")
    os.symlink("nowhere", top / "dangling")
    found["symlinks"] = [os.readlink(top / "absolute"), (top / "dangling").exists()]
    found["absolute symlink leads to"] = (top / "absolute").read_text()[:5]
    found["fifo"] = through_fifo(top / "fifo")
    found["socket"] = through_socket(top / "socket")
    found["device"] = tried(lambda: os.mknod(top / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3)))
    found["open device"] = tried(lambda: os.close(os.open(top / "null", os.O_RDWR)))
    found["open device where devices are off"] = tried(
        lambda: os.close(os.open(twin / "null", os.O_RDWR))
    )
    (top / "program").write_text("#!/bin/sh\n")
    (top / "program").chmod(0o755)
    found["execute where programs are off"] = tried(
        lambda: os.posix_spawn(twin / "program", ["program"], {})
    )
    found["xattr"] = tried(lambda: os.setxattr(plain, "user.test", b"1"))
    found["sparse"] = sparse(top / "sparse")
    found["map"] = mapped(top / "map")
    odd = os.path.join(os.fsencode(top), _ODD_NAME)
    os.close(os.open(odd, os.O_CREAT | os.O_WRONLY))
    found["odd name"] = _ODD_NAME in os.listdir(os.fsencode(top))
    found["long name"] = tried(lambda: (top / ("n" * 255)).write_text("n"))
    found["too long name"] = tried(lambda: (top / ("n" * 256)).write_text("n"))
    found["many"] = many(top / "many")
    os.rename(top / "map", top / "plain")
    found["renamed over"] = (top / "plain").read_bytes()[:6].decode()
    return found


def owner(path: Path) -> str:
    status = path.stat()
    return f"{status.st_uid}:{status.st_gid}"


def through_fifo(path: Path) -> str:
    os.mkfifo(path)
    child = os.fork()
    if child == 0:
        path.write_text("fifo")
        os._exit(0)
    text = path.read_text()
    os.waitpid(child, 0)
    return text


def through_socket(path: Path) -> str:
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
        listener.bind(str(path))
        listener.listen(1)
        client.connect(str(path))
        client.sendall(b"socket")
        with listener.accept()[0] as server:
            return server.recv(10).decode()


def sparse(path: Path) -> Found:
    with path.open("wb") as file:
        file.truncate(6 * _GIB)
        file.seek(5 * _GIB)
        file.write(b"end")
        file.flush()
        os.fsync(file.fileno())
        status = os.fstat(file.fileno())
        data = tried(lambda: os.lseek(file.fileno(), 0, os.SEEK_DATA))
    return {"size": status.st_size, "little": status.st_blocks < 1000, "data at": data}


def mapped(path: Path) -> str:
    path.write_bytes(b"\0" * 4096)
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 4096) as view:
        view[:6] = b"mapped"
        view.flush()
    return path.read_bytes()[:6].decode()


def many(top: Path) -> int:
    top.mkdir()
    for number in range(_MANY):
        (top / f"{number:04}").write_text("m")
    return len(os.listdir(top))


def serve(top: Path) -> None:
    """Hold everything that another container should meet."""
    whole = (top / "flock").open("w")
    fcntl.flock(whole, fcntl.LOCK_EX)
    part = (top / "fcntl").open("w")
    fcntl.lockf(part, fcntl.LOCK_EX)
    (top / "map").write_bytes(b"\0" * 4096)
    with (top / "map").open("r+b") as file:
        view = mmap.mmap(file.fileno(), 4096)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(top / "socket"))
    listener.listen(1)
    watch = inotify(top)
    (top / "ready").touch()
    while True:
        connection, _ = listener.accept()
        with connection:
            if connection.recv(10) == b"map":
                view[:5] = b"truth"
                connection.sendall(b"done")
            else:
                connection.sendall(json.dumps(events(watch)).encode())


def meet(top: Path) -> Found:
    """Try each of what `serve` holds."""
    deadline = time.monotonic() + 60
    while not (top / "ready").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    found: Found = {}
    with (top / "flock").open("r+") as file:
        found["flock"] = tried(lambda: fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB))
    with (top / "fcntl").open("r+") as file:
        found["fcntl"] = tried(lambda: fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB))
    with (top / "map").open("r+b") as file, mmap.mmap(file.fileno(), 4096) as view:
        before = bytes(view[:5])
        found["socket"] = tried(lambda: asked(top, b"map").decode())
        found["map"] = [before.decode(), bytes(view[:5]).decode()]
    (top / "news").write_text("n")
    found["inotify"] = tried(lambda: "news" in json.loads(asked(top, b"events")))
    return found


def asked(top: Path, what: bytes) -> bytes:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(30)
        client.connect(str(top / "socket"))
        client.sendall(what)
        return client.recv(65536)


def inotify(top: Path) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    watch: int = libc.inotify_init1(os.O_NONBLOCK)
    if libc.inotify_add_watch(watch, os.fsencode(top), _IN_ALL) < 0:
        raise OSError(ctypes.get_errno(), "inotify_add_watch")
    return watch


def events(watch: int) -> list[str]:
    """Names in the events that have come."""
    names = []
    try:
        data = os.read(watch, 65536)
    except BlockingIOError:
        return []
    while data:
        _, _, _, length = struct.unpack_from("iIII", data)
        names.append(data[16 : 16 + length].rstrip(b"\0").decode())
        data = data[16 + length :]
    return names


def watch(file: Path, top: Path) -> None:
    """One line a change: the content, when it was seen, and the names that had events."""
    seen, descriptor = "", inotify(top)
    while True:
        now = file.read_text()
        if now != seen:
            seen = now
            print(json.dumps([now, time.time(), events(descriptor)]), flush=True)
        select.select([descriptor], [], [], 0.05)


def main() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    what, *places = sys.argv[1:]
    paths = [Path(place) for place in places]
    calls: dict[str, Callable[..., Found | None]] = {
        "files": files, "serve": serve, "meet": meet, "watch": watch
    }  # fmt: skip
    found = calls[what](*paths)
    if found is not None:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
