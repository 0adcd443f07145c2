"""One pod's network, from the look into its namespace to the last trace of us.

    open ──> attached: taps there, VMM can start ──> wire (while the guest boots) ──> aclose
                        └── wait_changed ──> rescan: more of them ──> wire ──┘

`open` takes milliseconds: one child process reads the namespace and makes the taps. `wire` joins
them to the pod's links in another child, which loads pyroute2 and may take its time beside the
guest's boot. What has to be undone is told to `record` before it is done.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple

import trio

from netns.errors import KernelRefused, NamespaceGone, NetnsError, UnsupportedLink
from netns.inside import MAX_FDS, Outcome, WorkFailed, run_inside, run_inside_blocking
from netns.loopback import Steering, steer
from netns.model import Endpoint, Layout, RateLimits, Scan, Statistics, Wiring
from netns.namespace import Namespace
from netns.plan import (
    Attachment,
    DeleteTap,
    Operation,
    attachments,
    from_record,
    is_ours,
    to_record,
    undo,
    wire,
)
from netns.revert import revert
from netns.scan import layout, parse, read, statistics_of
from netns.tap import join_tap, open_tap
from netns.watch import open_watch, wait_changed

# Bounds for a hang only: an overloaded or emulated host takes seconds for either.
OPEN_S: Final = 15.0
WIRE_S: Final = 30.0
UNDO_S: Final = 5.0
_E2BIG: Final = 7
_UNDOING: Final = "undo the network"


class UndoRecord(NamedTuple):
    """What a journal must keep to undo a pod's wiring, also from another process.

    `device` and `inode` say which namespace `path` led to; `steps` are JSON.
    """

    path: str
    device: int
    inode: int
    steps: str


Recorder = Callable[[UndoRecord], None]


class Attached(NamedTuple):
    """An endpoint with the descriptors of its tap, one a queue: for the virtual machine."""

    attachment: Attachment
    fds: tuple[int, ...] = ()


class PodNetwork:
    """The network of one pod. Used by one task at a time; `aclose` must be called in the end."""

    def __init__(
        self,
        namespace: Namespace,
        record: Recorder,
        *,
        wiring: Wiring = Wiring.TC_FILTER,
        queues: int = 1,
        limits: RateLimits | None = None,
    ) -> None:
        self.attached: tuple[Attached, ...] = ()
        self.layout = Layout()
        self._namespace = namespace
        self._record = record
        self._wiring = wiring
        self._queues = queues
        self._limits = limits
        self._done: list[Operation] = []
        self._lent: tuple[DeleteTap, ...] = ()
        self._wired = 0  # so many of `attached` are joined to their endpoint
        self._watch: socket.socket | None = None
        self._counters = -1

    @classmethod
    async def open(
        cls,
        path: Path,
        record: Recorder,
        *,
        wiring: Wiring = Wiring.TC_FILTER,
        queues: int = 1,
        limits: RateLimits | None = None,
        lends_taps: bool = False,
    ) -> PodNetwork:
        """Look into the namespace at `path` and make a tap for each of its interfaces.

        None of that outlives the taps' descriptors, except for macvtaps, which are recorded first,
        and taps that the caller may make to stay (`lends_taps`), which are recorded as well.
        Cancelling leaves nothing that was not recorded.

        Raises:
            HostNamespace, NamespaceGone: the path is not a pod's.
            UnsupportedLink: an interface can't be given to a virtual machine.
            KernelRefused, HelperLost: the kernel or the helper failed.
        """
        namespace = Namespace.open(path)
        network = cls(namespace, record, wiring=wiring, queues=queues, limits=limits)
        try:
            await network._look(is_first=True)
            if lends_taps:
                network._record_taps()
        except BaseException:
            with trio.CancelScope(shield=True):  # bounded by UNDO_S
                await network.aclose()
            raise
        return network

    @property
    def namespace_fd(self) -> int:
        """The namespace's descriptor, open until `aclose`."""
        return self._namespace.fd

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences on what of the pod's network the guest does not get."""
        return self.layout.notes

    async def wire(self) -> None:
        """Join the taps to the pod's links: from then on packets flow. Again after `rescan`.

        When it fails or is cancelled nothing of this call is left after `aclose`.

        Raises:
            KernelRefused, HelperLost, NamespaceGone: as `open`.
        """
        fresh = [each.attachment for each in self.attached[self._wired :]]
        if self._wiring is not Wiring.MACVTAP:
            await self._carry_out(wire(fresh, self._wiring, self._limits))
        self._wired = len(self.attached)

    async def wait_changed(self) -> None:
        """Return when the pod's network has changed; `rescan` tells how. Safe to cancel."""
        assert self._watch is not None
        await wait_changed(self._watch)

    async def rescan(self) -> tuple[Attached, ...]:
        """Look again; return the interfaces that are new, with taps of their own.

        `layout` is the whole network then: addresses and routes of old ones may have changed too.

        Raises:
            as `open`; what is attached already is untouched.
        """
        known = {each.attachment.endpoint.ifindex for each in self.attached}
        await self._look(is_first=False)
        return tuple(
            each for each in self.attached if each.attachment.endpoint.ifindex not in known
        )

    def drop_gone(self) -> tuple[Endpoint, ...]:
        """Forget the interfaces that have left the namespace; return them.

        What was done to them has left with them.
        """
        here = {endpoint.ifindex for endpoint in self.layout.endpoints}
        gone = [each for each in self.attached if each.attachment.endpoint.ifindex not in here]
        for each in gone:
            for fd in each.fds:
                os.close(fd)
        if gone:
            self._wired -= sum(each in gone for each in self.attached[: self._wired])
            self.attached = tuple(each for each in self.attached if each not in gone)
        return tuple(each.attachment.endpoint for each in gone)

    @property
    def waiting(self) -> tuple[Attached, ...]:
        """Those that are wired, and whose tap is still ours: no machine has them yet."""
        return tuple(each for each in self.attached[: self._wired] if each.fds)

    async def steer_loopback(self) -> Steering:
        """Take the connections to the namespace's loopback, as `netns.loopback.steer`."""
        return await steer(self._namespace.fd)

    def statistics(self) -> tuple[Statistics, ...]:
        """Count what went through each endpoint. Reads one file; takes no lock of the network's."""
        if self._counters < 0:
            return ()
        parts = bytearray()
        while part := os.pread(self._counters, 64 << 10, len(parts)):
            parts += part
        names = [endpoint.name for endpoint in self.layout.endpoints]
        return statistics_of(parts.decode(errors="replace"), names)

    def close_taps(self, only: Attached | None = None) -> None:
        """Close our copies of the taps' descriptors; those of a running VMM go on."""
        closed = self.attached if only is None else (only,)
        for each in closed:
            for fd in each.fds:
                os.close(fd)
        self.attached = tuple(
            Attached(each.attachment) if each in closed else each for each in self.attached
        )

    async def aclose(self) -> list[str]:
        """Undo the wiring and let go of the namespace; return what could not be undone.

        Idempotent. The record stays needed for as long as there are problems.
        """
        problems: list[str] = []
        steps = self._way_back()
        if steps and self._namespace.fd >= 0:
            try:
                work = partial(_revert, steps)
                await run_inside(self._namespace.fd, _UNDOING, work, timeout_s=UNDO_S)
                self._done.clear()
                self._lent = ()
            except NetnsError as error:
                problems.append(str(error))
        self.close_taps()
        if self._watch is not None:
            self._watch.close()
            self._watch = None
        if self._counters >= 0:
            os.close(self._counters)
            self._counters = -1
        self._namespace.close()
        return problems

    async def _look(self, *, is_first: bool) -> None:
        known = frozenset(each.attachment.endpoint.ifindex for each in self.attached)
        makes_taps = self._wiring is Wiring.TC_FILTER
        work = partial(_look, self._queues, known, makes_taps=makes_taps, is_first=is_first)
        name = f"look into {self._namespace.path}"
        outcome = await run_inside(self._namespace.fd, name, work, timeout_s=OPEN_S)
        fds = list(outcome.fds)
        if is_first:
            self._watch, self._counters = socket.socket(fileno=fds.pop(0)), fds.pop(0)
        scan = parse(outcome.payload)
        found = _layout(scan, is_first=is_first)
        joined = attachments(found, self._wiring, _names(scan), known=known)
        if self._wiring is Wiring.MACVTAP:
            fds = await self._make_macvtaps(joined)
        self.layout = found
        self.attached += tuple(
            Attached(each, tuple(fds[start : start + count]))
            for each, start, count in _shares(joined, self._queues)
        )

    async def _make_macvtaps(self, joined: tuple[Attachment, ...]) -> list[int]:
        operations = wire(joined, self._wiring, self._limits)
        opening = partial(_apply_and_open, operations, joined, self._queues)
        return list((await self._carry_out(operations, opening)).fds)

    async def _carry_out(
        self, operations: tuple[Operation, ...], work: Callable[[], Outcome] | None = None
    ) -> Outcome:
        if not operations and work is None:
            return Outcome()
        # All of it before any of it: a helper that is killed does not say how far it came.
        self._done += operations
        self._record_way_back()
        name = f"wire the network of {self._namespace.path}"
        work = work or partial(_apply, operations)
        try:
            return await run_inside(self._namespace.fd, name, work, timeout_s=WIRE_S)
        except KernelRefused as error:
            # Undone already, but for what the detail tells; undoing twice might hit what the
            # refused step found in its way.
            if not error.detail:
                del self._done[-len(operations) :]
            raise

    def _record_taps(self) -> None:
        """Record the taps that we have made, and that may stay for a while without us."""
        made = (each.attachment for each in self.attached if each.fds)
        self._lent = tuple(DeleteTap(each.device) for each in made if each.endpoint.tap is None)
        if self._lent:
            self._record_way_back()

    def _way_back(self) -> tuple[Operation, ...]:
        return (*undo(self._done), *self._lent)

    def _record_way_back(self) -> None:
        namespace = self._namespace
        self._record(UndoRecord(
            path=os.fspath(namespace.path), device=namespace.device, inode=namespace.inode,
            steps=json.dumps(to_record(self._way_back()), separators=(",", ":")),
        ))  # fmt: skip


def undo_recorded(fields: Mapping[str, str | int]) -> str | None:
    """Undo what an UndoRecord describes; return None when it is undone or its namespace is gone.

    Blocks, for at most `UNDO_S`. May be run any number of times.
    """
    try:
        with _recorded(fields) as step:
            if step is not None:
                run_inside_blocking(step.namespace_fd, _UNDOING, step.work, timeout_s=UNDO_S)
    except NetnsError as error:
        return str(error)
    return None


async def undo_recorded_live(fields: Mapping[str, str | int]) -> str | None:
    """Do as `undo_recorded`, for an event loop. Safe to cancel."""
    try:
        with _recorded(fields) as step:
            if step is not None:
                await run_inside(step.namespace_fd, _UNDOING, step.work, timeout_s=UNDO_S)
    except NetnsError as error:
        return str(error)
    return None


class _Undoing(NamedTuple):
    """What is to be done to undo a record, and where."""

    namespace_fd: int
    work: Callable[[], Outcome]


@contextmanager
def _recorded(fields: Mapping[str, str | int]) -> Iterator[_Undoing | None]:
    """Give what undoes an UndoRecord; None when its namespace is gone. Raises NetnsError."""
    try:
        namespace = Namespace.open(Path(str(fields["path"])))
    except NamespaceGone:
        yield None
        return
    try:
        if (namespace.device, namespace.inode) != (fields["device"], fields["inode"]):
            yield None  # another one by the same name
        else:
            steps = from_record(json.loads(str(fields["steps"])))
            yield _Undoing(namespace.fd, partial(_revert, steps))
    finally:
        namespace.close()


# --- What runs inside of the namespace ---


def _look(queues: int, known: frozenset[int], *, makes_taps: bool, is_first: bool) -> Outcome:
    """Read the namespace and make its taps. The parent draws the same conclusions."""
    dumps = read()
    fds = [open_watch().detach(), _open_counters()] if is_first else []
    scan = parse(dumps)
    try:
        found = _layout(scan, is_first=is_first)
    except UnsupportedLink:
        return Outcome(dumps, fds)  # the parent raises it again
    joined = attachments(found, Wiring.TC_FILTER, _names(scan), known=known) if makes_taps else ()
    if sum(count for _, _, count in _shares(joined, queues)) + len(fds) > MAX_FDS:
        text = f"{len(joined)} interfaces with {queues} queues each"
        raise WorkFailed("make taps", _E2BIG, text)
    for each in joined:
        endpoint = each.endpoint
        if endpoint.tap is None:
            fds += open_tap(each.device, queues, endpoint.mtu, quiet=True)
        else:
            fds += join_tap(each.device, endpoint.tap, queues)
    return Outcome(dumps, fds)


def _open_counters() -> int:
    return os.open("/proc/self/net/dev", os.O_RDONLY | os.O_CLOEXEC)


def _apply(operations: tuple[Operation, ...]) -> Outcome:
    from netns.apply import apply

    apply(operations)
    return Outcome()


def _apply_and_open(
    operations: tuple[Operation, ...], joined: tuple[Attachment, ...], queues: int
) -> Outcome:
    from netns.macvtap import enter_own_mounts, open_macvtap

    _apply(operations)
    fds: list[int] = []
    try:
        enter_own_mounts()
        for each in joined:
            if each.endpoint.tap is None:
                fds += open_macvtap(each.device, queues)
            else:
                fds += join_tap(each.device, each.endpoint.tap, queues)
    except BaseException:
        revert(undo(operations))
        raise
    return Outcome(fds=fds)


def _revert(steps: tuple[Operation, ...]) -> Outcome:
    revert(steps)
    return Outcome()


def _shares(joined: tuple[Attachment, ...], queues: int) -> list[tuple[Attachment, int, int]]:
    """Tell which descriptors of a list are whose: attachment, first, how many."""
    shares, start = [], 0
    for each in joined:
        tap = each.endpoint.tap
        count = queues if tap is None or tap.is_multi_queue else 1
        shares.append((each, start, count))
        start += count
    return shares


def _layout(scan: Scan, *, is_first: bool) -> Layout:
    """As `scan.layout`; at the first look nobody else's virtual machine may be in the namespace.

    Raises:
        UnsupportedLink: a link that no machine can have, or that another one has.
    """
    ours = _our_links(scan)
    found = layout(scan, without=ours)
    taken = [endpoint.name for endpoint in found.endpoints if endpoint.has_ingress]
    if is_first and ours and taken:
        raise UnsupportedLink(
            taken[0],
            "another one has it; containers share a network only in one pod, so give this one a "
            "network of its own",
        )
    return found


def _our_links(scan: Scan) -> frozenset[str]:
    return frozenset(link.name for link in scan.links if is_ours(link.name))


def _names(scan: Scan) -> list[str]:
    return [link.name for link in scan.links]
