"""Files of the host in a VM without a shared directory: copied by the agent, and kept up to date.

What a pod is given as files (ConfigMaps, Secrets, resolv.conf, hosts) is small and for reading; it
is copied when the container is created, watched while it lives, and copied again where it changed.
Kubernetes replaces such a volume by turning the link `..data` to a new directory: links are copied
last, so inside, too, all of it changes at once.

What the host takes away stays in the guest: the agent's protocol can't delete.
"""

from __future__ import annotations

import contextlib
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

import trio

from agent_proto.errors import AgentError
from agent_proto.pb import agent_pb2
from shimv2.errors import InvalidArgument, ShimError
from shimv2.file_tree import MAX_BYTES, Entry, open_entry, read_tree
from shimv2.file_watch import FileWatch

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import PurePosixPath

    from agent_proto.client import AgentClient
    from shimv2.container import Log
    from shimv2.guest_spec import SharedMount

# Source: Kata virtcontainers/kata_agent.go grpcMaxDataSize.
_PIECE_BYTES: Final = 1 << 20
_DIRECTORY_MODE: Final = 0o755
# A host that writes without pause is followed at this pace. Pacing, not waiting for anything.
_PACE_S: Final = 0.2


@dataclass(slots=True, kw_only=True)
class Copy:
    """One mount's files. `sent` is what the guest has, by path."""

    container_id: str
    source: Path
    target: PurePosixPath
    what: str
    sent: dict[str, Entry] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return str(self.target)


def plan_copy(mount: SharedMount, container_id: str, target: PurePosixPath) -> Copy:
    """What copying a mount's source will take. Refuses what can't be copied or kept true.

    Raises:
        InvalidArgument: with the way out.
    """
    what = f"mount {mount.destination}"
    copy = Copy(container_id=container_id, source=mount.source, target=target, what=what)
    entries = read_tree(mount.source, what)
    if entries[0].is_directory and not mount.read_only:
        raise InvalidArgument(
            f"{what}: the directory {mount.source} is for writing, and a VM without a shared "
            "directory gets only a copy; mount it read-only, use a block volume, or "
            'shared_fs = "virtio-fs"'
        )
    return copy


class Copies:
    """The copied files of one VM."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._watch: FileWatch | None = None
        self._copies: dict[str, Copy] = {}

    async def send(self, copies: Sequence[Copy], agent: AgentClient) -> None:
        """Copy a container's files; from then on `follow` keeps them up to date.

        Raises:
            InvalidArgument: as `plan_copy`, of what has changed since.
            AgentError: the guest refused one.
        """
        if copies and self._watch is None:
            self._watch = FileWatch()
        for copy in copies:
            # Watched first: what changes while it is copied is copied again.
            self._add_watches(copy, read_tree(copy.source, copy.what))
            self._copies[copy.name] = copy
            await _send_changes(copy, agent)

    def forget(self, container_id: str) -> None:
        """Stop following what a container has had."""
        for copy in [one for one in self._copies.values() if one.container_id == container_id]:
            del self._copies[copy.name]
            if self._watch is not None:
                self._watch.forget(copy.name)

    async def follow(self, agent: AgentClient) -> None:
        """Copy what changes on the host, until cancelled or closed."""
        if self._watch is None:
            self._watch = FileWatch()
        watch = self._watch
        with contextlib.suppress(trio.ClosedResourceError):
            while not watch.is_closed:
                for name in await watch.changed():
                    if (copy := self._copies.get(name)) is not None:
                        await self._update(copy, agent)
                await trio.sleep(_PACE_S)

    async def _update(self, copy: Copy, agent: AgentClient) -> None:
        try:
            self._add_watches(copy, read_tree(copy.source, copy.what))
            await _send_changes(copy, agent)
        except (ShimError, OSError, AgentError) as error:
            if self._watch is not None:  # else all of it is over
                self._log.warning("copy not updated", mount=copy.what, error=str(error))

    def close(self) -> None:
        """Idempotent."""
        self._copies.clear()
        if self._watch is not None:
            self._watch.close()
            self._watch = None

    def _add_watches(self, copy: Copy, entries: list[Entry]) -> None:
        for entry in entries if self._watch is not None else ():
            if entry.is_directory or not entry.path:
                assert self._watch is not None
                path = copy.source / entry.path if entry.path else copy.source
                self._watch.add(str(path), copy.name)


async def _send_changes(copy: Copy, agent: AgentClient) -> None:
    for entry in read_tree(copy.source, copy.what):
        before = copy.sent.get(entry.path)
        if before is not None and _is_same(before, entry):
            continue
        if await _send_entry(copy, entry, agent):
            copy.sent[entry.path] = entry


def _is_same(before: Entry, now: Entry) -> bool:
    if now.is_directory:  # its time changes with what is in it
        return (before.mode, before.uid, before.gid) == (now.mode, now.uid, now.gid)
    if now.is_link:
        return before.link == now.link and before.is_link
    return before == now


async def _send_entry(copy: Copy, entry: Entry, agent: AgentClient) -> bool:
    """Send one entry; False if it is gone by now."""
    request = agent_pb2.CopyFileRequest(
        path=str(copy.target / entry.path) if entry.path else str(copy.target),
        file_mode=entry.mode,
        dir_mode=_DIRECTORY_MODE,
        uid=entry.uid,
        gid=entry.gid,
        file_size=entry.size,
    )
    if entry.is_link:
        request.data = entry.link
        request.file_size = len(entry.link)
    if entry.is_directory or entry.is_link:
        await agent.copy_file(request)
        return True
    try:
        descriptor = open_entry(copy.source, entry)
    except OSError:
        return False
    try:
        size = os.fstat(descriptor).st_size
        if not stat.S_ISREG(os.fstat(descriptor).st_mode) or size > MAX_BYTES:
            return False  # it has changed again, of which there is an event
        request.file_size = size
        await _send_content(descriptor, request, agent)
    finally:
        os.close(descriptor)
    return True


async def _send_content(
    descriptor: int, request: agent_pb2.CopyFileRequest, agent: AgentClient
) -> None:
    while True:
        request.data = os.pread(descriptor, _PIECE_BYTES, request.offset)
        if not request.data and request.file_size:
            # It was cut short meanwhile: what is there is all of it. The next event mends it.
            return
        await agent.copy_file(request)
        request.offset += len(request.data)
        if request.offset >= request.file_size:
            return
