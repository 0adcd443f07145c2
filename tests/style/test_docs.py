"""The documentation says what is there: links, files, tests and configuration keys."""

from __future__ import annotations

import ast
import re
from functools import cache
from typing import TYPE_CHECKING, Final
from urllib.parse import unquote

import pytest

from shimv2.config_keys import WITHOUT_EFFECT
from tests.style import configuration_page, source

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PAGES: Final = sorted(
    [*source.ROOT.glob("*.md"), *source.ROOT.glob("docs/**/*.md")], key=source.relative
)
LINK: Final = re.compile(r"\[[^\]\n]*\]\(([^)\s]+)\)")
CODE: Final = re.compile(r"`([^`\n]+)`")
FILE: Final = re.compile(
    r"[A-Za-z0-9_./-]*[A-Za-z0-9_-]\.(?:py|rs|sh|proto|toml\.in|toml|in)(?![\w.-])"
)
TEST: Final = re.compile(r"test_[a-z0-9_]+")
FENCE: Final = re.compile(r"^(?:> ?)?```.*?^(?:> ?)?```", re.MULTILINE | re.DOTALL)
# Files of an installed machine, of the guest or of a user; not ours to have.
ELSEWHERE: Final = frozenset({"config.toml", "configuration.toml", "/etc/containerd/config.toml"})
# Records are history: they may name what was replaced since, if they say that they were.
SUPERSEDED: Final = "**Status:** superseded"


def _ids(paths: list[Path]) -> list[str]:
    return [source.relative(path) for path in paths]


@pytest.mark.parametrize("page", PAGES, ids=_ids(PAGES))
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    missing = []
    for target in LINK.findall(FENCE.sub("", page.read_text())):
        if "://" in target or target.startswith("mailto:"):
            continue
        path, _, anchor = unquote(target).partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in _anchors(file)):
            missing.append(target)
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=_ids(PAGES))
def test_every_file_named_exists(page: Path) -> None:
    text = page.read_text()
    if SUPERSEDED in text:
        return
    words = [word for span in CODE.findall(text) for word in FILE.findall(span)]
    missing = {word for word in words if word not in ELSEWHERE and not _exists(word)}
    assert sorted(missing) == []


@pytest.mark.parametrize("page", PAGES, ids=_ids(PAGES))
def test_every_test_named_exists(page: Path) -> None:
    named = {span for span in CODE.findall(page.read_text()) if TEST.fullmatch(span)}
    assert sorted(named - _test_names()) == []


def test_every_key_is_read_by_the_shim_or_says_why_it_has_no_effect() -> None:
    known = {(section, name) for section, names in WITHOUT_EFFECT.items() for name in names}
    assert configuration_page.unread() == known


def test_configuration_page_is_the_schema_s() -> None:
    assert configuration_page.PAGE.read_text() == configuration_page.page(), (
        "run `python -m tests.style.configuration_page -w`"
    )


def test_every_decision_says_its_status() -> None:
    records = sorted(source.ROOT.glob("docs/decisions/*.md"))
    assert [source.relative(r) for r in records if "**Status:**" not in r.read_text()] == []
    numbers = [record.name[:4] for record in records]
    assert len(set(numbers)) == len(numbers)


@cache
def _files() -> frozenset[str]:
    tops = (top for top in source.ROOT.iterdir() if top.name not in (".git", "build"))
    found = (path for top in tops for path in ([top] if top.is_file() else top.rglob("*")))
    return frozenset(source.relative(path) for path in found)


def _exists(word: str) -> bool:
    """Whether a file's path ends as the page says: whole components, from wherever in the tree."""
    if word.startswith(("/", "…")):
        return True
    return any(path == word or path.endswith(f"/{word}") for path in _files())


@cache
def _test_names() -> frozenset[str]:
    files = (path for path in source.all_files() if source.relative(path).startswith("tests/"))
    return frozenset(_functions(files))


def _functions(files: Iterator[Path]) -> Iterator[str]:
    for path in files:
        for node in ast.walk(source.parse(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield node.name


@cache
def _anchors(file: Path) -> frozenset[str]:
    """The anchors of a page's headings, as code hosts make them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", file.read_text()), re.MULTILINE)
    return frozenset(
        re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings
    )
