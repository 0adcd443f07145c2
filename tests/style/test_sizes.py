"""No file and no function grows past what a reader holds in mind."""

from __future__ import annotations

import ast
from typing import Final

from tests.style import source

MAX_FILE_LINES: Final = 600
MAX_TEST_FILE_LINES: Final = 800
MAX_FUNCTION_LINES: Final = 60


def test_files_stay_short() -> None:
    too_long = {}
    for path in source.all_files():
        is_test = source.relative(path).startswith("tests/")
        lines = len(path.read_text().splitlines())
        if lines > (MAX_TEST_FILE_LINES if is_test else MAX_FILE_LINES):
            too_long[source.relative(path)] = lines
    assert too_long == {}


def test_functions_stay_short() -> None:
    too_long = {}
    for path in source.all_files():
        for node in ast.walk(source.parse(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    too_long[f"{source.relative(path)}:{node.name}"] = lines
    assert too_long == {}
