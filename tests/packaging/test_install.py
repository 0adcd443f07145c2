"""What `make install` writes, and that it runs with nothing of the checkout in sight."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness.containerd_daemon import ContainerdMissing, find_containerd
from tests.harness.node import BUILD, REPOSITORY, Node

BUILT = (BUILD / "guest" / "vmlinux", BUILD / "bin" / "vhost-device-vsock")
CONFIGURATION = "etc/kata-containers/configuration.toml"

pytestmark = pytest.mark.skipif(
    not all(path.exists() for path in BUILT), reason="needs `make setup guest`"
)


def install(destination: Path) -> str:
    """Run the installer as `make install` does; return what it printed."""
    installer = REPOSITORY / "packaging" / "install.py"
    done = subprocess.run(
        [sys.executable, installer, "install", "--destdir", destination],
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    destination = tmp_path_factory.mktemp("installed")
    install(destination)
    return destination


def test_every_place_the_readme_names_is_filled(installed: Path) -> None:
    for path in (
        "usr/bin/containerd-shim-kata-v2",
        "usr/lib/kata-shimv2/shimv2/__main__.py",
        "usr/lib/kata-shimv2/trio/__init__.py",
        CONFIGURATION,
        "etc/kata-containers/configuration-acrn.toml",
        "etc/kata-containers/configuration-clh.toml",
        "etc/kata-containers/configuration-fc.toml",
        "usr/bin/containerd-shim-kata-acrn-v2",
        "usr/bin/containerd-shim-kata-clh-v2",
        "usr/bin/containerd-shim-kata-fc-v2",
        "usr/share/kata-containers/bzImage",
        "etc/kata-containers/configuration-microvm.toml",
        "usr/bin/containerd-shim-kata-microvm-v2",
        "usr/share/kata-containers/vmlinux",
        "usr/share/kata-containers/initrd.img",
        "usr/libexec/kata-shimv2/vhost-device-vsock",
        "usr/share/doc/kata-shimv2/containerd-kata.toml",
    ):
        assert (installed / path).is_file(), path
    # One directory for each kernel that `make guest` has had since the last `make clean`.
    modules = list((installed / "usr/share/kata-containers/modules").iterdir())
    assert modules
    assert all((directory / "modules.dep").is_file() for directory in modules)


def test_installed_shim_knows_its_commit(installed: Path) -> None:
    shim = installed / "usr/bin/containerd-shim-kata-v2"
    library = installed / "usr/lib/kata-shimv2"
    moved = shim.read_text().replace("/usr/lib/kata-shimv2", str(library))
    program = shim.with_name("shim-elsewhere")
    program.write_text(moved)
    program.chmod(0o755)
    done = subprocess.run([program, "-v"], capture_output=True, text=True, check=True)
    git = ["git", "rev-parse", "--short=12", "HEAD"]
    expected = "unknown"
    if shutil.which("git"):
        asked = subprocess.run(git, cwd=REPOSITORY, capture_output=True, text=True, check=False)
        expected = asked.stdout.strip() or expected
    assert f"commit: {expected}" in done.stdout


def test_every_module_has_bytecode_that_needs_no_check(installed: Path) -> None:
    library = installed / "usr/lib/kata-shimv2"
    sources = {path for path in library.rglob("*.py") if "__pycache__" not in path.parts}
    compiled = list(library.rglob("*.pyc"))
    assert len(compiled) == len(sources)
    # Source: PEP 552: flags 0b01 mean a hash that is not compared with the source.
    assert {path.read_bytes()[4] for path in compiled} == {1}


def test_no_path_of_the_checkout_or_of_destdir_is_installed(installed: Path) -> None:
    for path in ("usr/bin/containerd-shim-kata-v2", CONFIGURATION):
        text = (installed / path).read_text()
        assert str(REPOSITORY) not in text
        assert str(installed) not in text
        assert "@" not in text


def test_edited_configuration_stays_and_the_new_one_lies_beside_it(tmp_path: Path) -> None:
    install(tmp_path)
    target = tmp_path / CONFIGURATION
    edited = target.read_text() + "# mine\n"
    target.write_text(edited)
    assert "was edited and stays" in install(tmp_path)
    assert target.read_text() == edited
    assert target.with_name("configuration.toml.new").is_file()


def test_installing_again_replaces_the_library_as_a_whole(tmp_path: Path) -> None:
    install(tmp_path)
    stale = tmp_path / "usr/lib/kata-shimv2/shimv2/removed_module.py"
    stale.write_text("")
    assert "was edited" not in install(tmp_path)
    assert not stale.exists()


def test_installed_shim_follows_the_library_s_link_once(installed: Path) -> None:
    library = installed / "usr/lib/kata-shimv2"
    launcher = (installed / "usr/bin/containerd-shim-kata-v2").read_text()
    text = launcher.replace("/usr/lib/kata-shimv2", str(library)).partition("from shimv2")[0]
    shown = subprocess.run(
        [sys.executable, "-IS", "-c", text + "print(*sys.path, sep=chr(10))"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert str(library.resolve()) in shown.stdout.splitlines()
    assert str(library) not in shown.stdout.splitlines()
    assert library.resolve() != library


@pytest.mark.root
def test_running_sandbox_keeps_the_modules_that_it_has_bound(tmp_path: Path) -> None:
    install(tmp_path)
    modules = tmp_path / "usr/share/kata-containers/modules"
    bound = tmp_path / "bound"
    bound.mkdir()
    hold = 'mount --bind "$0" "$1" && echo bound && exec cat'
    with subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", hold, modules, bound],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as sandbox:
        assert sandbox.stdout is not None
        assert sandbox.stdout.readline() == b"bound\n"
        inode = modules.stat().st_ino
        install(tmp_path)
        install(tmp_path)
        assert modules.stat().st_ino != inode
        (release,) = Path(f"/proc/{sandbox.pid}/root{bound}").iterdir()
        assert (release / "modules.dep").is_file()
        (replaced,) = modules.parent.glob(".modules.*")
        assert replaced.stat().st_ino == inode
        sandbox.communicate(b"")
    install(tmp_path)
    assert not list(modules.parent.glob(".modules.*"))
    assert len(list(modules.iterdir())) == 1


@pytest.mark.root
@pytest.mark.e2e
def test_installed_shim_runs_a_container_without_the_checkout(installed: Path) -> None:
    try:
        node = Node(find_containerd(1))
    except ContainerdMissing as missing:
        pytest.skip(str(missing))
    kept = BUILD / "tests" / "installed"
    script = (
        "mkdir -p /run/over/upper /run/over/work && "
        f"mount -t overlay overlay -o lowerdir={kept}/usr:/usr,"
        "upperdir=/run/over/upper,workdir=/run/over/work /usr && "
        f"cp {kept}/{CONFIGURATION} /{CONFIGURATION} && mount -t tmpfs none {REPOSITORY}"
    )
    install(kept)
    with node:
        node.run(["sh", "-c", script])
        runtime = ["--runtime", "/usr/bin/containerd-shim-kata-v2"]
        image = "docker.io/library/busybox:latest"
        done = node.run(["ctr", "run", "--rm", *runtime, image, "installed", "uname", "-r"])
    assert "cloud-amd64" in done.stdout
