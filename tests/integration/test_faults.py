"""Parts die or hang under a running container: exit 137 at once, a reason, nothing left."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.harness.configuration import changed_configuration, drop_in, with_value
from tests.harness.containerd_api import CallFailed, EventLog, Tasks, field_values
from tests.harness.ctr import Ctr, fresh_id
from tests.harness.parts import DAEMONS, VMM, find_one, find_shims
from tests.harness.patience import patient
from tests.harness.shim_client import ShimClient
from tests.harness.vmm import NAME

if TYPE_CHECKING:
    from tests.harness.node import Node

pytestmark = pytest.mark.usefixtures("kata_only")

#: Writes to sysrq, but never if the container should be running on the host's own kernel.
# A proc of the container's own, because the given one has sysrq-trigger read-only.
_BOOT_ID = "/proc/sys/kernel/random/boot_id"
_SYSRQ = (
    'mkdir /own && mount -t proc proc /own && [ "$(cat {boot_id})" != "{host}" ] && '
    "echo {key} >/own/sysrq-trigger; sleep 1000"
)


@pytest.fixture
def tasks(node: Node) -> Iterator[Tasks]:
    with Tasks(node) as connection:
        yield connection


def expect_137(events: EventLog, container: str) -> None:
    """Nobody asks about the container meanwhile; without a notice no exit would ever come."""
    exited = events.expect("/tasks/exit", container, timeout_s=20)
    assert field_values(exited.event.value)[4] == 137


@pytest.mark.smoke
def test_killed_vmm_means_137_and_a_reason(node: Node, ctr: Ctr, tasks: Tasks) -> None:
    container = fresh_id("vmm")
    ctr.start(container, "sleep", "1000")
    with EventLog(node) as events:
        waiting = tasks.wait_later(container)
        node.signal(find_one(node, VMM).pid, "KILL")
        expect_137(events, container)
        assert waiting.exit_status() == 137
    assert tasks.status(container) == "STOPPED"
    with pytest.raises(CallFailed) as refused:
        tasks.exec(container, "late", ["true"])
    assert "killed" in refused.value.message or "SIGKILL" in refused.value.message
    assert "killed" in new_log(node)
    assert tasks.delete(container) == 137
    ctr.remove(container)


@pytest.mark.parametrize("part", DAEMONS)
def test_killed_helper_means_137_and_a_reason(
    node: Node, ctr: Ctr, tasks: Tasks, part: str
) -> None:
    container = fresh_id("helper")
    ctr.start(container, "sleep", "1000")
    with EventLog(node) as events:
        node.signal(find_one(node, part).pid, "KILL")
        expect_137(events, container)
    assert tasks.wait(container) == 137
    assert part[:9] in new_log(node)
    assert tasks.delete(container) == 137
    ctr.remove(container)


def test_killed_shim_is_cleaned_up_by_containerd(node: Node, ctr: Ctr, tasks: Tasks) -> None:
    container = fresh_id("shim")
    ctr.start(container, "sleep", "1000")
    (shim,) = find_shims(ctr)
    with EventLog(node) as events:
        node.signal(shim.pid, "KILL")
        exited = events.expect("/tasks/exit", container)
        assert field_values(exited.event.value)[4] == 137
    ctr.remove(container)


@pytest.mark.parametrize("part", [*DAEMONS, VMM])
def test_shim_killed_while_it_starts_its_parts_leaves_nothing(
    node: Node, ctr: Ctr, part: str
) -> None:
    container = fresh_id("booting")
    process = ctr.popen(container, "true", options=["--rm"], stderr=-1)
    wait_for_part(node, part)
    (shim,) = find_shims(ctr)
    node.signal(shim.pid, "KILL")
    _, error = process.communicate(timeout=patient(30))
    assert process.returncode != 0
    assert error
    ctr.remove(container)


def test_containerd_killed_while_a_vm_boots_can_remove_it_later(node: Node, ctr: Ctr) -> None:
    container = fresh_id("midcreate")
    process = ctr.popen(container, "sleep", "1000", options=["--rm"], stderr=-1)
    wait_for_part(node, VMM)
    node.containerd.restart()
    process.communicate(timeout=patient(30))
    assert process.returncode != 0
    ctr.remove(container)
    node.run(["sh", "-c", "rm -rf /run/containerd/fifo/*"])  # the failed client's own


def test_shim_told_to_end_takes_its_sandbox_with_it(node: Node, ctr: Ctr, tasks: Tasks) -> None:
    container = fresh_id("terminated")
    ctr.start(container, "sleep", "1000")
    (shim,) = find_shims(ctr)
    with EventLog(node) as events:
        node.signal(shim.pid, "TERM")
        exited = events.expect("/tasks/exit", container)
        assert field_values(exited.event.value)[4] == 137
    ctr.remove(container)


def test_client_that_gives_up_while_the_vm_boots_leaves_nothing(node: Node, ctr: Ctr) -> None:
    container = fresh_id("impatient")
    process = ctr.popen(container, "true", options=["--rm"], stderr=-1)
    wait_for_part(node, VMM)
    (client,) = [found for found in node.find("ctr run") if container in found.command]
    node.signal(client.pid, "KILL")
    process.communicate(timeout=patient(30))
    ctr.remove(container)
    node.run(["sh", "-c", "rm -r /run/containerd/fifo/*"])  # the killed client's own


@pytest.mark.parametrize(
    ("key", "word"),
    [
        pytest.param("c", "panic", marks=pytest.mark.smoke),
        pytest.param("b", "re", marks=pytest.mark.smoke),
        pytest.param("o", "power", marks=pytest.mark.needs("power_off")),
    ],
    ids=["panic", "reboot", "poweroff"],
)
def test_guest_that_ends_itself_means_137_and_says_how(
    node: Node, ctr: Ctr, tasks: Tasks, key: str, word: str
) -> None:
    container = fresh_id("guest")
    host = Path(_BOOT_ID).read_text().strip()
    script = _SYSRQ.format(boot_id=_BOOT_ID, host=host, key=key)
    with EventLog(node) as events:
        ctr.start(container, "sh", "-c", script, options=["--cap-add", "CAP_SYS_ADMIN"])
        exited = events.expect("/tasks/exit", container)
        assert field_values(exited.event.value)[4] == 137
    assert tasks.wait(container) == 137
    assert word in new_log(node).lower()
    assert tasks.delete(container) == 137
    ctr.remove(container)


def test_stopped_vmm_does_not_stop_state_or_kill(node: Node, ctr: Ctr, tasks: Tasks) -> None:
    container = fresh_id("frozen")
    ctr.start(container, "sleep", "1000")
    vmm = find_one(node, VMM)
    node.signal(vmm.pid, "STOP")
    assert tasks.status(container) == "RUNNING"
    waiting = tasks.wait_later(container)
    tasks.kill(container, 9, timeout_s=60)
    assert waiting.exit_status(60) == 137
    assert tasks.delete(container) == 137
    ctr.remove(container)


_MUTE_VMM = "#!/bin/sh\nexec sleep 1000\n"
# Lives, and closes the socket of its API.
_REFUSING_VMM = """\
#!/usr/bin/python3
import socket, time
for fd in range(3, 64):
    try:
        one = socket.socket(fileno=fd)
    except OSError:
        continue
    if not one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        one.detach()
    one = None
time.sleep(1000)
"""


@pytest.mark.smoke
@pytest.mark.parametrize("way", ["refuses", "mute"])
def test_vmm_that_is_not_to_be_talked_to_is_given_up(node: Node, ctr: Ctr, way: str) -> None:
    if way == "mute" and node.version.major < 2:
        pytest.skip("a deadline of 15 s or more: waited for once is enough")
    node.write("/tmp/vmm", _REFUSING_VMM if way == "refuses" else _MUTE_VMM)
    node.path("/tmp/vmm").chmod(0o755)
    container = fresh_id(way)
    with drop_in(node, f'[hypervisor.{NAME}]\npath = "/tmp/vmm"\n'):
        begin = time.monotonic()
        done = ctr.run(container, "true")
        assert time.monotonic() - begin < patient(90)
    assert done.returncode != 0
    assert NAME in done.stderr
    assert "before it was ready" in done.stderr
    ctr.remove(container)
    node.path("/tmp/vmm").unlink()


def short_deadline(text: str) -> str:
    return with_value(text, "dial_timeout", "4")


def test_guest_that_never_answers_is_given_up_at_the_deadline(node: Node, ctr: Ctr) -> None:
    """The initrd has an init that only sleeps: the kernel boots, no agent comes."""
    node.run(["sh", "-c", _SILENT_INITRD])
    container = fresh_id("silent")
    with changed_configuration(
        node, lambda text: with_value(short_deadline(text), "initrd", '"/tmp/silent.img"')
    ):
        begin = time.monotonic()
        done = ctr.run(container, "true")
        assert time.monotonic() - begin < patient(15)
    assert done.returncode != 0
    assert "agent" in done.stderr
    assert "4" in done.stderr
    ctr.remove(container)
    node.run(["sh", "-c", "rm -r /tmp/silent*"])


def test_guest_without_an_init_is_reported_with_its_panic(node: Node, ctr: Ctr) -> None:
    node.run(
        [
            "sh",
            "-c",
            "cd /tmp && mkdir empty && cd empty && mkdir dev && find . | "
            "busybox cpio -o -H newc >/tmp/empty.img 2>/dev/null",
        ]
    )
    container = fresh_id("panics")
    with changed_configuration(node, lambda text: with_value(text, "initrd", '"/tmp/empty.img"')):
        begin = time.monotonic()
        done = ctr.run(container, "true")
        assert time.monotonic() - begin < patient(20)
    assert done.returncode != 0
    assert "panic" in done.stderr.lower(), done.stderr
    ctr.remove(container)
    node.run(["sh", "-c", "rm -r /tmp/empty*"])


_SILENT_INITRD = """\
set -e; mkdir -p /tmp/silent/bin /tmp/silent/dev; cd /tmp/silent
cp "$(command -v busybox)" bin/busybox
printf '#!/bin/busybox sh\\nwhile :; do /bin/busybox sleep 1000; done\\n' >init; chmod 755 init
find . | busybox cpio -o -H newc >/tmp/silent.img 2>/dev/null"""


def test_full_disk_is_named_and_leaves_nothing(node: Node, ctr: Ctr) -> None:
    node.run(
        [
            "sh",
            "-c",
            "mkdir -p /run/kata && mount -t tmpfs -o size=16k tiny /run/kata && "
            "cat /dev/zero >/run/kata/filler 2>/dev/null; true",
        ]
    )
    container = fresh_id("full")
    done = ctr.run(container, "true")
    node.run(["umount", "/run/kata"])
    assert done.returncode != 0
    assert "space" in done.stderr.lower(), done.stderr
    ctr.remove(container)


def test_state_answers_within_50_ms_while_a_vm_boots(node: Node, ctr: Ctr) -> None:
    container = fresh_id("busy")
    process = ctr.popen(container, "true", options=["--rm"])
    wait_for_part(node, VMM)
    bundle = f"/run/containerd/io.containerd.runtime.v2.task/{node.name}/{container}"
    address = node.path(f"{bundle}/address").read_text().removeprefix("unix://")
    times = []
    with ShimClient(node.path(address)) as shim:
        for _ in range(20):
            begin = time.monotonic()
            shim.state(container)
            times.append(time.monotonic() - begin)
    assert process.wait(patient(60)) == 0
    # What a busy machine adds it does not add to all of them; a boot that is waited for would.
    assert min(times) < patient(0.05)


def wait_for_part(node: Node, comm: str, timeout_s: float = 20) -> None:
    """Wait until a part of a sandbox runs (a poll: a process of another has no event for us)."""
    deadline = time.monotonic() + patient(timeout_s)
    while not any(process.comm == comm for process in node.processes()):
        assert time.monotonic() < deadline, f"no {comm} within {timeout_s} s"
        time.sleep(0.01)


def new_log(node: Node) -> str:
    """Return what containerd and the shims have logged last."""
    return node.containerd.log_path.read_text(errors="replace")[-8000:]
