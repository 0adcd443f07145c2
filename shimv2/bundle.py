"""Reads a container's bundle: config.json checked as far as the shim depends on it.

Knows the OCI runtime specification's shape and the annotations by which CRI groups containers
into sandboxes. Does not know what the guest makes of the spec (`guest_spec`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Final

from shimv2 import bootstrap
from shimv2.bootstrap import kind_of
from shimv2.errors import FailedPrecondition, InvalidArgument, NotFound
from shimv2.naming import is_valid_id

JsonObject = dict[str, Any]

_MAX_CONFIG_BYTES: Final = 16 << 20


class ContainerKind(Enum):
    """What a container is to the VM it runs in."""

    SINGLE = "single"  # has a VM of its own, which ends with it
    SANDBOX = "sandbox"  # the pod's first: its VM is the pod's, and ends with it
    MEMBER = "member"  # joins the VM of its pod or group


_KINDS: Final = {
    bootstrap.SINGLE: ContainerKind.SINGLE,
    bootstrap.SANDBOX: ContainerKind.SANDBOX,
    bootstrap.CONTAINER: ContainerKind.MEMBER,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """A container's config.json and where it lies."""

    container_id: str
    path: Path
    spec: JsonObject
    kind: ContainerKind
    sandbox_id: str

    @property
    def annotations(self) -> dict[str, str]:
        found = self.spec.get("annotations")
        return found if isinstance(found, dict) else {}

    @property
    def process(self) -> JsonObject:
        process: JsonObject = self.spec["process"]
        return process


def check_id(value: str, what: str) -> str:
    """Return a valid id.

    Raises:
        InvalidArgument: naming the id, the rule and the limit.
    """
    if not is_valid_id(value):
        raise InvalidArgument(
            f"{what} id {value[:100]!r} is not valid: use at most 76 letters and digits, "
            "in groups separated by one of '_', '.', '-'"
        )
    return value


def read_bundle(path: Path, container_id: str) -> Bundle:
    """Read and check `<path>/config.json`.

    Raises:
        ShimError: NotFound without a config.json, InvalidArgument for one that can't be used.
    """
    spec = _parse(path / "config.json")
    _check_shape(spec, path / "config.json")
    annotations = spec.get("annotations") or {}
    kind, sandbox_id = _grouping(annotations, container_id)
    return Bundle(
        container_id=container_id,
        path=path,
        spec=spec,
        kind=kind,
        sandbox_id=sandbox_id,
    )


def parse_json_object(text: bytes | str, what: str) -> JsonObject:
    """Parse a JSON object that a client sent.

    Raises:
        InvalidArgument: naming `what` and the place of the mistake.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise _invalid(f"{what} is not valid JSON: {exc}") from exc
    if not isinstance(value, dict):
        raise _invalid(f"{what} is a JSON {type(value).__name__}, not an object")
    return value


def _parse(config: Path) -> JsonObject:
    try:
        with config.open("rb") as file:
            text = file.read(_MAX_CONFIG_BYTES + 1)
    except FileNotFoundError as exc:
        raise NotFound(f"bundle has no {config}") from exc
    except OSError as exc:
        raise FailedPrecondition(f"cannot read {config}: {exc.strerror}") from exc
    if len(text) > _MAX_CONFIG_BYTES:
        raise _invalid(f"{config} is longer than {_MAX_CONFIG_BYTES} bytes")
    return parse_json_object(text, str(config))


def _check_shape(spec: JsonObject, config: Path) -> None:
    process = spec.get("process")
    if not isinstance(process, dict):
        raise _invalid(f"{config}: 'process' is missing; there is nothing to run")
    check_process(process, f"{config}: process")
    root = spec.get("root")
    if not isinstance(root, dict) or not isinstance(root.get("path"), str) or not root["path"]:
        raise _invalid(f"{config}: 'root.path' is missing")
    linux = spec.get("linux")
    if linux is not None and not isinstance(linux, dict):
        raise _invalid(f"{config}: 'linux' is not an object")
    mounts = spec.get("mounts")
    if mounts is not None:
        if not isinstance(mounts, list):
            raise _invalid(f"{config}: 'mounts' is not a list")
        for index, mount in enumerate(mounts):
            if not isinstance(mount, dict) or not str(mount.get("destination", "")).startswith("/"):
                raise _invalid(f"{config}: mounts[{index}].destination is not an absolute path")
    annotations = spec.get("annotations")
    if annotations is not None and not isinstance(annotations, dict):
        raise _invalid(f"{config}: 'annotations' is not an object")


def check_process(process: JsonObject, what: str) -> None:
    """Check the parts of an OCI process that every process needs.

    Raises:
        InvalidArgument: naming the field.
    """
    args = process.get("args")
    if not isinstance(args, list) or not args or not all(isinstance(a, str) for a in args):
        raise _invalid(f"{what}: 'args' must be a list of at least one string")
    cwd = process.get("cwd")
    if not isinstance(cwd, str) or not cwd.startswith("/"):
        raise _invalid(f"{what}: 'cwd' {cwd!r} is not an absolute path")


def _grouping(annotations: JsonObject, container_id: str) -> tuple[ContainerKind, str]:
    found, sandbox_id = kind_of(annotations)
    kind = _KINDS[found]
    if kind is ContainerKind.SINGLE:
        return kind, container_id
    return kind, sandbox_id or container_id


def _invalid(text: str) -> InvalidArgument:
    return InvalidArgument(text)
