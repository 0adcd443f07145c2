"""Where configuration files may lie, whom they must belong to, and how they are read."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

from shimv2.errors import FailedPrecondition, InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

DIRECTORIES = ("/etc/kata-containers", "/usr/share/defaults/kata-containers")
FILE_NAME = "configuration.toml"
VARIABLE = "KATA_CONF_FILE"
_MAX_BYTES = 1 << 20


def find(
    path: str | None, environment: Mapping[str, str] | None = None, *, variant: str = ""
) -> str:
    """Return the file to read: the one asked for, the runtime's, the environment's, the usual one.

    A runtime called io.containerd.kata-clh.v2 is of variant "clh" and has configuration-clh.toml.

    The environment may name only files in `DIRECTORIES`: it is not an operator's decision for each
    pod, and once let a pod choose its hypervisor (CVE-2026-50540). Raises `InvalidArgument`;
    `FailedPrecondition` if there is no file at all: a VM from guessed paths would not be the
    operator's.
    """
    if path:
        return path
    named = (os.environ if environment is None else environment).get(VARIABLE, "")
    if named and not variant:
        if os.path.dirname(os.path.normpath(named)) not in DIRECTORIES:
            places = " or ".join(DIRECTORIES)
            raise InvalidArgument(f"{VARIABLE}={named}: only files in {places} are accepted")
        return named
    stem, _, suffix = FILE_NAME.partition(".")
    name = f"{stem}-{variant}.{suffix}" if variant else FILE_NAME
    usual = [f"{directory}/{name}" for directory in DIRECTORIES]
    found = next((one for one in usual if os.path.exists(one)), None)
    if found is None:
        raise FailedPrecondition(
            f"no configuration: neither {' nor '.join(usual)} exists; `make install` puts one there"
        )
    return found


def read_tables(path: str) -> Iterator[tuple[str, dict[str, object]]]:
    """Yield (file name, parsed tables) of `path` and then of its drop-ins, in order of their names.

    Drop-ins are `config.d/*.toml` beside the file. Raises `InvalidArgument`.
    """
    yield path, _parse(path)
    directory = os.path.join(os.path.dirname(os.path.realpath(path)), "config.d")
    try:
        names = sorted(name for name in os.listdir(directory) if name.endswith(".toml"))
    except (FileNotFoundError, NotADirectoryError):
        return
    for name in names:
        yield f"{directory}/{name}", _parse(f"{directory}/{name}")


def line_of(path: str, table: str, key: str) -> int:
    """Return the line of `key` in `[table]`, for an error text; 0 if it can't be told."""
    try:
        lines = _read(path).decode("utf-8").splitlines()
    except (InvalidArgument, ValueError):
        return 0
    current = ""
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if text.startswith("["):
            current = text.strip("[] \t").split("#")[0].strip("[] \t")
        elif current == table and text.partition("=")[0].strip(" \t\"'") == key:
            return number
    return 0


def _parse(path: str) -> dict[str, object]:
    import tomllib  # 7 ms that only a Create has to spend

    data = _read(path)
    try:
        return tomllib.loads(data.decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"{path}: not valid TOML: {error}") from error


def _read(path: str) -> bytes:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise InvalidArgument(f"configuration file {path}: {error.strerror}") from error
    with os.fdopen(descriptor, "rb") as stream:
        _refuse_unsafe(path, os.fstat(descriptor))
        data = stream.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise InvalidArgument(f"configuration file {path} is larger than {_MAX_BYTES} bytes")
    return data


def _refuse_unsafe(path: str, found: os.stat_result) -> None:
    """The file names programs that run as root, so whoever can write it is root."""
    if not stat.S_ISREG(found.st_mode):
        raise InvalidArgument(f"configuration file {path} is not a regular file")
    if found.st_uid not in (0, os.geteuid()):
        raise InvalidArgument(
            f"configuration file {path} belongs to user {found.st_uid}; chown it to root"
        )
    if found.st_mode & 0o022:
        raise InvalidArgument(
            f"configuration file {path} can be written by others than its owner; "
            f"run `chmod go-w {path}`"
        )
    directory = os.path.dirname(os.path.realpath(path))
    while True:
        holder = os.stat(directory)
        if holder.st_mode & 0o002 and not holder.st_mode & stat.S_ISVTX:
            raise InvalidArgument(f"configuration file {path}: anybody can write to {directory}")
        if directory == "/":
            return
        directory = os.path.dirname(directory)
