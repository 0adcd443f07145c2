"""Every key of Kata's configuration files: what it is, its range, and what becomes of it here.

A key is *used* (it sets a field of config.py), *idle* (known, of no effect here: accepted with a
warning), or *refused* (known, and to act as if it had been obeyed would be a lie). Anything else is
an error with file, line, key and the nearest known spelling. Source: the
configuration-qemu.toml.in files of both of Kata's runtimes.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from hypervisors.registry import canonical_name
from shimv2.config_file import line_of
from shimv2.config_keys import IDLE, REFUSED, TABLES
from shimv2.errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any


_MAY_BE_NONE = frozenset({"initrd", "guest_modules"})
"""Paths for which an empty string means "none"; for the others it means the default."""


class Key(NamedTuple):
    """A key that is used: the field it sets, its kind, and its bounds (numbers) or choices."""

    field: str
    kind: str  # "bool" | "int" | "number" | "text" | "path" | "list" | "choice"
    low: float = 0
    high: float = 0
    choices: tuple[str, ...] = ()
    scale: float = 1  # value in the file times scale = value of the field


class Settings:
    """Fields collected so far, by section, and the sentences for the log."""

    def __init__(self) -> None:
        self._sections: dict[str, dict[str, object]] = {}
        self.warnings: list[str] = []

    # Any: the values are checked one by one against the schema, and replace() wants keywords.
    def of(self, section: str) -> dict[str, Any]:
        """Return what was set in a section, as keyword arguments of its dataclass."""
        return self._sections.setdefault(section, {})


def check_value(key: Key, value: object, where: str) -> object:
    """Return `value` as the type of the key's field; raises `InvalidArgument` if it can't be."""
    if key.kind == "bool":
        if isinstance(value, bool):
            return value
        raise InvalidArgument(f"{where} must be true or false, not {value!r}")
    if key.kind in ("int", "number"):
        return _number(key, value, where)
    if key.kind == "list":
        if isinstance(value, list) and all(isinstance(one, str) for one in value):
            return tuple(value)
        raise InvalidArgument(f"{where} must be a list of strings, not {value!r}")
    if not isinstance(value, str):
        raise InvalidArgument(f"{where} must be a string, not {value!r}")
    if key.kind == "choice" and value not in key.choices:
        known = ", ".join(f'"{one}"' for one in key.choices)
        raise InvalidArgument(f'{where} is "{value}"; known are {known}')
    if key.kind == "path":
        return _path(value, where)
    return value


def apply(tables: Mapping[str, object], file: str, settings: Settings) -> None:
    """Check the tables of one file and add them to `settings`. Raises `InvalidArgument`."""
    for name, content in tables.items():
        if not isinstance(content, dict):
            raise InvalidArgument(f"{file}: key {name!r} stands outside of every table")
        if name == "hypervisor":
            _hypervisor(content, file, settings)
        elif name == "agent":
            _agents(content, file, settings)
        elif name in ("runtime", "factory"):
            _table(content, name, name, file, settings)
        else:
            raise InvalidArgument(f"{file}: unknown table [{name}]{suggest(name, TABLES)}")


def suggest(name: str, known: object) -> str:
    """Return `; did you mean …?`, or nothing if nothing known comes near."""
    from difflib import get_close_matches

    candidates = [str(one) for one in known] if hasattr(known, "__iter__") else []
    near = get_close_matches(name, candidates, n=1, cutoff=0.6)
    return f'; did you mean "{near[0]}"?' if near else ""


def _hypervisor(content: Mapping[str, object], file: str, settings: Settings) -> None:
    backends = {name: table for name, table in content.items() if isinstance(table, dict)}
    if len(backends) != len(content) or len(backends) > 1:
        raise InvalidArgument(f"{file}: [hypervisor] must hold one table, [hypervisor.NAME]")
    for name, table in backends.items():
        first = settings.of("hypervisor").setdefault("name", name)
        if canonical_name(name) != canonical_name(first):
            # Beside a drop-in there may be the files of several VMMs.
            settings.warnings.append(f"{file}: [hypervisor.{name}] is not for {first}")
            continue
        rest = dict(table)
        factory = rest.pop("factory", None)
        if isinstance(factory, dict):  # runtime-rs keeps it here
            _table(factory, "factory", f"hypervisor.{name}.factory", file, settings)
        _table(rest, "hypervisor", f"hypervisor.{name}", file, settings)


def _agents(content: Mapping[str, object], file: str, settings: Settings) -> None:
    for name, table in content.items():
        if name != "kata" or not isinstance(table, dict):
            raise InvalidArgument(f"{file}: unknown table [agent.{name}]; [agent.kata] is known")
        rest = dict(table)
        if isinstance(rest.pop("mem_agent", None), dict):
            settings.warnings.append(f"{file}: [agent.kata.mem_agent] has no effect here")
        _table(rest, "agent", "agent.kata", file, settings)


def _table(
    content: Mapping[str, object], section: str, shown: str, file: str, settings: Settings
) -> None:
    keys = TABLES[section]
    idle: list[str] = []
    for name, value in content.items():
        where = f"{file}: [{shown}] {name}"
        if name in keys:
            key = Key(*keys[name])
            target = section
            if "." in key.field:  # keys that moved between Kata's runtimes name their section
                target, _, attribute = key.field.partition(".")
                key = key._replace(field=attribute)
            checked = check_value(key, value, _with_line(where, file, shown, name))
            if checked is not None or name in _MAY_BE_NONE:
                settings.of(target)[key.field] = checked
        elif name in REFUSED[section]:
            if value not in (False, "", 0, []):
                raise InvalidArgument(f"{where}: {REFUSED[section][name]}")
        elif name in IDLE[section]:
            if value not in (False, "", 0, []):
                idle.append(name)
        else:
            place = _with_line(where, file, shown, name)
            known = [*keys, *REFUSED[section], *IDLE[section]]
            raise InvalidArgument(f"{place}: unknown key{suggest(name, known)}")
    if idle:
        settings.warnings.append(f"{file}: [{shown}]: no effect here: {', '.join(idle)}")


def _with_line(where: str, file: str, table: str, key: str) -> str:
    number = line_of(file, table, key)
    return where.replace(f"{file}:", f"{file}:{number}:", 1) if number else where


def _number(key: Key, value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidArgument(f"{where} must be a number, not {value!r}")
    if not key.low <= value <= key.high:  # neither does "not a number"
        raise InvalidArgument(f"{where} is {value}; it must lie in {key.low:g}…{key.high:g}")
    if key.kind == "int" and value != int(value):
        raise InvalidArgument(f"{where} must be a whole number, not {value!r}")
    scaled = value * key.scale
    return int(scaled) if key.kind == "int" else float(scaled)


def _path(value: str, where: str) -> Path | None:
    if not value:
        return None
    if not value.startswith("/") or "\0" in value:
        raise InvalidArgument(f"{where} must be an absolute path, not {value!r}")
    return Path(value)
