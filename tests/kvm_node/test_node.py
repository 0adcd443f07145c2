"""The KVM node itself, and the smoke set on it: QEMU with KVM, AF_VSOCK, vhost-net, cgroup v2."""

from __future__ import annotations

import faulthandler
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from tests.harness.node import BUILD
from tests.kvm_node import node, suite
from tests.kvm_node.node import Job, NodeFailed, run

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = [pytest.mark.root, pytest.mark.e2e, pytest.mark.kvm]

_LOOK = """\
test -c /dev/kvm -a -c /dev/vhost-vsock -a -c /dev/vhost-net || exit 1
grep -qw svm /proc/cpuinfo || exit 2
test "$(stat -f -c %T /sys/fs/cgroup)" = cgroup2fs || exit 3
test "$VARIABLE" = "it's here" || exit 4
echo lost >build/kvm-node/lost || exit 5
echo ready
until test -e {shared}/go; do sleep 0.2; done
echo kept >{shared}/kept; echo to stderr >&2
(sleep 1000 &)
exit 7
"""


@pytest.mark.usefixtures("leaves_nothing")
def test_command_has_kvm_and_vhost_talks_live_and_leaves_only_what_it_shares(
    tmp_path: Path,
) -> None:
    seen = b""

    def answer(data: bytes) -> None:
        nonlocal seen
        seen += data
        if b"ready\n" in seen:
            (tmp_path / "go").touch()

    job = Job(
        command=["sh", "-c", _LOOK.format(shared=tmp_path)],
        environment={"VARIABLE": "it's here"},
        directory=BUILD.parent,
        writable=(tmp_path,),
        deadline_s=240,
    )
    assert run(job, answer) == 7, seen
    assert seen.split(b"\n") == [b"ready", b"to stderr", b""]
    assert (tmp_path / "kept").read_text() == "kept\n"
    assert not (BUILD / "kvm-node" / "lost").exists()


@pytest.mark.usefixtures("leaves_nothing")
def test_node_that_is_not_done_in_time_is_ended_and_shows_its_console(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = b""

    def pass_time(data: bytes) -> None:
        nonlocal seen
        seen += data
        if seen == b"said\n":
            later = time.monotonic() + 1000
            monkeypatch.setattr(node, "time", SimpleNamespace(monotonic=lambda: later))

    # <2>: "quiet" keeps only what is critical on the console.
    script = "echo '<2>said to the kernel' >/dev/kmsg && echo said; sleep 1000"
    with pytest.raises(NodeFailed, match=r"not done after 240 s; its console") as failed:
        run(Job(command=["sh", "-c", script], deadline_s=240), pass_time)
    assert seen == b"said\n"
    assert "said to the kernel" in str(failed.value)


@pytest.mark.usefixtures("leaves_nothing")
@pytest.mark.timeout(1800)
def test_smoke_set_passes_with_kvm_kernel_vsock_vhost_net_and_cgroup_v2(
    show: Callable[[bytes], None],
) -> None:
    faulthandler.cancel_dump_traceback_later()  # minutes are no hang here
    said = bytearray()

    def take(data: bytes) -> None:
        said.extend(data)
        show(data)

    show(b"\n")
    try:
        status, end = run(suite.job(["qemu"], smoke=True), take), ""
    except NodeFailed as failure:
        status, end = 1, f"\n{failure}"
    text = said.decode(errors="replace") + end
    if status != 0:
        _, found, failures = text.partition("= FAILURES =")
        pytest.fail("on the node:\n" + (failures if found else text[-8000:]), pytrace=False)
    assert " skipped" not in text.splitlines()[-1], "a part of the set did not run"
