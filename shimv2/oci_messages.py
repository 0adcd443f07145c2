"""Turns objects of config.json into the messages of the agent's oci.proto.

Pure. The messages carry the specification's Go names, config.json its JSON names; they differ
only in the case of letters, so one walk over the descriptor serves every object.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Final, TypeVar

from shimv2.errors import InvalidArgument

M = TypeVar("M")

# The map fields of oci.proto; a descriptor tells a map from a list of messages only through its
# options, which would load protobuf's Python layer.
_MAPS: Final = frozenset({"Sysctl", "Annotations"})
# Fields whose JSON name isn't the message's in another case.
_JSON_NAMES: Final = {"Version": "ociversion"}


def message_from_json(message_class: type[M], value: object, where: str) -> M:
    """Build a message from a parsed JSON object; keys the message lacks are ignored.

    Raises:
        InvalidArgument: naming the path of the value that doesn't fit.
    """
    message = message_class()
    _fill(message, value, where)
    return message


@lru_cache(maxsize=128)
def _fields(descriptor: Any) -> dict[str, Any]:  # noqa: ANN401 - descriptors have no public type
    return {_JSON_NAMES.get(f.name, f.name.lower()): f for f in descriptor.fields}


def _fill(message: Any, value: object, where: str) -> None:  # noqa: ANN401
    if not isinstance(value, dict):
        raise _misfit(where, value, "an object")
    fields = _fields(message.DESCRIPTOR)
    for key, item in value.items():
        field = fields.get(str(key).lower())
        if field is None or item is None:
            continue
        _set(message, field, item, f"{where}.{key}")


def _set(message: Any, field: Any, item: object, where: str) -> None:  # noqa: ANN401
    try:
        if field.name in _MAPS:
            getattr(message, field.name).update(item)
        elif field.is_repeated:
            _extend(getattr(message, field.name), field, item, where)
        elif field.message_type is not None:
            child = getattr(message, field.name)
            child.SetInParent()
            _fill(child, item, where)
        else:
            setattr(message, field.name, item)
    except (TypeError, ValueError) as exc:
        raise _misfit(where, item, str(exc)) from exc


def _extend(target: Any, field: Any, item: object, where: str) -> None:  # noqa: ANN401
    if not isinstance(item, list):
        raise _misfit(where, item, "a list")
    if field.message_type is None:
        target.extend(item)
        return
    for index, element in enumerate(item):
        _fill(target.add(), element, f"{where}[{index}]")


def _misfit(where: str, value: object, wanted: str) -> InvalidArgument:
    shown = repr(value)
    if len(shown) > 80:
        shown = shown[:77] + "..."
    return InvalidArgument(f"{where}: {shown} does not fit: {wanted}")
