"""`-info` and `-v`: what containerd and people ask of the program without starting anything."""

from __future__ import annotations

import posix

from shimv2 import version


def print_version() -> int:
    """Print one line, as Kata's own shims do, so that tools which read it go on working.

    Source: kata src/runtime/cmd/containerd-shim-kata-v2/main.go showVersion.
    """
    text = (
        f'Kata Containers containerd shim (Python): id: "{version.NAME}", '
        f"version: {version.VERSION}, commit: {version.COMMIT}\n"
    )
    posix.write(1, text.encode())
    return 0


def print_runtime_info() -> int:
    """Write a containerd.types.RuntimeInfo; the options on stdin change nothing in it."""
    posix.write(1, runtime_info())
    return 0


def runtime_info() -> bytes:
    """Encode RuntimeInfo{name, version{version, revision}} by hand: two levels of short strings.

    containerd 2.2 runs this once per daemon before the first Create; loading protobuf would cost
    as much as the rest of the program.
    """
    revision = _field(1, version.VERSION.encode()) + _field(2, version.COMMIT.encode())
    return _field(1, version.NAME.encode()) + _field(2, revision)


def _field(number: int, value: bytes) -> bytes:
    if len(value) > 127:
        raise ValueError("longer than one length byte says")
    return bytes((number << 3 | 2, len(value))) + value
