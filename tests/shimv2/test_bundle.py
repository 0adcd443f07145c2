"""config.json as it may come: each mistake gets a code and names itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shimv2.bundle import ContainerKind, check_id, read_bundle
from shimv2.errors import InvalidArgument, NotFound, ShimError
from tests.shimv2.shim_bench import pod_annotations, spec


def read(tmp_path: Path, config: Any, container_id: str = "c1") -> Any:
    text = config if isinstance(config, str) else json.dumps(config)
    (tmp_path / "config.json").write_text(text)
    return read_bundle(tmp_path, container_id)


def test_a_bundle_without_config_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"config\.json"):
        read_bundle(tmp_path, "c1")


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ("{", "not valid JSON"),
        ("[]", "not an object"),
        ("[" * 100_000, "not valid JSON"),
        ({}, "process"),
        (spec() | {"process": 3}, "process"),
        (spec() | {"process": {"args": [], "cwd": "/"}}, "args"),
        (spec() | {"process": {"args": ["a"], "cwd": "x"}}, "cwd"),
        (spec() | {"root": {}}, r"root\.path"),
        (spec() | {"mounts": [{"destination": "relative"}]}, r"mounts\[0\]"),
        (spec() | {"mounts": 5}, "mounts"),
        (spec() | {"linux": []}, "linux"),
        (spec() | {"annotations": {"io.kubernetes.cri.container-type": "pod"}}, "container-type"),
        (spec() | {"annotations": {"io.kubernetes.cri.container-type": "container"}}, "sandbox"),
    ],
)
def test_a_config_that_cannot_be_used_is_refused_by_name(
    tmp_path: Path, config: Any, named: str
) -> None:
    with pytest.raises(InvalidArgument, match=named):
        read(tmp_path, config)


def test_an_unreadable_config_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ShimError, match=r"config\.json"):
        read_bundle(tmp_path, "c1")


@pytest.mark.parametrize(
    ("annotations", "kind", "sandbox_id"),
    [
        ({}, ContainerKind.SINGLE, "c1"),
        (pod_annotations("sandbox", "c1"), ContainerKind.SANDBOX, "c1"),
        (pod_annotations("container", "p1"), ContainerKind.MEMBER, "p1"),
        ({"io.kubernetes.docker.type": "podsandbox"}, ContainerKind.SANDBOX, "c1"),
    ],
)
def test_annotations_say_what_a_container_is_to_its_vm(
    tmp_path: Path, annotations: dict[str, str], kind: ContainerKind, sandbox_id: str
) -> None:
    bundle = read(tmp_path, spec(annotations=annotations))
    assert (bundle.kind, bundle.sandbox_id) == (kind, sandbox_id)


@pytest.mark.parametrize("good", ["a", "t1", "4f2a_x.y-z", "x" * 76])
def test_ids_of_containerd_are_taken(good: str) -> None:
    assert check_id(good, "container") == good


@pytest.mark.parametrize("bad", ["", ".", "..", "a/b", "-a", "a b", "a\0", "a..b", "x" * 77, "ü"])
def test_other_ids_are_refused_with_the_rule(bad: str) -> None:
    with pytest.raises(InvalidArgument, match="at most 76"):
        check_id(bad, "container")
