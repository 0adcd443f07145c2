"""Imports trio without what the shim never uses of it: TLS and DTLS.

trio loads `ssl`, and for DTLS `hmac` and OpenSSL's hashes: 8 ms of the way to the first answer,
and 2 MiB of every pod's memory. Stand-ins take their places while trio is imported. Should some
trio want more of them than they have, it is imported as it is.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import ModuleType

_DTLS_NAMES = ("DTLSChannel", "DTLSChannelStatistics", "DTLSEndpoint")


def load() -> None:
    """Import trio; harmless when it is imported already."""
    if "trio" in sys.modules:
        return
    planted = {"ssl": _stand_in("ssl"), "trio._dtls": _stand_in("trio._dtls")}
    for name in _DTLS_NAMES:
        setattr(planted["trio._dtls"], name, type(name, (_Absent,), {}))
    planted = {name: module for name, module in planted.items() if name not in sys.modules}
    sys.modules.update(planted)
    try:
        import trio
    except (ImportError, AttributeError, TypeError):
        _forget(planted)
        for name in [one for one in sys.modules if one == "trio" or one.startswith("trio.")]:
            del sys.modules[name]
        import trio  # noqa: F401
    finally:
        _forget(planted)  # whoever wants the real ones later gets them


class _Absent:
    """What a name of `ssl` stands for meanwhile. Fit for annotations and base classes only."""

    def __init__(self, *_: object, **__: object) -> None:
        raise NotImplementedError("this process has no TLS")


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
