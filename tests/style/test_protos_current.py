"""The committed message modules are what the generator makes of the .proto files."""

from __future__ import annotations

import importlib
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.style import source

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("protos")
    generator = source.ROOT / "packaging/generate_protos.py"
    subprocess.run([sys.executable, str(generator), "--out", str(out)], check=True, timeout=60)
    return out


def test_committed_modules_are_current(generated: Path) -> None:
    fresh = {path.relative_to(generated): path.read_text() for path in generated.rglob("*.py*")}
    committed = {
        path.relative_to(source.ROOT): path.read_text()
        for package in source.PACKAGES
        for path in (source.ROOT / package / "pb").glob("*.py*")
    }
    stale = sorted(
        str(path)
        for path in fresh.keys() | committed.keys()
        if fresh.get(path) != committed.get(path)
    )
    assert stale == [], "run `make protos`"


def test_every_generated_module_loads_and_makes_messages() -> None:
    for package in source.PACKAGES:
        for path in sorted((source.ROOT / package / "pb").glob("*_pb2.py")):
            module = importlib.import_module(f"{package}.pb.{path.stem}")
            for name in module.DESCRIPTOR.message_types_by_name:
                message = getattr(module, name)()
                assert message.SerializeToString() == b""
