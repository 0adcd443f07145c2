"""Checks a request's body against a VMM's own description of its API, OpenAPI 3 or Swagger 2.

Stricter than JSON schema: a property that the description doesn't know is an error, because a VMM
passes over what it doesn't know.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

VARIABLE = "KATA_TEST_SPECS"
_KINDS = {"string": str, "boolean": bool, "integer": int, "object": dict, "array": list}


def load(name: str) -> dict[str, Any]:
    """The description in file `name` of the directory in KATA_TEST_SPECS; skips without it."""
    directory = os.environ.get(VARIABLE)
    if not directory:
        pytest.skip(f"{VARIABLE} names no directory with {name}")
    yaml = pytest.importorskip("yaml")
    document: dict[str, Any] = yaml.safe_load((Path(directory) / name).read_text())
    return document


def problems(document: dict[str, Any], schema: str, value: object) -> list[str]:
    """What is wrong with `value` as the schema of this name, one text each."""
    return list(_check(document, {"$ref": f"/{schema}"}, value, schema))


def request_schema(document: dict[str, Any], method: str, path: str) -> str | None:
    """The name of the schema of an operation's body; None when it takes none. KeyError: unknown."""
    operation = document["paths"][path][method.lower()]
    if "requestBody" in operation:
        content = operation["requestBody"]["content"]["application/json"]
        name: str = content["schema"]["$ref"].rpartition("/")[2]
        return name
    for parameter in operation.get("parameters", ()):
        if parameter["in"] == "body":
            found: str = parameter["schema"]["$ref"].rpartition("/")[2]
            return found
    return None


def _schemas(document: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = document.get("definitions") or document["components"]["schemas"]
    return found


def _check(
    document: dict[str, Any], schema: dict[str, Any], value: Any, where: str
) -> Iterator[str]:
    if "$ref" in schema:
        schema = _schemas(document)[schema["$ref"].rpartition("/")[2]]
    kind = _KINDS[schema["type"]]
    assert isinstance(kind, type)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        yield f"{where}: {value!r} is no {schema['type']}"
        return
    if "enum" in schema and value not in schema["enum"]:
        yield f"{where}: {value!r} is none of {schema['enum']}"
    if "minimum" in schema and value < schema["minimum"]:
        yield f"{where}: {value} is below {schema['minimum']}"
    if kind is list:
        for index, one in enumerate(value):
            yield from _check(document, schema["items"], one, f"{where}[{index}]")
    if kind is dict and "properties" in schema:
        for name in schema.get("required", ()):
            if name not in value:
                yield f"{where}: {name} is missing"
        for name, one in value.items():
            if name not in schema["properties"]:
                yield f"{where}: {name} is unknown"
            else:
                yield from _check(document, schema["properties"][name], one, f"{where}.{name}")
