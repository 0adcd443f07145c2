"""OCI hooks of a container: what config.json says, what each is told, how its failure reads. Pure.

Where they run, in the order of a container's life (Source: OCI runtime-spec config.md
"POSIX-platform Hooks"; where Kata runs them):

    prestart, createRuntime   on the host, when the pod's network namespace is there and before the
                              VM's network is made of it; `pid` is a process in that namespace
    createContainer           on the host, in the pod's network namespace, when the VM is up
    startContainer            in the guest, by the agent
    poststart                 on the host; a failure is logged
    poststop                  on the host, at Delete; a failure is logged
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from shimv2.errors import FailedPrecondition, InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from shimv2.bundle import Bundle, JsonObject

PRESTART: Final = "prestart"
CREATE_RUNTIME: Final = "createRuntime"
CREATE_CONTAINER: Final = "createContainer"
START_CONTAINER: Final = "startContainer"
POSTSTART: Final = "poststart"
POSTSTOP: Final = "poststop"
_STAGES: Final = (
    PRESTART, CREATE_RUNTIME, CREATE_CONTAINER, START_CONTAINER, POSTSTART, POSTSTOP,
)  # fmt: skip
_MAX_HOOKS: Final = 64
_MAX_TIMEOUT_S: Final = 86400
_SAID_CHARACTERS: Final = 1000


class Hook(NamedTuple):
    """One hook. `timeout_s` is None where the spec gives no bound."""

    stage: str
    number: int
    path: str
    args: tuple[str, ...]
    env: tuple[str, ...]
    timeout_s: int | None

    @property
    def argv(self) -> tuple[str, ...]:
        return self.args or (self.path,)

    @property
    def environment(self) -> dict[str, str]:
        """The whole environment: a hook inherits nothing."""
        pairs = (entry.partition("=") for entry in self.env)
        return {name: value for name, _, value in pairs if name}

    def __str__(self) -> str:
        return f"hook {self.stage}[{self.number}] {self.path}"


Hooks = dict[str, tuple[Hook, ...]]


class HookFailed(FailedPrecondition):
    """A hook of the creation did not succeed; the container is not created."""


def has_hooks(spec: JsonObject) -> bool:
    """Whether there is anything for this module. Cheap: asked for every container."""
    return bool(spec.get("hooks"))


def parse_hooks(spec: JsonObject) -> Hooks:
    """Read and check `hooks`; every stage is in the result.

    Raises:
        InvalidArgument: naming the field.
    """
    found = spec.get("hooks") or {}
    if not isinstance(found, dict):
        raise InvalidArgument("config.json: 'hooks' is not an object")
    return {stage: _stage(stage, found.get(stage)) for stage in _STAGES}


def _stage(stage: str, value: object) -> tuple[Hook, ...]:
    where = f"config.json: hooks.{stage}"
    if value is None:
        return ()
    if not isinstance(value, list):
        raise InvalidArgument(f"{where} is not a list")
    if len(value) > _MAX_HOOKS:
        raise InvalidArgument(f"{where} has {len(value)} hooks; at most {_MAX_HOOKS} are run")
    return tuple(_hook(stage, number, item, where) for number, item in enumerate(value))


def _hook(stage: str, number: int, item: object, where: str) -> Hook:
    where = f"{where}[{number}]"
    if not isinstance(item, dict):
        raise InvalidArgument(f"{where} is not an object")
    path = item.get("path")
    if not isinstance(path, str) or not path.startswith("/"):
        raise InvalidArgument(f"{where}.path {path!r} is not an absolute path")
    timeout = item.get("timeout")
    # bool is an int of Python's.
    is_count = isinstance(timeout, int) and not isinstance(timeout, bool)
    if timeout is not None and not (is_count and 0 < timeout <= _MAX_TIMEOUT_S):
        raise InvalidArgument(
            f"{where}.timeout {timeout!r} is not a number of seconds from 1 to {_MAX_TIMEOUT_S}"
        )
    args, env = _strings(item, "args", where), _strings(item, "env", where)
    return Hook(stage, number, path, args, env, timeout)


def _strings(item: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
    value = item.get(key) or []
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise InvalidArgument(f"{where}.{key} is not a list of strings")
    if any("\0" in each for each in value):
        raise InvalidArgument(f"{where}.{key} has a string with a NUL in it")
    return tuple(value)


def state_json(bundle: Bundle, status: str, pid: int) -> bytes:
    """What a hook reads on stdin. A stopped container has no pid.

    Source: OCI runtime-spec runtime.md "State".
    """
    state: dict[str, Any] = {
        "ociVersion": str(bundle.spec.get("ociVersion") or "1.0.2"),
        "id": bundle.container_id,
        "status": status,
    }
    if pid:
        state["pid"] = pid
    state |= {"bundle": os.fspath(bundle.path), "annotations": dict(bundle.annotations)}
    return json.dumps(state).encode()


def failure_text(hook: Hook, container_id: str, how: str, said: Sequence[str]) -> str:
    """How a failed hook is told: which, of what, how, and its last words."""
    words = " | ".join(line.strip() for line in said)[-_SAID_CHARACTERS:]
    return f"{hook} of container {container_id} {how}: {words or 'it said nothing'}"


def to_record(hooks: Sequence[Hook], bundle: Bundle) -> str:
    """What a process that knows nothing else needs to run these hooks when all is over."""
    return json.dumps({
        "container": bundle.container_id,
        "bundle": os.fspath(bundle.path),
        "state": state_json(bundle, "stopped", 0).decode(),
        "hooks": [hook._asdict() for hook in hooks],
    })  # fmt: skip


class Record(NamedTuple):
    """What `to_record` wrote."""

    container: str
    bundle: str
    state: bytes
    hooks: tuple[Hook, ...]


def from_record(text: str) -> Record:
    """Read a record.

    Raises:
        ValueError, KeyError, TypeError: it is something else.
    """
    found = json.loads(text)
    hooks = tuple(
        Hook(**{**each, "args": tuple(each["args"]), "env": tuple(each["env"])})
        for each in found["hooks"]
    )
    return Record(found["container"], found["bundle"], found["state"].encode(), hooks)
