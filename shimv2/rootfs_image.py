"""Makes a file system image of a container's root directory, without mounting it.

`mkfs.ext4 -d` copies a tree into a new image: a child process, under the journal, bounded in time
and in the file's size. The image is sparse: it takes what the container's files take, and what the
guest writes later. Its root holds one directory, `rootfs`, so that owner, mode and attributes of
the container's root are kept and ext4's own lost+found stays out of sight.
"""

from __future__ import annotations

import math
import os
import resource
from pathlib import Path
from typing import TYPE_CHECKING, Final

import trio

from hypervisors.child import spawn
from hypervisors.errors import SpawnFailed
from shimv2.errors import DeadlineExceeded, FailedPrecondition, ResourceExhausted

if TYPE_CHECKING:
    from hypervisors.child import Child, ChildRecord
    from shimv2.journal import Entry, Journal

MKFS: Final = Path("/usr/sbin/mkfs.ext4")
ROOTFS: Final = "rootfs"
# A gigabyte of small files takes about ten seconds from a cold disk.
DEADLINE_S: Final = 50.0
_MIB: Final = 1 << 20
# Tables are written when the guest needs them. The host has no use for a journal in an image that
# is thrown away with its container, so the guest gets none.
_OPTIONS: Final = (
    "-q", "-F", "-t", "ext4", "-O", "^has_journal", "-m", "0",
    "-E", "lazy_itable_init=1,nodiscard",
)  # fmt: skip


async def build_image(
    tree: Path, image: Path, size_mib: int, journal: Journal, *, what: str
) -> None:
    """Make `image` with everything below `tree`; `what` it is, for refusals.

    The caller has journalled the file.

    Safe to cancel: the child is killed.

    Raises:
        FailedPrecondition: mkfs.ext4 is missing, or could not read the tree.
        ResourceExhausted: the tree is larger than the image, or the disk is full.
        DeadlineExceeded: it took too long.
    """
    descriptor = os.open(image, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(descriptor, size_mib * _MIB)
    finally:
        os.close(descriptor)
    entries: list[Entry] = []

    def record(child: ChildRecord) -> None:
        entries.append(
            journal.take(
                "process", name=child.name, pid=child.pid, start_time=child.start_time,
            )
        )  # fmt: skip

    argv = [str(MKFS), *_OPTIONS, "-d", str(tree), str(image)]
    limits = {
        resource.RLIMIT_FSIZE: (size_mib * _MIB, size_mib * _MIB),
        resource.RLIMIT_CPU: (math.ceil(DEADLINE_S), math.ceil(DEADLINE_S)),
    }
    try:
        child = await spawn("mkfs.ext4", argv, record=record, rlimits=limits)
        try:
            await _finish(child, what, size_mib)
        finally:
            await child.aclose()
    except SpawnFailed as error:
        raise FailedPrecondition(f"{what}: {error}; install e2fsprogs") from error
    finally:
        for entry in entries:
            journal.release(entry)


async def _finish(child: Child, what: str, size_mib: int) -> None:
    with trio.move_on_after(DEADLINE_S) as limit:
        ending = await child.run()
    if limit.cancelled_caught:
        raise DeadlineExceeded(
            f"{what}: making an image of it took longer than {DEADLINE_S:g} s; use a smaller image "
            "or a snapshotter with block devices (devmapper, blockfile)"
        )
    if ending.code == 0:
        return
    said = " | ".join(child.stderr_tail[-3:]) or str(ending)
    if "allocate" in said or "space" in said or "too small" in said:
        raise ResourceExhausted(
            f"{what} does not fit into an image of {size_mib} MiB, or the disk is full; raise "
            f"rootfs_image_size or make room ({said})"
        )
    raise FailedPrecondition(f"{what}: mkfs.ext4 {ending}: {said}")
