"""The images that tests and `make run` use: the same bytes every time, and what runs in them."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import tarfile
from pathlib import Path

import pytest

from tests.harness import oci_image


@pytest.fixture(autouse=True)
def needs_busybox() -> None:
    try:
        oci_image.busybox_entries()
    except oci_image.BusyboxMissing as missing:
        pytest.skip(str(missing))


def test_images_are_the_same_bytes_every_time(tmp_path: Path) -> None:
    for write in (oci_image.write_busybox_image, oci_image.write_pause_image):
        first, second = write(tmp_path / "one"), write(tmp_path / "two")
        assert first.read_bytes() == second.read_bytes()


def test_every_blob_is_named_by_its_digest_and_reachable_from_the_index(tmp_path: Path) -> None:
    with tarfile.open(oci_image.write_busybox_image(tmp_path)) as archive:
        blobs = {}
        for member in archive.getmembers():
            stream = archive.extractfile(member)
            if stream is not None and member.name.startswith("blobs/"):
                blobs[f"sha256:{Path(member.name).name}"] = stream.read()
        index_file = archive.extractfile("index.json")
        assert index_file is not None
        index = json.load(index_file)
    for digest, blob in blobs.items():
        assert digest == f"sha256:{hashlib.sha256(blob).hexdigest()}"
    (listed,) = index["manifests"]
    assert listed["annotations"]["io.containerd.image.name"] == oci_image.BUSYBOX_IMAGE
    manifest = json.loads(blobs[listed["digest"]])
    assert manifest["config"]["digest"] in blobs
    assert [layer["digest"] for layer in manifest["layers"]] == [
        digest for digest in blobs if digest not in {listed["digest"], manifest["config"]["digest"]}
    ]


def test_rootfs_has_a_shell_and_no_dangling_applet(tmp_path: Path) -> None:
    oci_image.write_rootfs(oci_image.busybox_entries(), tmp_path)
    links = [path for path in tmp_path.rglob("*") if path.is_symlink()]
    assert len(links) > 100
    assert {str(path.readlink()) for path in links} == {"/bin/busybox"}
    assert (tmp_path / "bin" / "sh").is_symlink()


def test_pause_sleeps_until_term(tmp_path: Path) -> None:
    oci_image.write_rootfs(oci_image.pause_entries(), tmp_path)
    with subprocess.Popen([tmp_path / "pause"]) as process:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
