"""Configuration files and annotations: what is taken, what is refused, and in which words."""

from __future__ import annotations

import os
import re
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shimv2 import annotations, config, config_file
from shimv2.config import AgentConfig, HypervisorConfig, RuntimeSection, load_config
from shimv2.config_keys import IDLE, REFUSED, TABLES
from shimv2.errors import FailedPrecondition, InvalidArgument
from tests.harness.limitations import documented

ROOT = Path(__file__).resolve().parents[2]
PREFIX = "io.katacontainers.config."


@pytest.fixture
def write(tmp_path):
    def writer(text: str, name: str = "configuration.toml") -> str:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o644)
        return str(path)

    return writer


def refused(path: str, annotated: dict[str, str] | None = None) -> str:
    with pytest.raises(InvalidArgument) as caught:
        load_config(path, annotated)
    return str(caught.value)


def test_without_a_file_the_defaults_serve():
    loaded = config.RuntimeConfig()
    assert loaded.hypervisor.default_memory_mib == 2048
    assert loaded.runtime.internetworking_model == "tcfilter"


def test_values_reach_their_fields(write):
    path = write(
        """
        [hypervisor.qemu]
        kernel = "/k"
        initrd = ""
        default_vcpus = 2.5
        default_memory = 512
        [agent.kata]
        dial_timeout = 7
        reconnect_timeout_ms = 1500
        [runtime]
        create_container_timeout = 90
        internetworking_model = "macvtap"
        """
    )
    loaded = load_config(path)
    assert loaded.hypervisor.kernel == Path("/k")
    assert loaded.hypervisor.initrd is None
    assert loaded.hypervisor.default_vcpus == 2.5
    assert loaded.hypervisor.default_memory_mib == 512
    assert loaded.agent.dial_timeout_s == 7
    assert loaded.agent.reconnect_timeout_s == 1.5
    assert loaded.agent.create_container_timeout_s == 90
    assert loaded.runtime.internetworking_model == "macvtap"
    assert loaded.source == path


def test_a_key_without_effect_is_named_once_it_is_set(write):
    path = write("[hypervisor.qemu]\nvirtio_fs_queue_size = 512\nmemory_slots = 10\n")
    warnings = " ".join(load_config(path).warnings)
    assert "hypervisor.virtio_fs_queue_size has no effect here: " in warnings
    assert "memory_slots" not in warnings  # as it is without the line


def test_a_way_to_share_that_is_not_there_is_refused(write):
    text = refused(write('[hypervisor.qemu]\nshared_fs = "virtio-9p"\n'))
    assert documented('shared_fs is "virtio-9p"; known are "virtio-fs", "none"').search(text)


def test_what_this_build_does_not_offer_is_refused_by_name(write):
    text = refused(write("[hypervisor.qemu]\nconfidential_guest = true\n"))
    assert documented("confidential guests are not offered by this build").search(text)
    text = refused(write("[factory]\nenable_template = true\n"))
    assert documented("VM templates are not offered yet").search(text)


def test_both_runtimes_spellings_of_the_create_timeout_are_read(write):
    path = write("[agent.kata]\ncreate_container_timeout = 31\n")
    assert load_config(path).agent.create_container_timeout_s == 31


def test_drop_ins_are_added_in_order_of_their_names(write):
    path = write("[hypervisor.qemu]\ndefault_memory = 300\nmemory_slots = 3\n")
    write("[hypervisor.qemu]\ndefault_memory = 400\n", "config.d/20-b.toml")
    write("[hypervisor.qemu]\ndefault_memory = 500\n", "config.d/10-a.toml")
    write("nonsense", "config.d/ignored.txt")
    loaded = load_config(path)
    assert loaded.hypervisor.default_memory_mib == 400
    assert loaded.hypervisor.memory_slots == 3


def test_an_unknown_key_is_named_with_its_line_and_a_suggestion(write):
    path = write("[runtime]\n\ndisable_guest_secomp = true\n")
    text = refused(path)
    assert f"{path}:3:" in text
    assert 'did you mean "disable_guest_seccomp"?' in text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[runtim]\n", 'did you mean "runtime"?'),
        ("debug = true\n", "outside of every table"),
        ("[agent.rust]\n", "unknown table"),
        ("[hypervisor.qemu]\n[hypervisor.clh]\n", "must hold one table"),
        ("[hypervisor]\npath = '/x'\n", "must hold one table"),
        ("[hypervisor.qemu]\npath = 'qemu'\n", "absolute path"),
        ("[hypervisor.qemu]\ndefault_memory = 1\n", "it must lie in"),
        ("[hypervisor.qemu]\ndefault_memory = '2G'\n", "must be a number"),
        ("[hypervisor.qemu]\ndefault_memory = 200.5\n", "whole number"),
        ("[hypervisor.qemu]\naccelerator = 'hvf'\n", '"auto", "kvm", "tcg"'),
        ("[hypervisor.qemu]\nenable_annotations = 'all'\n", "list of strings"),
        ("[hypervisor.qemu]\nimage = '/kata.img'\n", "set `initrd`"),
        ("[hypervisor.qemu]\nenable_iommu = true\n", "not offered"),
        ("[runtime]\nenable_debug = 1\n", "true or false"),
        ("[runtime\n", "not valid TOML"),
        ("\udcff", "not valid TOML"),
    ],
)
def test_a_wrong_file_is_refused_with_a_reason(write, tmp_path, text, said):
    path = tmp_path / "configuration.toml"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    path.chmod(0o644)
    assert said in refused(str(path))


def test_keys_without_effect_are_warned_of_once(write):
    path = write("[hypervisor.qemu]\nblock_device_driver = 'virtio-scsi'\nmsize_9p = 8192\n")
    assert len(load_config(path).warnings) == 1
    assert "msize_9p" in load_config(path).warnings[0]


def test_neutral_values_of_refused_keys_are_accepted(write):
    path = write("[hypervisor.qemu]\nrootless = false\nfirmware = ''\npflashes = []\n")
    assert load_config(path).warnings == ()


@pytest.mark.parametrize("mode", [0o666, 0o664, 0o602])
def test_a_file_that_others_can_write_is_refused(write, mode):
    path = write("")
    os.chmod(path, mode)
    assert "can be written by others" in refused(path)


def test_a_file_in_a_directory_that_anybody_can_write_is_refused(write, tmp_path):
    path = write("", "open/configuration.toml")
    os.chmod(tmp_path / "open", 0o777)
    assert "anybody can write" in refused(path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_file_of_another_user_is_refused(write):
    path = write("")
    os.chown(path, 12345, 12345)
    assert "belongs to user 12345" in refused(path)


def test_what_is_no_file_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    assert "not a regular file" in refused(str(tmp_path / "fifo"))
    assert "No such file" in refused(str(tmp_path / "none"))


def test_the_environment_names_files_in_the_usual_places_only():
    usual = {config_file.VARIABLE: "/etc/kata-containers/configuration-x.toml"}
    assert config_file.find(None, usual) == usual[config_file.VARIABLE]
    for bad in ("/tmp/c.toml", "/etc/kata-containers/../../tmp/c.toml", "c.toml"):
        with pytest.raises(InvalidArgument):
            config_file.find(None, {config_file.VARIABLE: bad})


def test_no_key_has_two_meanings():
    for table, keys in TABLES.items():
        assert not set(keys) & set(REFUSED[table])
        assert not set(keys) & IDLE[table]
        assert not set(REFUSED[table]) & IDLE[table]


def test_every_used_key_sets_a_field_that_exists():
    classes = {"hypervisor": HypervisorConfig, "agent": AgentConfig, "runtime": RuntimeSection,
               "factory": config.FactoryConfig}  # fmt: skip
    for table, keys in TABLES.items():
        for row in keys.values():
            section, _, name = row[0].rpartition(".")
            assert name in {field.name for field in fields(classes[section or table])}
    for section, key in annotations.REGISTRY.values():
        assert key.field in {field.name for field in fields(classes[section])}


def shipped(name: str) -> str:
    return (ROOT / "packaging" / f"{name}.toml.in").read_text()


SHIPPED = [("qemu", "qemu"), ("clh", "cloud-hypervisor"), ("fc", "firecracker")]


@pytest.mark.parametrize(("vmm", "backend"), SHIPPED)
def test_the_shipped_template_is_valid_and_says_the_defaults(write, vmm, backend):
    text = shipped("configuration").replace("@HYPERVISOR@", shipped(f"hypervisor-{vmm}"))
    filled = re.sub(r"@[A-Z_]+@", "/usr/bin/x", text)
    assert load_config(write(filled)).warnings == ()
    uncommented = re.sub(r"(?m)^# ([a-z_]+ = )", r"\1", filled)
    loaded = load_config(write(uncommented))
    allowed = ("default_vcpus", "default_memory")
    paths = ("path", "kernel", "initrd", "guest_modules", "virtio_fs_daemon", "vsock_daemon")
    assert loaded.hypervisor.name == backend
    for field in fields(HypervisorConfig):
        if field.name not in ("name", *paths, "enable_annotations"):
            default = getattr(HypervisorConfig(), field.name)
            assert getattr(loaded.hypervisor, field.name) == default, field.name
    assert loaded.hypervisor.enable_annotations == allowed
    assert loaded.agent == AgentConfig()
    assert loaded.runtime == RuntimeSection()


@pytest.mark.parametrize("name", ["clh", "cloud-hypervisor"])
def test_either_of_katas_names_means_cloud_hypervisor_and_its_program(write, name):
    loaded = load_config(write(f"[hypervisor.{name}]\n"))
    assert loaded.hypervisor.name == "cloud-hypervisor"
    assert loaded.hypervisor.path == Path("/usr/bin/cloud-hypervisor")
    assert loaded.warnings == ()
    given = load_config(write(f'[hypervisor.{name}]\npath = "/opt/clh"\nmachine_type = "pc"\n'))
    assert given.hypervisor.path == Path("/opt/clh")
    assert "machine_type has no effect here: Cloud Hypervisor has one" in given.warnings[0]


def test_keys_of_katas_cloud_hypervisor_files_are_known(write):
    path = write(
        """
        [hypervisor.clh]
        rootfs_type = "ext4"
        default_memory = 2048
        memory_slots = 10
        shared_fs = "virtio-fs"
        virtio_fs_inode_file_handles = "prefer"
        hypervisor_loglevel = 1
        net_rate_limiter_bw_max_rate = 0
        disk_rate_limiter_ops_max_rate = 0
        disable_image_nvdimm = false
        block_device_driver = "virtio-blk"
        """
    )
    assert "virtio_fs_inode_file_handles" in load_config(path).warnings[0]
    text = refused(write("[hypervisor.clh]\ndisable_seccomp = true\n"))
    assert "the VMM's seccomp filter stays on" in text


def test_a_drop_in_for_another_hypervisor_changes_nothing_but_the_log(write):
    path = write("[hypervisor.clh]\ndefault_memory = 300\n")
    write("[hypervisor.qemu]\ndefault_memory = 400\n", "config.d/10-qemu.toml")
    write("[hypervisor.cloud-hypervisor]\ndefault_vcpus = 2\n", "config.d/20-clh.toml")
    loaded = load_config(path)
    assert loaded.hypervisor.name == "cloud-hypervisor"
    assert loaded.hypervisor.default_memory_mib == 300
    assert loaded.hypervisor.default_vcpus == 2
    assert "[hypervisor.qemu] is not for clh" in loaded.warnings[0]


def test_the_runtimes_name_chooses_the_file(write, tmp_path, monkeypatch):
    monkeypatch.setattr(config_file, "DIRECTORIES", (str(tmp_path),))
    write("[hypervisor.qemu]\n")
    write("[hypervisor.clh]\n", "configuration-clh.toml")
    assert load_config().hypervisor.name == "qemu"
    assert load_config(variant="clh").hypervisor.name == "cloud-hypervisor"
    assert load_config(write("[hypervisor.qemu]\n"), variant="clh").hypervisor.name == "qemu"
    # What is the environment's for all runtimes doesn't change one that has a file of its own.
    monkeypatch.setenv(config_file.VARIABLE, f"{tmp_path}/configuration.toml")
    assert load_config(variant="clh").hypervisor.name == "cloud-hypervisor"
    with pytest.raises(FailedPrecondition, match=r"configuration-fc\.toml"):
        load_config(variant="fc")


def gate(*names: str) -> str:
    listed = ", ".join(f'"{name}"' for name in names)
    return f"[hypervisor.qemu]\nenable_annotations = [{listed}]\n"


def test_no_annotation_counts_unless_the_operator_says_so(write):
    closed = write(gate())
    for name, (section, key) in annotations.REGISTRY.items():
        text = refused(closed, {f"{PREFIX}{name}": "1"})
        assert annotations.gate_name(name) in text, (section, key)


def test_an_unknown_annotation_changes_nothing_but_the_log(write):
    path = write(gate(".*"))
    for name in ("config_path", "hypervisor.path", "runtime.sandbox_bind_mounts", "x"):
        loaded = load_config(path, {f"{PREFIX}{name}": "/evil"})
        assert "ignored" in loaded.warnings[0]
        assert "/evil" not in repr(loaded)
    assert load_config(path, {"io.katacontainers.pkg.oci.x": "y"}).warnings == ()


def test_an_enabled_annotation_counts(write):
    path = write(gate("default_.*", "runtime.create_container_timeout"))
    loaded = load_config(
        path,
        {
            f"{PREFIX}hypervisor.default_vcpus": "3",
            f"{PREFIX}hypervisor.default_memory": "4096",
            f"{PREFIX}runtime.create_container_timeout": "120",
        },
    )
    assert loaded.hypervisor.default_vcpus == 3
    assert loaded.hypervisor.default_memory_mib == 4096
    assert loaded.agent.create_container_timeout_s == 120


def test_patterns_match_whole_names(write):
    path = write(gate("default_mem"))
    assert "not enabled" in refused(path, {f"{PREFIX}hypervisor.default_memory": "4096"})


@pytest.mark.parametrize("bad", ["", "abc", "-5", "1e999", "nan", "9" * 11, "2048.5", "9" * 5000])
def test_numbers_out_of_range_are_refused(write, bad):
    path = write(gate(".*"))
    refused(path, {f"{PREFIX}hypervisor.default_memory": bad})


@pytest.mark.parametrize(
    "bad",
    ["agent.debug_console", "init=/bin/sh", "quiet agent.log=debug", "rdinit=x", "a\nb", "-- x",
     '"init=/x"', "systemd.unit=x", "kata.ready_port=1"],
)  # fmt: skip
def test_kernel_parameters_that_choose_who_runs_are_the_operators(write, bad):
    path = write(gate("kernel_params"))
    refused(path, {f"{PREFIX}hypervisor.kernel_params": bad})


def test_a_pods_kernel_parameters_follow_the_operators(write):
    path = write(gate("kernel_params") + 'kernel_params = "a=1"\n')
    loaded = load_config(path, {f"{PREFIX}hypervisor.kernel_params": "b=2"})
    assert loaded.hypervisor.kernel_params == "a=1 b=2"


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    name=st.sampled_from(sorted(annotations.REGISTRY)) | st.text(max_size=20),
    value=st.text(max_size=40),
)
def test_no_annotation_value_becomes_a_host_path(write, name, value):
    path = write(gate(".*"))
    before = load_config(path)
    try:
        loaded = load_config(path, {f"{PREFIX}{name}": value})
    except InvalidArgument:
        return
    for field in fields(HypervisorConfig):
        found = getattr(before.hypervisor, field.name)
        if isinstance(found, Path):
            assert getattr(loaded.hypervisor, field.name) == found
