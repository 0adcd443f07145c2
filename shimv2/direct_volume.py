"""Direct volumes: a disk that a CSI driver assigned to a pod, for the guest to mount.

The driver leaves `mountInfo.json` in a directory named after the volume's path on the host, which
is the source of the bind mount in the spec. Nothing is mounted there on the host: the guest mounts
the disk itself. Source: Kata docs/design/direct-blk-device-assignment.md,
src/runtime/pkg/direct-volume/utils.go.
"""

from __future__ import annotations

import base64
import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from agent_proto.pb import agent_pb2
from shimv2.errors import InvalidArgument, Unimplemented

if TYPE_CHECKING:
    from shimv2.guest_spec import SharedMount

ROOT: Final = Path("/run/kata-containers/shared/direct-volumes")
_FILE: Final = "mountInfo.json"
_MAX_BYTES: Final = 64 << 10
_MAX_NAME: Final = 255
# Kata's first runtime says "block", its second "directvol"; the disk may be a file in either.
_TYPES: Final = frozenset({"block", "directvol"})
_POLICIES: Final = ("Always", "OnRootMismatch")


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectVolume:
    """What mountInfo.json says."""

    directory: Path
    device: Path
    fstype: str
    options: tuple[str, ...]
    fs_group: agent_pb2.FSGroup | None


def directory_of(volume: str, root: Path = ROOT) -> Path | None:
    """Where the assignment of the volume at a path of the host is kept; None if none can be."""
    name = base64.urlsafe_b64encode(os.fsencode(volume)).decode("ascii")
    return root / name if name and len(name) <= _MAX_NAME else None


def find(mount: SharedMount, root: Path = ROOT) -> DirectVolume | None:
    """The direct volume behind a mount of the spec, if it is one.

    Raises:
        InvalidArgument: a mountInfo.json that makes no sense or that others than root may write.
        Unimplemented: it asks for what is not offered.
    """
    directory = directory_of(str(mount.source), root)
    if directory is None:
        return None
    text = _read(directory / _FILE)
    if text is None:
        return None
    try:
        info = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"mount {mount.destination}: {directory / _FILE}: {error}") from error
    return _volume(info, directory, f"mount {mount.destination}: {directory / _FILE}")


def _read(path: Path) -> bytes | None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise InvalidArgument(f"{path}: {error.strerror}") from error
    with os.fdopen(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        # It names a disk of the host: whoever can write it can read that disk.
        if not stat.S_ISREG(found.st_mode) or found.st_mode & 0o022 or found.st_uid != os.geteuid():
            raise InvalidArgument(f"{path} must be a file that only root can write; chmod go-w it")
        return file.read(_MAX_BYTES + 1)


def _volume(info: object, directory: Path, what: str) -> DirectVolume:
    if not isinstance(info, dict):
        raise InvalidArgument(f"{what}: not an object")
    kind, device, fstype = (_text(info, key, what) for key in ("volume-type", "device", "fstype"))
    options, metadata = info.get("options") or [], info.get("metadata") or {}
    if kind not in _TYPES:
        raise Unimplemented(
            f'{what}: volume-type "{kind}" is not offered; known are "block", "directvol"'
        )
    if not device.startswith("/") or not fstype.isalnum():
        raise InvalidArgument(f"{what}: device must be an absolute path and fstype a name")
    if not isinstance(options, list) or not all(isinstance(one, str) for one in options):
        raise InvalidArgument(f"{what}: options must be a list of strings")
    if not isinstance(metadata, dict):
        raise InvalidArgument(f"{what}: metadata must be an object")
    for key in ("encryptionKey", "createFilesystem"):
        if metadata.get(key) not in (None, "", "false"):
            raise Unimplemented(
                f"{what}: metadata {key} is not offered; give a disk with a plain file system"
            )
    return DirectVolume(
        directory=directory,
        device=Path(device),
        fstype=fstype,
        options=tuple(options),
        fs_group=_fs_group(metadata, what),
    )


def _text(info: dict[str, Any], key: str, what: str) -> str:
    value = info.get(key, "")
    if not isinstance(value, str) or "\0" in value:
        raise InvalidArgument(f"{what}: {key} must be a string")
    return value


def _fs_group(metadata: dict[str, Any], what: str) -> agent_pb2.FSGroup | None:
    group = metadata.get("fsGroup")
    if group in (None, ""):
        return None
    policy = metadata.get("fsGroupChangePolicy") or _POLICIES[0]
    if not str(group).isdecimal() or int(str(group)[:11]) > 0xFFFFFFFF or policy not in _POLICIES:
        raise InvalidArgument(
            f'{what}: fsGroup must be a number and fsGroupChangePolicy "Always" or "OnRootMismatch"'
        )
    return agent_pb2.FSGroup(group_id=int(group), group_change_policy=policy)
