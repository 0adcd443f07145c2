"""Who may import whom, and what the serving process may not load."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from typing import TYPE_CHECKING, Final

import pytest

from tests.style import source

if TYPE_CHECKING:
    from pathlib import Path

ALLOWED: Final = {
    "ttrpc": {"ttrpc"},
    "agent_proto": {"agent_proto", "ttrpc"},
    "hypervisors": {"hypervisors"},
    "netns": {"netns"},
    "shimv2": set(source.PACKAGES),
}

PURE_MODULES: Final = {
    "agent_proto/hybrid_vsock", "hypervisors/acrn_argv", "hypervisors/acrn_exit",
    "hypervisors/acrn_messages", "hypervisors/bounded_json", "hypervisors/clh_config",
    "hypervisors/clh_events", "hypervisors/fc_config", "hypervisors/fc_exit",
    "hypervisors/machine",
    "hypervisors/qemu_argv",
    "hypervisors/qmp_protocol", "netns/model", "netns/plan", "shimv2/guest_network",
    "shimv2/guest_spec", "shimv2/lifecycle", "ttrpc/connection", "ttrpc/errors", "ttrpc/events",
    "ttrpc/frames",
}  # fmt: skip
IMPURE: Final = {"asyncio", "logging", "os", "select", "selectors", "socket", "subprocess", "trio"}

ONLY_IN: Final = {
    "pyroute2": {"netns/apply.py", "netns/scan.py"},
    "h11": {"hypervisors/http_api.py"},
}

SERVING: Final = ("ttrpc.server", "ttrpc.client", "agent_proto.client", "shimv2.daemon")
HEAVY: Final = (
    "grpc", "google.protobuf.descriptor", "google.protobuf.internal.builder",
    "google.protobuf.internal.well_known_types", "google.protobuf.text_format", "h11",
    "prometheus_client", "pyroute2", "structlog", "tomllib",
    "netns.network", "shimv2.hooks", "shimv2.host_hooks",
)  # fmt: skip
"""trio itself brings logging, ssl, subprocess and inspect, so those cannot be told here."""

PRODUCT_FILES: Final = source.product_files()


def _ids(paths: list[Path]) -> list[str]:
    return [source.relative(path) for path in paths]


@pytest.mark.parametrize("path", PRODUCT_FILES, ids=_ids(PRODUCT_FILES))
def test_package_imports_only_what_it_may(path: Path) -> None:
    package = path.relative_to(source.ROOT).parts[0]
    named = {name.split(".")[0] for name in source.imports(path)} & set(source.PACKAGES)
    assert named <= ALLOWED[package]


@pytest.mark.parametrize("path", PRODUCT_FILES, ids=_ids(PRODUCT_FILES))
def test_library_is_imported_only_where_it_belongs(path: Path) -> None:
    named = {name.split(".")[0] for name in source.imports(path)}
    for library, homes in ONLY_IN.items():
        assert library not in named or source.relative(path) in homes


def test_pure_modules_do_no_input_or_output() -> None:
    offenders = {
        source.relative(path): sorted(found)
        for path in PRODUCT_FILES
        if source.relative(path).removesuffix(".py") in PURE_MODULES
        and (found := {name.split(".")[0] for name in source.imports(path)} & IMPURE)
    }
    assert offenders == {}


def test_no_module_is_a_heap_of_helpers() -> None:
    names = {"utils", "util", "common", "helpers", "misc"}
    assert [source.relative(path) for path in PRODUCT_FILES if path.stem in names] == []


def test_nothing_runs_in_threads_or_through_trio_processes() -> None:
    """PDEATHSIG is bound to the forking thread, and threads forbid a fork server."""
    forbidden = {"to_thread", "from_thread", "open_process", "run_process"}
    offenders = [
        f"{source.relative(path)}:{node.lineno}"
        for path in PRODUCT_FILES
        for node in ast.walk(source.parse(path))
        if isinstance(node, ast.Attribute)
        and node.attr in forbidden
        and isinstance(node.value, ast.Name)
        and node.value.id in ("trio", "lowlevel")
    ]
    assert offenders == []


@pytest.mark.parametrize("module", SERVING)
def test_serving_process_keeps_its_import_diet(module: str) -> None:
    program = (
        f"import json, sys, threading; import {module}\n"
        "print(json.dumps([sorted(sys.modules), threading.active_count()]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=source.ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    loaded, threads = json.loads(result.stdout)
    assert [name for name in HEAVY if name in loaded] == []
    assert threads == 1


def test_message_classes_alone_do_not_load_trio() -> None:
    program = "import shimv2.pb.containerd_task_pb2, agent_proto.pb.agent_pb2\nprint(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-I", "-S", "-c", f"import sys; sys.path[:0] = {sys.path!r}\n{program}"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    loaded = set(result.stdout.split())
    assert loaded & {"trio", "re", "typing", "enum", "datetime", "socket", *HEAVY} == set()
