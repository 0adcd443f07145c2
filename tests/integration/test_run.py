"""`ctr run` to the end: output, exit status, process settings."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.harness.ctr import KATA, RUNTIME, Ctr, fresh_id
from tests.harness.oci_image import busybox_entries, write_rootfs
from tests.harness.patience import patient

if TYPE_CHECKING:
    from tests.harness.node import Node


def test_run_of_true_exits_0_and_prints_nothing(ctr: Ctr) -> None:
    done = ctr.run(fresh_id("true"), "true")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.smoke
def test_output_and_exit_status_7_come_from_a_kernel_of_its_own(ctr: Ctr) -> None:
    boot_id = "/proc/sys/kernel/random/boot_id"
    done = ctr.run(fresh_id("seven"), "sh", "-c", f"cat {boot_id}; echo oops >&2; exit 7")
    assert (done.returncode, done.stderr) == (7, "oops\n")
    if RUNTIME == KATA:
        assert done.stdout not in ("", Path(boot_id).read_text())


def test_init_that_kills_itself_exits_137(ctr: Ctr) -> None:
    # The first process of a pid namespace can be killed from outside only: let its parent see it.
    done = ctr.run(fresh_id("killed"), "sh", "-c", 'sh -c "kill -9 \\$\\$"; exit $?')
    assert done.returncode == 137, done.stderr


def test_init_killed_from_outside_exits_137(ctr: Ctr) -> None:
    container = fresh_id("victim")
    with ctr.popen(container, "sh", "-c", "echo up; exec sleep 1000", stdout=-1) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        ctr.task("kill", "-s", "SIGKILL", container)
        assert process.wait(patient(20)) == 137


def test_process_settings_are_kept(ctr: Ctr) -> None:
    done = ctr.run(
        fresh_id("settings"),
        "sh",
        "-c",
        'pwd; echo "$COLOUR"; id -u; printf "%s|" "$@"; echo; '
        "cat /proc/self/oom_score_adj >/dev/null; cat /proc/1/comm; ls -ld /tmp",
        "argv0",
        "a b",
        "ü",
        "",
        options=["--rm", "--cwd", "/var", "--env", "COLOUR=dark blue"],
    )
    lines = done.stdout.splitlines()
    assert lines[:5] == ["/var", "dark blue", "0", "a b|ü||", "sh"], done
    assert lines[5].startswith("drwxrwxrwt")


@pytest.mark.needs("shared_directory")
def test_rootfs_directory_is_used_in_place(node: Node, ctr: Ctr) -> None:
    write_rootfs(busybox_entries(), node.path("/tmp/root"))
    container = fresh_id("rootfs")
    done = node.run(
        [
            "ctr",
            "run",
            "--rm",
            "--runtime",
            ctr.runtime,
            "--rootfs",
            "/tmp/root",
            container,
            "/bin/sh",
            "-c",
            "echo written >/made-inside; exit 3",
        ],
        check=False,
    )
    assert done.returncode == 3, done.stderr
    assert node.path("/tmp/root/made-inside").read_text() == "written\n"
    node.run(["rm", "-r", "/tmp/root"])


@pytest.mark.parametrize("snapshotter", ["native", "overlayfs"])
def test_each_snapshotter_gives_a_writable_root(ctr: Ctr, snapshotter: str) -> None:
    done = ctr.run(
        fresh_id(snapshotter),
        "sh",
        "-c",
        "echo x >/new && cat /new && rm /etc/passwd",
        options=["--rm", "--snapshotter", snapshotter],
    )
    assert (done.returncode, done.stdout) == (0, "x\n"), done.stderr


def test_read_only_root_refuses_writes(ctr: Ctr) -> None:
    done = ctr.run(
        fresh_id("readonly"), "sh", "-c", "echo x >/new", options=["--rm", "--read-only"]
    )
    assert done.returncode != 0
    assert "Read-only file system" in done.stderr


def test_command_that_does_not_exist_is_named(ctr: Ctr) -> None:
    container = fresh_id("nocommand")
    done = ctr.run(container, "/no/such/command")
    assert done.returncode != 0
    assert "/no/such/command" in done.stderr
    ctr.remove(container)
