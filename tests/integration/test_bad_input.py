"""What a user can get wrong: the error names the thing and the value, soon, and nothing is left."""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.harness.configuration import CONFIGURATION, changed_configuration, with_value
from tests.harness.containerd_api import CallFailed, Tasks, field_values
from tests.harness.ctr import Ctr, fresh_id
from tests.harness.messages import MESSAGES
from tests.harness.oci_image import BUSYBOX_IMAGE
from tests.harness.parts import find_shims
from tests.harness.patience import patient
from tests.harness.shim_client import ShimClient
from tests.harness.vmm import NAME

if TYPE_CHECKING:
    from tests.harness.node import Node

pytestmark = pytest.mark.usefixtures("kata_only")


def run_and_fail(ctr: Ctr) -> str:
    """Run a container that can't start and return what the user reads."""
    container = fresh_id("refused")
    begin = time.monotonic()
    done = ctr.run(container, "true")
    assert time.monotonic() - begin < patient(10)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    ctr.remove(container)
    return done.stderr


@pytest.mark.parametrize(
    "key",
    [
        pytest.param("path", marks=pytest.mark.smoke),
        "kernel",
        "initrd",
        pytest.param("virtio_fs_daemon", marks=pytest.mark.needs("shared_directory")),
    ],
)
def test_missing_file_of_the_configuration_is_named(node: Node, ctr: Ctr, key: str) -> None:
    with changed_configuration(node, lambda text: with_value(text, key, '"/no/such/file"')):
        error = run_and_fail(ctr)
    assert "/no/such/file" in error
    assert "No such file" in error or "not exist" in error or "missing" in error, error


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: text + "\n[broken\n", ["configuration.toml"]),
        (
            lambda text: text.replace("kernel =", "kernle ="),
            ["configuration.toml", "kernle", "kernel"],
        ),
        (lambda text: with_value(text, "kernel", "5"), ["kernel", "5"]),
        (lambda text: text.replace("[hypervisor.", "[hypervisor.x-"), [f"x-{NAME}", "qemu"]),
        (lambda text: with_value(text, "default_memory", "-5"), ["default_memory", "-5"]),
    ],
    ids=["syntax", "unknown key", "type", "unknown table", "range"],
)
def test_mistake_in_the_configuration_is_pointed_at(
    node: Node, ctr: Ctr, change: Callable[[str], str], words: list[str]
) -> None:
    with changed_configuration(node, change):
        error = run_and_fail(ctr)
    for word in words:
        assert word in error, error


def test_missing_configuration_is_named(node: Node, ctr: Ctr) -> None:
    text = node.path(CONFIGURATION).read_text()
    node.path(CONFIGURATION).unlink()
    try:
        assert CONFIGURATION in run_and_fail(ctr)
    finally:
        node.write(CONFIGURATION, text)


def test_unknown_rootfs_type_is_named(node: Node, ctr: Ctr) -> None:
    container = fresh_id("rootfs")
    node.run(
        ["ctr", "container", "create", "--runtime", ctr.runtime, BUSYBOX_IMAGE, container, "true"]
    )
    request = MESSAGES["CreateTaskRequest"](container_id=container)
    request.rootfs.add(type="nosuchfs", source="/tmp", options=["ro"])
    with Tasks(node) as tasks, pytest.raises(CallFailed) as refused:
        tasks.call("/containerd.services.tasks.v1.Tasks/Create", request, "CreateTaskResponse")
    assert "nosuchfs" in refused.value.message
    ctr.remove(container)


class Bundle:
    """A bundle made by hand, to call the shim's program as containerd does."""

    def __init__(self, node: Node, config: str | None) -> None:
        self.node = node
        self.id = fresh_id("hand")
        self.inside = f"/tmp/bundle/{self.id}"
        directory = node.path(self.inside)
        (directory / "rootfs").mkdir(parents=True)
        if config is not None:
            (directory / "config.json").write_text(config)

    def shim(self, *arguments: str) -> subprocess.CompletedProcess[bytes]:
        """Run the program in the bundle with containerd's flags."""
        command = [
            "sh",
            "-c",
            'cd "$0" && exec containerd-shim-kata-v2 "$@"',
            self.inside,
            "-namespace",
            self.node.name,
            "-address",
            "/run/containerd/containerd.sock",
            "-publish-binary",
            "/usr/bin/containerd",
            "-id",
            self.id,
            *arguments,
        ]
        return subprocess.run(
            self.node.argv(command),
            env=self.node.environment(),
            capture_output=True,
            timeout=patient(20),
            check=False,
        )

    def remove(self) -> None:
        self.node.run(["rm", "-r", "/tmp/bundle"])


@pytest.mark.parametrize(
    "config",
    ["{", "[]", '{"annotations": 5}', "\x00\x01"],
    ids=["cut off", "list", "wrong type", "binary"],
)
@pytest.mark.usefixtures("ctr")
def test_start_refuses_an_invalid_config_json(node: Node, config: str) -> None:
    bundle = Bundle(node, config)
    done = bundle.shim("start")
    assert done.returncode == 1, done
    assert b"config.json" in done.stdout + done.stderr
    assert b"Traceback" not in done.stdout + done.stderr
    bundle.remove()


@pytest.mark.usefixtures("ctr")
def test_start_of_an_unknown_container_type_names_it(node: Node) -> None:
    bundle = Bundle(
        node, json.dumps({"annotations": {"io.kubernetes.cri.container-type": "spaceship"}})
    )
    done = bundle.shim("start")
    assert done.returncode == 1, done
    assert b"spaceship" in done.stdout + done.stderr
    bundle.remove()


@pytest.mark.parametrize("config", [None, "{", "{}"], ids=["missing", "invalid", "empty"])
@pytest.mark.usefixtures("ctr")
def test_delete_of_what_never_ran_succeeds_and_again(node: Node, config: str | None) -> None:
    bundle = Bundle(node, config)
    for _ in range(2):
        done = bundle.shim("-bundle", bundle.inside, "delete")
        assert done.returncode == 0, done
        fields = field_values(done.stdout)
        assert fields[2] == 137
        assert 3 in fields
    bundle.remove()


@pytest.mark.usefixtures("ctr")
def test_wrong_command_lines_exit_1_with_a_sentence(node: Node) -> None:
    for argv in (["fly"], ["-no-such-flag", "start"], ["-id"], ["-namespace", "", "start"]):
        done = node.run(["containerd-shim-kata-v2", *argv], check=False)
        assert done.returncode != 0, argv
        assert done.stdout + done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.usefixtures("ctr")
def test_version_and_info_answer(node: Node) -> None:
    assert "io.containerd.kata.v2" in node.run(["containerd-shim-kata-v2", "--version"]).stdout
    assert node.run(["containerd-shim-kata-v2", "-v"]).stdout
    done = subprocess.run(
        node.argv(["containerd-shim-kata-v2", "-info"]),
        capture_output=True,
        env=node.environment(),
        stdin=subprocess.DEVNULL,
        timeout=patient(20),
        check=True,
    )
    assert field_values(done.stdout)[1] == b"io.containerd.kata.v2"


_HEADER = struct.Struct(">IIBB")
_MALFORMED = {
    "noise": os.urandom(4096),
    "4 GB frame": _HEADER.pack(2**32 - 1, 1, 1, 0) + b"x" * 65536,
    "too long frame": _HEADER.pack((4 << 20) + 1, 1, 1, 0) + b"x" * ((4 << 20) + 1),
    "even stream": _HEADER.pack(2, 2, 1, 0) + b"xx",
    "no protobuf": _HEADER.pack(4, 1, 1, 0) + b"\xff\xff\xff\xff",
    "half a header": b"\x00\x00",
    "unknown type": _HEADER.pack(1, 1, 99, 0) + b"x",
    "stream data out of nowhere": _HEADER.pack(1, 7, 3, 0) + b"x",
}


def test_malformed_frames_hurt_nobody_else(node: Node, ctr: Ctr) -> None:
    container = fresh_id("frames")
    ctr.start(container, "sleep", "1000")
    bundle = f"/run/containerd/io.containerd.runtime.v2.task/{node.name}/{container}"
    address = node.path(f"{bundle}/address").read_text().removeprefix("unix://")
    path = node.path(address)
    (shim,) = find_shims(ctr)
    before = rss_kib(shim.directory)
    with ShimClient(path) as client:
        assert isinstance(client.state(container), bytes)
        for data in list(_MALFORMED.values()) * 3:
            with socket.socket(socket.AF_UNIX) as peer:
                peer.connect(str(path))
                try:
                    peer.sendall(data)
                except (BrokenPipeError, ConnectionResetError):
                    continue
            assert isinstance(client.state(container), bytes)
    assert ctr.exec(container, "echo", "fine").stdout == "fine\n"
    assert rss_kib(shim.directory) < before + 16 * 1024
    ctr.remove(container)


def rss_kib(directory: Path) -> int:
    rows = (directory / "status").read_text().splitlines()
    return int(next(row for row in rows if row.startswith("VmRSS")).split()[1])
