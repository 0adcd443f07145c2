"""The tables of docs/configuration.md, made from the schema that the shim itself reads by.

    python -m tests.style.configuration_page        prints the tables
    python -m tests.style.configuration_page -w     puts them into the page

A key whose field nothing outside of the configuration's own modules ever reads has no effect; the
table says so, and why, and a test holds the list of reasons to what the shim's modules read.
"""

from __future__ import annotations

import ast
import dataclasses
import sys
import textwrap
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

from shimv2 import annotations as pod_annotations
from shimv2 import config
from shimv2.config_keys import IDLE, REFUSED, TABLES, WITHOUT_EFFECT, WITHOUT_EFFECT_ON
from shimv2.config_schema import Key
from tests.style import source

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE: Final = source.ROOT / "docs" / "configuration.md"
BEGIN: Final = "<!-- tables: made by tests/style/configuration_page.py -->"
END: Final = "<!-- end of tables -->"
SECTIONS: Final = {
    "hypervisor": ("hypervisor.…", config.HypervisorConfig()),
    "agent": ("agent.kata", config.AgentConfig()),
    "runtime": ("runtime", config.RuntimeSection()),
    "factory": ("factory", config.FactoryConfig()),
}
_CONFIGURATION: Final = {
    "annotations.py", "config.py", "config_file.py", "config_keys.py", "config_schema.py",
}  # fmt: skip
# Read by the configuration itself: which annotations count, the one way to share files, and what is
# refused when it is set.
_OWN: Final = frozenset({"enable_annotations", "shared_fs", "enable_template"})


def tables() -> str:
    """Return all tables as Markdown."""
    parts = [*_used(), _of_one_vmm(), _annotations(), *_refused(), _idle()]
    return "\n\n".join("\n".join(part) for part in parts)


def page() -> str:
    """Return the page as it should be."""
    text = PAGE.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{tables()}\n\n{END}{after}"


def _used() -> Iterator[list[str]]:
    for section, (shown, defaults) in SECTIONS.items():
        lines = [f"### `[{shown}]`", "", "| key | values | default | |", "|---|---|---|---|"]
        for name, row in TABLES[section].items():
            key = Key(*row)
            owner = defaults
            if "." in key.field:
                other, _, field = key.field.partition(".")
                owner, key = SECTIONS[other][1], key._replace(field=field)
            effect = _effect(owner, key.field)
            default = _value(getattr(owner, key.field), key)
            lines.append(f"| `{name}` | {_values(key)} | {default} | {effect} |")
        yield lines


def _of_one_vmm() -> list[str]:
    lines = ["### Without effect on one VMM", "", "| VMM | key | |", "|---|---|---|"]
    for vmm, reasons in WITHOUT_EFFECT_ON.items():
        lines += [f"| {vmm} | `{name}` | {reason} |" for name, reason in reasons.items()]
    return lines


def _annotations() -> list[str]:
    lines = ["### Annotations", "", "| `io.katacontainers.config.` | gate | values | |",
             "|---|---|---|---|"]  # fmt: skip
    for name, (section, key) in pod_annotations.REGISTRY.items():
        effect = _effect(SECTIONS[section][1], key.field)
        gate = pod_annotations.gate_name(name)
        lines.append(f"| `{name}` | `{gate}` | {_values(key)} | {effect} |")
    return lines


def _refused() -> Iterator[list[str]]:
    for section, reasons in REFUSED.items():
        lines = [f"### Refused in `[{SECTIONS[section][0]}]`", "", "| key | answer |", "|---|---|"]
        yield [*lines, *(f"| `{name}` | {reason} |" for name, reason in reasons.items())]


def _idle() -> list[str]:
    lines = ["### Known, without effect", ""]
    for section, names in IDLE.items():
        listed = ", ".join(f"`{name}`" for name in sorted(names))
        text = f"`[{SECTIONS[section][0]}]`: {listed}"
        lines += [*textwrap.wrap(text, 110, break_on_hyphens=False), ""]
    return lines[:-1]


def _values(key: Key) -> str:
    if key.kind == "choice":
        return ", ".join(f"`{one}`" for one in key.choices)
    if key.kind in ("int", "number"):
        return f"{key.low:.15g} to {key.high:.15g}"
    return {"bool": "`true`, `false`", "path": "absolute path", "list": "list of strings"}.get(
        key.kind, "text"
    )


def _value(value: object, key: Key) -> str:
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, int | float):
        return f"`{value / key.scale:g}`"
    if value in ("", (), None):
        return "empty"
    return f"`{value}`"


def _effect(owner: object, field: str) -> str:
    section = next(name for name, (_, defaults) in SECTIONS.items() if defaults is owner)
    reason = WITHOUT_EFFECT[section].get(field)
    return f"no effect: {reason}" if reason else ""


def unread() -> set[tuple[str, str]]:
    """Give every field of the configuration that the shim never reads."""
    return {
        (section, field.name)
        for section, (_, defaults) in SECTIONS.items()
        for field in dataclasses.fields(type(defaults))  # type: ignore[arg-type]  # all are
        if field.name not in _OWN and (section, field.name) not in _reads()
    }


@cache
def _reads() -> frozenset[tuple[str, str]]:
    """Every `section.field` that a module of the shim reads: `config.agent.dial_timeout_s`."""
    found = set()
    for path in source.product_files():
        if path.parent.name != "shimv2" or path.name in _CONFIGURATION:
            continue
        for node in ast.walk(source.parse(path)):
            if isinstance(node, ast.Attribute):
                match node.value:
                    case ast.Attribute(attr=section) | ast.Name(id=section):
                        found.add((section, node.attr))
    return frozenset(found)


def main(arguments: list[str]) -> int:
    """Print the tables, or write them into the page."""
    if arguments == ["-w"]:
        Path(PAGE).write_text(page())
    else:
        print(tables())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
