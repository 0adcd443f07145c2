"""`sandbox_bind_mounts`: files and directories that the operator puts into every guest. Pure.

The guest finds them at `sandbox-mounts/<name>` in the share, for its agent and for what an image
brings; containers don't see them by themselves. Source: Kata docs, configuration.toml.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Final

from shimv2.errors import InvalidArgument
from shimv2.guest_spec import SHARED_DIRECTORY, SharedMount

if TYPE_CHECKING:
    from collections.abc import Sequence

DIRECTORY: Final = "sandbox-mounts"  # Source: Kata virtcontainers/fs_share_linux.go


def plan_sandbox_mounts(values: Sequence[str]) -> list[SharedMount]:
    """Understand `/path`, `/path:ro` and `/path:rw`; read-only where nothing is said.

    Raises:
        InvalidArgument: a path that is not absolute, or two of the same name.
    """
    planned: dict[PurePosixPath, SharedMount] = {}
    for index, value in enumerate(values):
        path, separator, mode = value.rpartition(":")
        if not separator or mode not in ("ro", "rw"):
            path, mode = value, "ro"
        source = Path(path)
        if not source.is_absolute() or not source.name or source.name == "..":
            raise InvalidArgument(
                f"sandbox_bind_mounts: {value!r} is no absolute path of a file or directory, with "
                "':ro' or ':rw' after it or nothing"
            )
        destination = SHARED_DIRECTORY / DIRECTORY / source.name
        if destination in planned:
            raise InvalidArgument(
                f"sandbox_bind_mounts: {value!r} and {str(planned[destination].source)!r} would "
                "have the same name in the guest; rename one"
            )
        planned[destination] = SharedMount(
            index=index,
            source=source,
            destination=destination,
            read_only=mode == "ro",
            is_recursive=True,
            follows_host=False,
        )
    return list(planned.values())
