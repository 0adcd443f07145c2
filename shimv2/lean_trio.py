"""Imports trio without what the shim never uses of it: TLS, DTLS, host names, threads' names.

trio loads `ssl`, and for DTLS `hmac` and OpenSSL's hashes; `idna` for host names; and for the names
of threads `ctypes.util`, by which it starts a process (`ldconfig -p`). Stand-ins take their places
while trio is imported. Should some trio want more of them than they have, it is imported as it is.
"""

from __future__ import annotations

import ctypes
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import ModuleType

_DTLS_NAMES = ("DTLSChannel", "DTLSChannelStatistics", "DTLSEndpoint")
_UNUSED = ("ssl", "trio._dtls", "idna", "ctypes.util")


def load() -> None:
    """Import trio; harmless when it is imported already."""
    if "trio" in sys.modules:
        return
    planted = {name: _stand_in(name) for name in _UNUSED if name not in sys.modules}
    for name in _DTLS_NAMES:
        setattr(planted["trio._dtls"], name, type(name, (_Absent,), {}))
    sys.modules.update(planted)
    util = planted.get("ctypes.util")
    if util is not None:
        util.find_library = _find_no_library  # type: ignore[attr-defined]
        ctypes.util = util  # type: ignore[attr-defined,assignment,unused-ignore]
    try:
        import trio
    except (ImportError, AttributeError, TypeError, NotImplementedError):
        _forget(planted)
        for name in [one for one in sys.modules if one.partition(".")[0] == "trio"]:
            del sys.modules[name]
        import trio  # noqa: F401
    finally:
        _forget(planted)  # whoever wants the real ones later gets them


class _Absent:
    """What a name of a stand-in stands for. Fit for annotations and base classes only."""

    def __init__(self, *_: object, **__: object) -> None:
        raise NotImplementedError("this process does without a part of trio (shimv2/lean_trio.py)")


def _find_no_library(name: str) -> None:
    """Do as `ctypes.util.find_library` where there is none: threads go without names."""


def _stand_in(name: str) -> ModuleType:
    module = type(sys)(name)
    # Source: PEP 562. Each name that trio asks for is one more empty class.
    module.__getattr__ = _absent  # type: ignore[method-assign,unused-ignore]
    return module


def _absent(name: str) -> type[_Absent]:
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (_Absent, Exception), {})


def _forget(planted: dict[str, ModuleType]) -> None:
    for name, module in planted.items():
        if sys.modules.get(name) is module:
            del sys.modules[name]
        parent, _, last = name.rpartition(".")
        if getattr(sys.modules.get(parent), last, None) is module:
            delattr(sys.modules[parent], last)
