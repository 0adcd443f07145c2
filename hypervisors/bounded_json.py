"""JSON from a VMM that its guest may have taken over: size and nesting are bounded. Pure."""

from __future__ import annotations

import json
import re
from typing import Final, NoReturn, TypeAlias

JsonValue: TypeAlias = "bool | int | float | str | list[JsonValue] | dict[str, JsonValue] | None"

# QEMU's query-qmp-schema nests 5 deep, Cloud Hypervisor's vm.info 6.
MAX_DEPTH: Final = 32
_TOKEN: Final = re.compile(rb'"(?:[^"\\]|\\.)*"|[\[\]{}]')


def parse_json(data: bytes) -> JsonValue:
    """Decode one value. The caller has bounded the length.

    Raises:
        ValueError: not JSON, or nested deeper than `MAX_DEPTH`; the text says which.
    """
    if data.count(b"[") + data.count(b"{") > MAX_DEPTH and _depth(data) > MAX_DEPTH:
        raise ValueError(f"nested deeper than {MAX_DEPTH}")
    try:
        value: JsonValue = json.loads(data, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError("not JSON") from error
    return value


def _depth(data: bytes) -> int:
    """Deepest nesting of brackets outside strings, before the parser recurses over them."""
    depth = deepest = 0
    for token in _TOKEN.finditer(data):
        first = token[0][:1]
        if first in b"[{":
            depth += 1
            deepest = max(deepest, depth)
        elif first in b"]}":
            depth -= 1
    return deepest


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
