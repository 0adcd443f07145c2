"""The image as a whole: two builds are equal, and it holds what the agent relies on."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

import pytest

from guest.image import build, kernel, on_demand

CACHE = Path(
    os.environ.get("KATA_CACHE")
    or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "kata-shimv2")
)
NEEDED = ("apt-cache", "dpkg-deb", "depmod")

pytestmark = pytest.mark.skipif(
    any(shutil.which(tool, path=os.environ["PATH"] + ":/usr/sbin") is None for tool in NEEDED)
    or not list(CACHE.glob("linux-image-*")),
    reason="needs the tools of `make setup` and the kernel package of `make guest`",
)


@pytest.fixture
def agent(tmp_path: Path) -> Path:
    path = tmp_path / "agent"
    path.write_text("#!/bin/sh\necho agent 1.2.3\n")
    path.chmod(0o755)
    return path


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> kernel.KernelPackage:
    return kernel.fetch(CACHE, tmp_path_factory.mktemp("kernel"))


def test_two_builds_give_the_same_bytes(agent: Path, tmp_path: Path) -> None:
    manifests = [build.build(agent, tmp_path / name, CACHE) for name in ("one", "two")]
    assert manifests[0] == manifests[1]
    assert manifests[0]["agent"]["version"] == "agent 1.2.3"
    modules = [
        path.relative_to(tmp_path / "one") for path in (tmp_path / "one").glob("modules/*/*")
    ]
    assert len(modules) > 100
    for name in ("vmlinux", "initrd.img", "manifest.json", *modules):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_rebuild_replaces_its_release_and_leaves_others_to_the_sandboxes_that_have_them(
    agent: Path, package: kernel.KernelPackage, tmp_path: Path
) -> None:
    modules = tmp_path / "modules"
    others = (package.release, "1.2.3-old", f".{package.release}.1")  # the last: another build's
    for name in others:
        (modules / name).mkdir(parents=True)
        (modules / name / "stale.ko").touch()
    made = build.build(agent, tmp_path, CACHE)["modules"]["files"]
    assert {path.name for path in modules.iterdir()} == set(others)
    assert len(list((modules / package.release).iterdir())) == made
    assert not (modules / package.release / "stale.ko").exists()
    assert all((modules / name / "stale.ko").exists() for name in others[1:])


def test_modules_are_listed_after_what_they_depend_on(package: kernel.KernelPackage) -> None:
    order = [path.name.split(".")[0].replace("-", "_") for path in kernel.module_order(package)]
    assert len(order) == len(set(order))
    for module, dependency in (
        ("virtio_pci", "virtio"),
        ("vmw_vsock_virtio_transport", "vsock"),
        ("virtiofs", "fuse"),
        ("pvpanic_pci", "pvpanic"),
        ("virtio_net", "net_failover"),
    ):
        if dependency in order:  # a kernel may have it built in
            assert order.index(dependency) < order.index(module)


def test_initrd_holds_agent_and_every_listed_module(
    agent: Path, package: kernel.KernelPackage
) -> None:
    inputs = build.Inputs(init=agent.read_bytes(), kernel=package)
    tree, modules = build.initrd_tree(inputs)
    assert tree.entries["init"].mode == stat.S_IFREG | 0o755
    assert stat.S_ISCHR(tree.entries["dev/console"].mode)
    assert tree.entries["dev/null"].device == (1, 3)  # for programs that find no console
    listed = tree.entries["etc/modules"].data.decode().split()
    assert [Path(path).name for path in listed] == modules
    assert all(path.strip("/") in tree.entries for path in listed)


def test_modules_on_demand_are_complete_and_only_what_pods_have_a_use_for(
    package: kernel.KernelPackage,
) -> None:
    files = on_demand.files(package)
    index = dict(line.split(":") for line in files["modules.dep"].decode().splitlines())
    assert set(index) == set(files) - {"modules.dep", "modules.alias"}
    assert all(needed in files for line in index.values() for needed in line.split())
    builtin = (package.root / f"lib/modules/{package.release}/modules.builtin").read_text()
    for name in ("tun", "nf_tables", "ip_tables", "nbd", "wireguard", "overlay"):
        assert f"{name}.ko" in files or f"/{name}.ko" in builtin, name
    # Families that any process can make the kernel ask for, and few have a use for.
    for name in ("rds", "tipc", "dccp", "smc", "af_alg", "algif_aead", "kvm", "can"):
        assert f"{name}.ko" not in files, name
    aliases = dict(line.split() for line in files["modules.alias"].decode().splitlines())
    assert aliases.get("char_major_10_200", "tun") == "tun"


def test_failed_build_leaves_the_output_alone(tmp_path: Path) -> None:
    output = tmp_path / "output"
    with pytest.raises(FileNotFoundError):
        build.build(tmp_path / "no-agent", output, CACHE)
    assert not output.exists()


def test_missing_agent_is_one_sentence_and_status_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--agent", str(tmp_path / "no-agent"), "--output", str(tmp_path / "out")]
    assert build.main([*arguments, "--cache", str(CACHE)]) == 1
    assert "no-agent" in capsys.readouterr().err
