"""The journal: every prefix of it replays, any number of times, and touches nothing else."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shimv2 import host_process, journal
from shimv2.cleanup import remove_state
from shimv2.errors import FailedPrecondition, InvalidArgument, ResourceExhausted
from shimv2.journal import Journal
from shimv2.state_dir import StateDir
from shimv2.undo import UNDO

KINDS = ("directory", "file", "socket", "process", "mount")


def opened(directory: Path) -> Journal:
    return Journal.open(str(directory / "journal"), namespace="n", sandbox_id="s")


def take_some(book: Journal, directory: Path, kinds: list[str]) -> None:
    """Take one resource of each kind, in the journal first."""
    for number, kind in enumerate(kinds):
        path = directory / f"{kind}-{number}"
        if kind == "directory":
            book.take(kind, path=str(path))
            path.mkdir()
        elif kind == "file":
            book.take(kind, path=str(path), container="c1")
            path.write_text("x")
        elif kind == "socket":
            book.take(kind, path=str(path))
            with socket.socket(socket.AF_UNIX) as made:
                made.bind(str(path))
        elif kind == "mount":
            book.take(kind, target=str(path))
        else:
            book.take(kind, name="gone", pid=2**22 - 1 - number, start_time=1)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(KINDS), min_size=1, max_size=6), st.data())
def test_any_prefix_replays_cleanly_and_twice(tmp_path_factory, kinds, data):
    directory = tmp_path_factory.mktemp("j")
    book = opened(directory)
    take_some(book, directory, kinds)
    for entry in book.held:
        if data.draw(st.booleans()):
            book.release(entry)
    book.close()
    path = directory / "journal"
    whole = path.read_bytes()
    cut = data.draw(st.floats(0, 1))  # the length differs with pid and boot, so not in bytes
    path.write_bytes(whole[: int(len(whole) * cut)])
    assert journal.replay(str(path)) == []
    assert journal.replay(str(path)) == []


def test_a_whole_journal_leaves_nothing(tmp_path):
    book = opened(tmp_path)
    take_some(book, tmp_path, list(KINDS) * 3)
    assert journal.replay(str(tmp_path / "journal")) == []
    assert os.listdir(tmp_path) == ["journal"]


def test_entries_are_undone_backwards(tmp_path):
    book = opened(tmp_path)
    for name in ("a", "a/b", "a/b/c"):
        book.take("directory", path=str(tmp_path / name))
        (tmp_path / name).mkdir()
    assert book.undo() == []
    assert not (tmp_path / "a").exists()
    assert book.held == ()


def test_only_one_container_is_undone_when_only_one_is_meant(tmp_path):
    book = opened(tmp_path)
    for name in ("c1", "c2"):
        book.take("file", path=str(tmp_path / name), container=name)
        (tmp_path / name).write_text("")
    assert journal.replay(book.path, container="c1") == []
    assert not (tmp_path / "c1").exists()
    assert (tmp_path / "c2").exists()


def test_the_line_is_on_disk_before_take_returns(tmp_path):
    book = opened(tmp_path)
    book.take("file", path="/nowhere")
    _, held = journal.read(book.path)
    assert [entry.kind for entry in held] == ["file"]


def test_a_released_entry_is_not_undone(tmp_path):
    book = opened(tmp_path)
    entry = book.take("file", path=str(tmp_path / "kept"))
    (tmp_path / "kept").write_text("")
    book.release(entry)
    book.release(entry)
    journal.replay(book.path)
    assert (tmp_path / "kept").exists()


def test_a_second_journal_in_one_place_is_refused(tmp_path):
    opened(tmp_path)
    with pytest.raises(FailedPrecondition, match=f"then remove {tmp_path}"):
        opened(tmp_path)


def test_an_unknown_kind_is_a_mistake_of_ours(tmp_path):
    with pytest.raises(KeyError):
        opened(tmp_path).take("dragon", path="/x")


def test_a_full_disk_is_said_before_anything_is_taken():
    book = Journal("/dev/full", os.open("/dev/full", os.O_WRONLY), 1)
    with pytest.raises(ResourceExhausted, match="No space left"):
        book.take("file", path="/x")
    assert book.held == ()


def test_release_survives_a_full_disk():
    book = Journal("/dev/full", os.open("/dev/full", os.O_WRONLY), 1)
    entry = journal.Entry(1, "file", {})
    book._held[1] = entry
    book.release(entry)
    assert book.held == ()


@pytest.mark.parametrize("content", [b"", b"\n\n", b"[]\n1\n", b"\xff\xfe", b'{"take":1}\n', b"["])
def test_nonsense_is_an_empty_journal(tmp_path, content):
    (tmp_path / "journal").write_bytes(content)
    assert journal.replay(str(tmp_path / "journal")) == []


def test_a_kind_from_another_version_is_named_and_left(tmp_path):
    line = {"take": 1, "kind": "dragon", "path": "/x"}
    (tmp_path / "journal").write_text(json.dumps(line) + "\n")
    assert journal.replay(str(tmp_path / "journal")) == ["dragon #1: not known to this version"]


def sleeper() -> subprocess.Popen[bytes]:
    return subprocess.Popen(["sleep", "60"])


def test_a_process_is_killed_by_pid_and_start_time(tmp_path):
    with sleeper() as child:
        start = host_process.start_time_ticks(child.pid)
        assert start is not None
        book = opened(tmp_path)
        book.take("process", name="sleep", pid=child.pid, start_time=start)
        assert journal.replay(book.path) == []
        assert child.wait(30) == -9


@pytest.mark.parametrize(
    ("kind", "fields", "stays"),
    [
        ("process", {"name": "qemu", "pid": 1, "start_time": 1}, True),
        ("network", {"path": "/run/netns/a"}, True),
        ("cgroup", {"path": "/sys/fs/cgroup/s", "back": ""}, True),
        ("file", {"path": "/volume/mountInfo.mark"}, True),
        ("file", {"path": "{home}/disk"}, False),
        ("socket", {"path": "{home}/s"}, False),
        ("directory", {"path": "{home}/d"}, False),
    ],
)
def test_the_state_stays_while_something_outside_of_it_is_left(
    tmp_path, monkeypatch, kind, fields, stays
):
    state = StateDir("key", str(tmp_path / "kata"))
    state.create()
    book = opened(Path(state.path))
    named = {k: v.format(home=state.path) if k == "path" else v for k, v in fields.items()}
    book.take(kind, **named)
    book.close()
    with monkeypatch.context() as patched:
        patched.setitem(UNDO, kind, lambda _: "still there")
        assert remove_state(state) == ([f"{kind} #1: still there"] if stays else [])
        assert state.exists() == stays
    monkeypatch.setitem(UNDO, kind, lambda _: None)
    assert remove_state(state) == []
    assert not state.exists()


def test_a_recycled_pid_is_spared(tmp_path):
    with sleeper() as child:
        book = opened(tmp_path)
        book.take("process", name="sleep", pid=child.pid, start_time=12345)
        assert journal.replay(book.path) == []
        assert child.poll() is None
        child.kill()


@pytest.mark.parametrize("age", [0, -1])
def test_what_a_dead_hook_started_is_killed_with_its_session_only(tmp_path, age):
    script = ["sh", "-c", "sleep 60 & echo $!; exec sleep 60"]
    with (
        sleeper() as stranger,
        subprocess.Popen(script, stdout=subprocess.PIPE, start_new_session=True) as hook,
    ):
        assert hook.stdout is not None
        child = int(hook.stdout.readline())
        child_start = host_process.start_time_ticks(child)
        start = host_process.start_time_ticks(hook.pid)
        assert start is not None
        assert child_start is not None
        book = opened(tmp_path)
        # With another start time it is somebody else's session by now.
        book.take("hook", name="hook", pid=hook.pid, start_time=start + age)
        if age == 0:
            hook.kill()  # as the death signal does, which its child doesn't get
            hook.wait(30)
        assert journal.replay(book.path) == []
        assert host_process.is_alive(child, child_start) == (age != 0)
        assert stranger.poll() is None
        assert host_process.kill_and_wait(child, child_start, "child", 5) is None
        hook.kill()
        stranger.kill()


def test_processes_of_an_earlier_boot_are_spared(tmp_path):
    with sleeper() as child:
        start = host_process.start_time_ticks(child.pid)
        head = {"journal": 1, "boot": "another", "namespace": "n", "sandbox": "s"}
        entry = {"take": 1, "kind": "process", "name": "s", "pid": child.pid, "start_time": start}
        (tmp_path / "journal").write_text(json.dumps(head) + "\n" + json.dumps(entry) + "\n")
        assert journal.replay(str(tmp_path / "journal")) == []
        assert child.poll() is None
        child.kill()


def test_a_path_that_became_something_else_is_left(tmp_path):
    book = opened(tmp_path)
    book.take("socket", path=str(tmp_path / "s"))
    (tmp_path / "s").write_text("precious")
    assert len(journal.replay(book.path)) == 1
    assert (tmp_path / "s").read_text() == "precious"


def test_a_directory_with_content_is_left(tmp_path):
    book = opened(tmp_path)
    book.take("directory", path=str(tmp_path / "d"))
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "f").write_text("precious")
    assert "not empty" in journal.replay(book.path)[0]
    assert (tmp_path / "d" / "f").exists()


def test_two_namespaces_never_share_a_directory():
    one = StateDir.of_sandbox("/c.sock", "a", "x")
    other = StateDir.of_sandbox("/c.sock", "b", "x")
    assert one.key != other.key
    assert len(one.key) == 24


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o777])
def test_state_is_private_under_every_umask(tmp_path, mask):
    before = os.umask(mask)
    try:
        state = StateDir("k" * 24, str(tmp_path / "kata"))
        state.create()
        state.create()
    finally:
        os.umask(before)
    for path in (state.root, state.path):
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o700


def test_a_link_in_place_of_the_state_directory_is_refused(tmp_path):
    (tmp_path / "kata").mkdir()
    (tmp_path / "kata" / "key").symlink_to("/tmp")
    with pytest.raises(InvalidArgument):
        StateDir("key", str(tmp_path / "kata")).create()


def test_removal_follows_no_link(tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "f").write_text("precious")
    state = StateDir("key", str(tmp_path / "kata"))
    state.create()
    os.symlink(tmp_path / "outside", f"{state.path}/link")
    os.makedirs(f"{state.path}/share/deep")
    Path(f"{state.path}/share/deep/f").write_text("")
    assert state.remove() == []
    assert not state.exists()
    assert (tmp_path / "outside" / "f").read_text() == "precious"
    assert state.remove() == []


def test_a_socket_path_that_the_kernel_cannot_hold_is_refused(tmp_path):
    with pytest.raises(InvalidArgument, match="106"):
        StateDir("key", "/" + "x" * 100).socket("qmp.sock")


def test_waiting_for_a_dead_process_takes_no_time():
    before = time.monotonic()
    assert host_process.kill_and_wait(2**22 - 1, 1, "nobody", 1000.0) is None
    assert time.monotonic() - before < 30


@pytest.mark.parametrize("target", ["/usr", "{home}/../other", "{home}", "{home}x/a", ""])
def test_a_mount_outside_of_the_sandbox_is_never_unmounted(tmp_path, monkeypatch, target):
    from shimv2 import mounts

    unmounted = []
    monkeypatch.setattr(mounts, "detach", unmounted.append)
    book = opened(tmp_path)
    book.take("mount", target=target.format(home=tmp_path))
    book.take("mount", target=f"{tmp_path}/mounts")
    book.close()
    problems = journal.replay(str(tmp_path / "journal"))
    assert unmounted == [f"{tmp_path}/mounts"]
    assert "not of this sandbox" in problems[0]


def test_process_that_is_not_reaped_is_ending_and_a_living_one_is_not() -> None:
    with subprocess.Popen(["true"]) as child:
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert host_process.is_ending(child.pid)
    assert not host_process.is_ending(os.getpid())
