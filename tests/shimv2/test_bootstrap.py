"""What containerd says at start: every form of it, and everything it may get wrong."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shimv2 import bootstrap, naming
from shimv2.errors import InvalidArgument
from shimv2.pb.containerd_bootstrap_pb2 import BootstrapParams, LogLevel
from shimv2.pb.runtime_options_pb2 import Options
from ttrpc.pb.well_known_pb2 import Any

LEGACY = ["-namespace", "k8s.io", "-address", "/run/c.sock", "-publish-binary", "/c", "-id", "a1"]


def invocation(*more: str, stdin: bytes = b"", env: dict[bytes, bytes] | None = None):
    flags = bootstrap.parse_flags([*LEGACY, *more])
    return bootstrap.read_invocation(flags, env or {}, stdin=stdin)


def test_flags_are_read_as_go_reads_them():
    flags = bootstrap.parse_flags(["--namespace=n", "-debug", "--id", "x", "start", "-late"])
    assert (flags.string("namespace"), flags.string("id")) == ("n", "x")
    assert flags.boolean("debug")
    assert (flags.command, flags.rest) == ("start", ["-late"])


@pytest.mark.parametrize("text", ["-debug=false", "--debug=F", "-debug=0"])
def test_a_boolean_flag_may_carry_its_value(text):
    assert not bootstrap.parse_flags([text]).boolean("debug")


@pytest.mark.parametrize("words", [["-unknown", "x"], ["-id"], ["-debug=maybe"], ["---id", "x"]])
def test_wrong_flags_are_refused(words):
    with pytest.raises(InvalidArgument):
        bootstrap.parse_flags(words)


@given(st.lists(st.text(max_size=12), max_size=8))
def test_no_command_line_brings_the_parser_down(words):
    try:
        bootstrap.parse_flags(words)
    except InvalidArgument:
        return


@pytest.mark.parametrize("bad", ["", ".", "..", "a/b", "-a", "a--b", "a" * 77, "a b", "é", "a\n"])
def test_an_id_that_containerd_would_refuse_is_refused(bad):
    assert not naming.is_valid_id(bad)
    flags = bootstrap.parse_flags(["-namespace", "n", f"-id={bad}"])
    with pytest.raises(InvalidArgument, match="identifier"):
        bootstrap.read_invocation(flags, {})


def test_an_empty_namespace_is_refused_in_containerds_words():
    with pytest.raises(InvalidArgument, match="namespace cannot be empty"):
        bootstrap.read_invocation(bootstrap.parse_flags(["-id", "x"]), {})


def test_the_environment_fills_what_the_flags_leave_out():
    flags = bootstrap.parse_flags(["-namespace", "n", "-id", "x"])
    environment = {b"GRPC_ADDRESS": b"/g", b"TTRPC_ADDRESS": b"/t", b"SCHED_CORE": b"1"}
    found = bootstrap.read_invocation(flags, environment)
    assert (found.containerd_address, found.ttrpc_address) == ("/g", "/t")
    assert found.core_scheduling


def test_bootstrap_params_are_told_from_an_any_of_options():
    params = BootstrapParams(
        instance_id="a1",
        namespace="k8s.io",
        log_level=LogLevel.LOG_LEVEL_DEBUG,
        containerd_ttrpc_address="/new.ttrpc",
        socket_dir="/run/elsewhere",
    )
    found = invocation(stdin=params.SerializeToString(), env={b"TTRPC_ADDRESS": b"/old"})
    assert found.ttrpc_address == "/new.ttrpc"
    assert found.debug
    assert found.socket_path.startswith("/run/elsewhere/")

    options = Any(type_url="runtimeoptions.v1.Options", value=Options().SerializeToString())
    found = invocation(stdin=options.SerializeToString(), env={b"TTRPC_ADDRESS": b"/old"})
    assert found.ttrpc_address == "/old"


def test_runtime_options_are_found_in_every_form_of_standard_input():
    options = Options(config_path="/etc/kata-containers/other.toml")
    given = Any(type_url="runtimeoptions.v1.Options", value=options.SerializeToString())
    assert invocation(stdin=given.SerializeToString()).options == given.SerializeToString()
    params = BootstrapParams(instance_id="a1", namespace="k8s.io")
    assert invocation(stdin=params.SerializeToString()).options == b""
    params.extensions.add().value.CopyFrom(given)
    assert invocation(stdin=params.SerializeToString()).options == given.SerializeToString()


RECORDED_2_3 = bytes.fromhex(
    "0a026131"  # 1: instance_id "a1"
    "12066b38732e696f"  # 2: namespace "k8s.io"
    "18fcffffffffffffffff01"  # 3: log_level DEBUG, which is -4
    "220676322e332e34"  # 4: containerd_version "v2.3.4"
    "2a082f632e7474727063"  # 5: containerd_ttrpc_address "/c.ttrpc"
    "32022f63"  # 6: containerd_grpc_address "/c"
    "42160a140a0c782e76312e4f7074696f6e73"  # 8: an extension, an Any of "x.v1.Options"
    "120412022f66"  # and its value
    "4a062f72756e2f73"  # 9: socket_dir "/run/s"
)


def test_bootstrap_of_containerd_2_3_is_read_byte_by_byte():
    found = invocation(stdin=RECORDED_2_3)
    assert (found.containerd_version, found.ttrpc_address) == ("v2.3.4", "/c.ttrpc")
    assert found.debug
    assert found.options == bytes.fromhex("0a0c782e76312e4f7074696f6e73120412022f66")
    assert found.answer == (
        f'{{"version":3,"address":"unix://{found.socket_path}","protocol":"ttrpc"}}'
    )
    assert found.socket_path.startswith("/run/s/")


def test_the_same_bytes_are_options_for_another_container():
    # They decode as an Any, too: type_url "a1". What tells is that they don't repeat the id.
    flags = bootstrap.parse_flags(["-namespace", "k8s.io", "-id", "a2"])
    found = bootstrap.read_invocation(flags, {}, stdin=RECORDED_2_3)
    assert (found.containerd_version, found.answer) == ("", found.address)
    assert found.options == RECORDED_2_3


@pytest.mark.parametrize(
    ("version", "offers"),
    [("2.3.0", True), ("v2.3.4+unknown", True), ("2.4.0-beta.0", True), ("3.0", True),
     ("2.3-rc.1", True), ("2.2.9", False), ("1.7.34", False), ("", False), ("v", False),
     ("2", False), ("2.x", False), ("2.99999", False), ("²·3", False)],
)  # fmt: skip
def test_version_3_is_answered_only_where_it_is_surely_understood(version, offers):
    assert bootstrap.offers_version_3(version) is offers


@given(st.binary(max_size=200))
def test_no_standard_input_brings_start_down(data):
    assert invocation(stdin=data).id == "a1"


@given(st.binary(max_size=60), st.integers(0, 80))
def test_truncated_bootstrap_params_are_ignored_or_whole(noise, cut):
    params = BootstrapParams(instance_id="a1", namespace="k8s.io", containerd_version="2.3")
    data = params.SerializeToString() + noise
    bootstrap.bootstrap_params(data[:cut], "a1", "k8s.io")


def test_the_socket_is_named_by_address_namespace_and_sandbox():
    # Observed: containerd 2.2 SocketAddress for these arguments is the SHA-256 of the joined path.
    import hashlib

    expected = hashlib.sha256(b"/run/c.sock/k8s.io/a1").hexdigest()
    assert invocation().address == f"unix:///run/containerd/s/{expected}"
    assert len(invocation().socket_path) < 107


@pytest.mark.parametrize(
    ("path", "clean"),
    [("/a//b/./c/", "/a/b/c"), ("a/../../b", "../b"), ("", "."), ("/..", "/"), ("//x", "/x")],
)
def test_paths_are_cleaned_as_go_cleans_them(path, clean):
    assert naming.clean_path(path) == clean


def bundle(tmp_path: Path, annotations: object) -> str:
    (tmp_path / "config.json").write_text(json.dumps({"annotations": annotations}))
    return str(tmp_path)


@pytest.mark.parametrize(
    ("annotations", "kind", "sandbox"),
    [
        ({}, bootstrap.SINGLE, "a1"),
        (None, bootstrap.SINGLE, "a1"),
        ({"io.kubernetes.cri.container-type": "sandbox"}, bootstrap.SANDBOX, "a1"),
        ({"io.kubernetes.docker.type": "podsandbox"}, bootstrap.SANDBOX, "a1"),
        (
            {
                "io.kubernetes.cri-o.ContainerType": "container",
                "io.kubernetes.cri-o.SandboxID": "pod",
            },
            bootstrap.CONTAINER,
            "pod",
        ),
    ],
)
def test_a_bundle_is_classified_by_its_annotations(tmp_path, annotations, kind, sandbox):
    found = invocation("-bundle", bundle(tmp_path, annotations))
    bootstrap.classify(found)
    assert (found.kind, found.sandbox_id) == (kind, sandbox)


def test_a_bundle_without_config_is_a_sandbox(tmp_path):
    found = invocation("-bundle", str(tmp_path))
    bootstrap.classify(found)
    assert found.kind == bootstrap.SANDBOX


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "nul", '{"a":NaN}', '{"annotations":[]}', "{} x", "[" * 200_000, "\udcff",
     '{"annotations":{"io.kubernetes.cri.container-type":"pod"}}',
     '{"annotations":{"io.kubernetes.cri.container-type":"container"}}',
     '{"annotations":{"io.kubernetes.cri.container-type":"container",'
     '"io.kubernetes.cri.sandbox-id":"../x"}}'],
)  # fmt: skip
def test_a_broken_config_is_an_error_that_names_the_file(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    found = invocation("-bundle", str(tmp_path))
    with pytest.raises(InvalidArgument) as caught:
        bootstrap.classify(found)
    assert "config.json" in str(caught.value) or "annotation" in str(caught.value)


@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
))  # fmt: skip
def test_json_is_parsed_as_the_standard_library_parses_it(value):
    try:
        text = json.dumps(value, allow_nan=False)
    except ValueError:
        return
    assert bootstrap.parse_json(f" {text}\n") == json.loads(text)


def test_a_silent_pipe_does_not_hold_start_up():
    reader, writer = os.pipe()
    try:
        assert bootstrap.read_stdin(reader) == b""
        os.write(writer, b"abc")
        os.close(writer)
        assert bootstrap.read_stdin(reader) == b"abc"
    finally:
        os.close(reader)


@pytest.mark.parametrize(
    ("program", "variant"),
    [
        ("/usr/bin/containerd-shim-kata-v2", ""),
        ("/usr/bin/containerd-shim-kata-clh-v2", "clh"),
        ("containerd-shim-kata-qemu-nvidia-v2", "qemu-nvidia"),
        ("/usr/bin/containerd-shim-kata-../../x-v2", ""),
        ("/usr/bin/containerd-shim-kata--v2", ""),
        ("shimv2/__main__.py", ""),
        ("", ""),
    ],
)
def test_name_of_the_program_tells_the_variant(program, variant):
    flags = bootstrap.parse_flags(["-namespace", "n", "-id", "i", "start"])
    flags.program = program
    assert bootstrap.read_invocation(flags, {}).variant == variant
