"""The lines for containerd that we show: each containerd on the machine understands them alike."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests.harness.containerd_daemon import ContainerdMissing, find_containerd

ROOT = Path(__file__).parents[2]
OLD, NEW = re.findall(
    r"```toml\n(version = .*?)```", (ROOT / "docs" / "kubernetes.md").read_text(), re.DOTALL
)
SHIPPED = (ROOT / "packaging" / "containerd-kata.toml").read_text()
(README,) = re.findall(r"```toml\n(version = .*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def runtime(major: int, text: str, directory: Path) -> dict[str, Any]:
    """The handler `kata` as a containerd of this version reads it."""
    try:
        containerd = find_containerd(major)
    except ContainerdMissing as missing:
        pytest.skip(str(missing))
    file = directory / "config.toml"
    file.write_text(text)
    argv = [str(containerd.directory / "containerd"), "--config", str(file), "config", "dump"]
    done = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=60)
    for plugin, settings in tomllib.loads(done.stdout)["plugins"].items():
        runtimes = settings.get("containerd", {}).get("runtimes", {})
        if "cri" in plugin and "kata" in runtimes:
            found: dict[str, Any] = runtimes["kata"]
            return found
    raise AssertionError(f"containerd {containerd.name} has no runtime kata:\n{done.stdout}")


@pytest.mark.parametrize(
    ("major", "text"),
    [(1, OLD), (1, README), (1, SHIPPED), (2, OLD), (2, NEW), (2, README), (2, SHIPPED)],
    ids=["1-page", "1-readme", "1-shipped", "2-page", "2-page-new", "2-readme", "2-shipped"],
)
def test_containerd_finds_the_handler_with_its_settings(
    major: int, text: str, tmp_path: Path
) -> None:
    found = runtime(major, text, tmp_path)
    assert found["runtime_type"] == "io.containerd.kata.v2"
    assert found["privileged_without_host_devices"] is True
    assert len(found["pod_annotations"]) == 2
    assert found["options"] == {"ConfigPath": "/etc/kata-containers/configuration.toml"}
