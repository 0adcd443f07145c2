"""The directory of a VMM's user: what it can do there, and what it can't any more when it runs."""

from __future__ import annotations

import os
import socket

import pytest

from hypervisors.vmm_dir import VmmDirectory

from .vmm_user import ACCOUNT, run_as_the_vmm

pytestmark = pytest.mark.root


def test_vmm_makes_its_files_and_later_only_uses_them(tmp_path):
    directory = VmmDirectory.create(tmp_path, "vmm", ACCOUNT)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(directory.path / "v.sock_1"))
        directory.give(directory.path / "v.sock_1")
    assert run_as_the_vmm(directory.path, "echo x >made") == [0]
    directory.seal()
    assert run_as_the_vmm(directory.path, "test x = $(cat made)", "test -w v.sock_1") == [0, 0]
    refused = run_as_the_vmm(
        directory.path,
        ": >more",
        "ln -s /etc/passwd link",
        "mv made other",
        "rm -f made",
        "mkdir directory",
        "chmod 700 .",
    )
    assert 0 not in refused
    assert sorted(os.listdir(directory.path)) == ["made", "v.sock_1"]
    directory.remove()
    directory.remove()
    assert os.listdir(tmp_path) == []
