"""Reads and writes the small files of a cgroup. A file that is missing reads as nothing."""

from __future__ import annotations

import os

UNLIMITED = (1 << 64) - 1


def read(path: str) -> str:
    """Return a file's text; "" if it can't be read."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        parts = []
        while part := os.read(descriptor, 1 << 16):
            parts.append(part)
        return b"".join(parts).decode("utf-8", "replace")
    except OSError:
        return ""
    finally:
        os.close(descriptor)


def write(path: str, text: str) -> None:
    """Write in one call, as the kernel wants it. Raises OSError."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, text.encode("ascii"))
    finally:
        os.close(descriptor)


def numbers(text: str) -> dict[str, int]:
    """Read `key number` lines."""
    found = {}
    for line in text.splitlines():
        key, _, number = line.partition(" ")
        if number.isdigit():
            found[key] = int(number)
    return found


def value(path: str) -> int:
    """Read a file with one number; "max" is `UNLIMITED`, nothing is 0."""
    text = read(path).strip()
    if text == "max":
        return UNLIMITED
    return int(text) if text.isdigit() else 0
