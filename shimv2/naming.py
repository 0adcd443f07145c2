"""Names that follow from a command line alone: the digest of a sandbox, its socket, valid ids.

Imported by `start`, so: no imports but built-in ones.
"""

from __future__ import annotations

try:
    from _sha256 import sha256  # type: ignore[import-not-found,unused-ignore]  # built into CPython
except ImportError:  # Python 3.12 joined the two modules
    from _sha2 import sha256  # type: ignore[import-not-found,unused-ignore,no-redef]

DEFAULT_SOCKET_DIR = "/run/containerd/s"
_WORD = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789")
_MAX_ID = 76


def sandbox_digest(containerd_address: str, namespace: str, sandbox_id: str) -> str:
    """Hash what identifies a sandbox on this machine, to 64 hexadecimal digits.

    Source: containerd pkg/shim/util_unix.go SocketAddress: SHA-256 of the joined, cleaned path.
    """
    joined = clean_path("/".join((containerd_address, namespace, sandbox_id)))
    digest: str = sha256(joined.encode("utf-8", "surrogateescape")).hexdigest()
    return digest


def socket_path(digest: str, directory: str = DEFAULT_SOCKET_DIR) -> str:
    return f"{directory.rstrip('/')}/{digest}"


def clean_path(path: str) -> str:
    """Shorten `path` as Go's filepath.Clean does: no empty, `.` or inner `..` parts."""
    rooted = path.startswith("/")
    parts: list[str] = []
    for part in path.split("/"):
        if part in ("", "."):
            continue
        if part != "..":
            parts.append(part)
        elif parts and parts[-1] != "..":
            parts.pop()
        elif not rooted:
            parts.append(part)
    shortened = "/".join(parts)
    return "/" + shortened if rooted else shortened or "."


def is_valid_id(text: str) -> bool:
    """Say whether `text` is an id that containerd itself would have accepted.

    Source: containerd pkg/identifiers Validate: at most 76 characters, words of [A-Za-z0-9]
    joined by single `_`, `.` or `-`. Such an id is safe as a file name.
    """
    if not 0 < len(text) <= _MAX_ID:
        return False
    was_word = False
    for character in text:
        if character in _WORD:
            was_word = True
        elif character in "_.-" and was_word:
            was_word = False
        else:
            return False
    return was_word
