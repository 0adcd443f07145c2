"""What containerd said when it started this program: flags, environment, standard input, bundle.

`start` and `delete` run through here, so the module imports nothing that isn't built into the
interpreter: no json, re, enum, typing, os, which cost milliseconds each. JSON is read by the C
scanner alone.

Source for everything here: containerd docs/runtime-v2.md and pkg/shim/{shim,compat}.go.
"""

from __future__ import annotations

import posix
import select

from shimv2.errors import InvalidArgument, ShimError
from shimv2.naming import (
    DEFAULT_SOCKET_DIR,
    clean_path,
    is_valid_id,
    sandbox_digest,
    socket_path,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

RUNTIME_NAME = "io.containerd.kata.v2"

SINGLE, SANDBOX, CONTAINER = "single", "sandbox", "container"
"""The kinds of a bundle: a container with its own VM, a pod's first, or one that joins a pod."""

_STRING_FLAGS = frozenset(
    {"namespace", "id", "address", "publish-binary", "bundle", "socket", "debug-socket"}
)
_BOOL_FLAGS = frozenset({"debug", "v", "version", "info"})
_TRUE = frozenset({"1", "t", "T", "true", "TRUE", "True"})
_FALSE = frozenset({"0", "f", "F", "false", "FALSE", "False"})

# Source: kata virtcontainers/pkg/oci: keys in this order; values differ by whoever made the pod.
_TYPE_KEYS = (
    "io.kubernetes.cri.container-type",
    "io.kubernetes.cri-o.ContainerType",
    "io.kubernetes.docker.type",
)
_SANDBOX_ID_KEYS = (
    "io.kubernetes.cri.sandbox-id",
    "io.kubernetes.cri-o.SandboxID",
    "io.kubernetes.sandbox.id",
)
_KINDS = {"sandbox": SANDBOX, "podsandbox": SANDBOX, "container": CONTAINER}

_MAX_CONFIG_BYTES = 16 << 20
_MAX_STDIN_BYTES = 4 << 20
_STDIN_DEADLINE_MS = 500
"""containerd writes before it waits; who runs `start` by hand from a pipe doesn't hang."""


class Flags:
    """A parsed command line; `command` is empty when none was given."""

    __slots__ = ("booleans", "command", "program", "rest", "strings")

    def __init__(self) -> None:
        self.strings: dict[str, str] = {}
        self.booleans: dict[str, bool] = {}
        self.command = ""
        self.program = ""  # how it was executed
        self.rest: list[str] = []

    def string(self, name: str) -> str:
        return self.strings.get(name, "")

    def boolean(self, name: str) -> bool:
        return self.booleans.get(name, False)


class ShimInvocation:
    """Everything known when a shim starts. Set once by `read_invocation`, then only read."""

    __slots__ = (
        "bundle_path",
        "containerd_address",
        "containerd_version",
        "core_scheduling",
        "debug",
        "id",
        "kind",
        "namespace",
        "options",
        "publish_binary",
        "sandbox_id",
        "socket_dir",
        "socket_inode",
        "ttrpc_address",
        "variant",
    )

    def __init__(
        self, *, namespace: str, id: str, containerd_address: str, bundle_path: str
    ) -> None:
        self.namespace = namespace
        self.id = id
        self.containerd_address = containerd_address
        self.bundle_path = bundle_path
        self.kind = SINGLE
        self.sandbox_id = id
        self.ttrpc_address = ""
        self.publish_binary = ""
        self.containerd_version = ""
        self.options = b""  # an Any of the runtime's, encoded; empty if there are none
        self.socket_dir = ""
        self.socket_inode = 0  # what `start` bound, once it has
        self.variant = ""
        self.debug = False
        self.core_scheduling = False

    @property
    def bundle(self) -> Path:
        from pathlib import Path

        return Path(self.bundle_path)

    @property
    def digest(self) -> str:
        return sandbox_digest(self.containerd_address, self.namespace, self.sandbox_id)

    @property
    def socket_path(self) -> str:
        """Where the sandbox's shim listens: the same for every container of the sandbox."""
        return socket_path(self.digest, self.socket_dir or DEFAULT_SOCKET_DIR)

    @property
    def address(self) -> str:
        return f"unix://{self.socket_path}"

    @property
    def answer(self) -> str:
        """What `start` prints: the plain address, which every containerd understands as version 2.

        Where 3 is surely understood it is that: containerd then connects a pod's containers by
        itself instead of running `start` and `delete` for each.
        """
        if not offers_version_3(self.containerd_version):
            return self.address
        return f'{{"version":3,"address":"{self.address}","protocol":"ttrpc"}}'


def parse_flags(arguments: Sequence[str]) -> Flags:
    """Parse as Go's flag package does: `-k v`, `--k=v`, bare booleans, up to the first non-flag.

    Raises `InvalidArgument` for an unknown flag or a missing or wrong value.
    """
    flags = Flags()
    position = 0
    while position < len(arguments):
        argument = arguments[position]
        if argument == "--":
            position += 1
            break
        if len(argument) < 2 or not argument.startswith("-"):
            break
        position += 1
        name, has_value, value = argument.lstrip("-").partition("=")
        if name in _BOOL_FLAGS:
            flags.booleans[name] = _boolean(name, value) if has_value else True
        elif name not in _STRING_FLAGS or argument.startswith("---"):
            raise InvalidArgument(f"flag provided but not defined: {argument}")
        elif has_value:
            flags.strings[name] = value
        elif position < len(arguments):
            flags.strings[name] = arguments[position]
            position += 1
        else:
            raise InvalidArgument(f"flag needs an argument: -{name}")
    rest = arguments[position:]
    flags.command = rest[0] if rest else ""
    flags.rest = list(rest[1:])
    return flags


def _boolean(name: str, value: str) -> bool:
    if value in _TRUE:
        return True
    if value in _FALSE:
        return False
    raise InvalidArgument(f'invalid boolean value "{value}" for -{name}')


def read_invocation(
    flags: Flags, environment: Mapping[bytes, bytes], *, stdin: bytes = b""
) -> ShimInvocation:
    """Join flags, environment and standard input to one invocation, its kind not yet looked at.

    Flags win over BootstrapParams, and these over the environment: all three agree when containerd
    sends all three. Raises `InvalidArgument` for what is missing or malformed.
    """

    def variable(name: bytes) -> str:
        return environment.get(name, b"").decode("utf-8", "surrogateescape")

    namespace = flags.string("namespace")
    instance = flags.string("id")
    if not namespace:
        raise InvalidArgument("shim namespace cannot be empty")
    if not is_valid_id(namespace):
        raise InvalidArgument(f"namespace {namespace!r} is not a valid identifier")
    if not is_valid_id(instance):
        raise InvalidArgument(f"container id {instance!r} is not a valid identifier")
    params = bootstrap_params(stdin, instance, namespace)
    bundle = flags.string("bundle") or posix.getcwd()
    invocation = ShimInvocation(
        namespace=namespace,
        id=instance,
        containerd_address=flags.string("address") or params.get(6) or variable(b"GRPC_ADDRESS"),
        bundle_path=clean_path(bundle),
    )
    invocation.ttrpc_address = params.get(5) or variable(b"TTRPC_ADDRESS")
    invocation.publish_binary = flags.string("publish-binary")
    invocation.containerd_version = params.get(4, "")
    invocation.options = extension(stdin) if params else stdin
    invocation.socket_dir = params.get(9, "")
    invocation.debug = flags.boolean("debug") or params.get(3, "") == "debug"
    invocation.core_scheduling = variable(b"SCHED_CORE") != ""
    invocation.variant = variant_of(flags.program)
    return invocation


def variant_of(program: str) -> str:
    """Return what a runtime's name adds to ours: "clh" of containerd-shim-kata-clh-v2, else ""."""
    name = program.rpartition("/")[2]
    variant = name.removeprefix("containerd-shim-kata-").removesuffix("-v2")
    is_one = name == f"containerd-shim-kata-{variant}-v2"
    return variant if is_one and is_valid_id(variant) else ""


def classify(invocation: ShimInvocation) -> None:
    """Look into the bundle's config.json and set the kind and the sandbox's id.

    No config.json means a sandbox: containerd's sandboxer `shim` writes none. Raises
    `InvalidArgument` for an unreadable one.
    """
    path = f"{invocation.bundle_path}/config.json"
    try:
        data = _read_file(path)
    except FileNotFoundError:
        invocation.kind = SANDBOX
        return
    except OSError as error:
        raise InvalidArgument(f"{path}: {error.strerror}") from error
    invocation.kind, sandbox_id = kind_of(annotations_of(data, path))
    if invocation.kind == CONTAINER:
        invocation.sandbox_id = sandbox_id
        if not is_valid_id(sandbox_id):
            raise InvalidArgument(f"{path}: sandbox id {sandbox_id!r} is not a valid identifier")


def kind_of(annotations: Mapping[str, str]) -> tuple[str, str]:
    """Return what a bundle with these annotations is, and the sandbox it names (or "")."""
    kind = SINGLE
    for key in _TYPE_KEYS:
        value = annotations.get(key)
        if value is not None:
            if value not in _KINDS:
                raise InvalidArgument(f"annotation {key}: unknown container type {value!r}")
            kind = _KINDS[value]
            break
    sandbox_id = next((annotations[key] for key in _SANDBOX_ID_KEYS if key in annotations), "")
    if kind == CONTAINER and not sandbox_id:
        raise InvalidArgument("a pod's container names no sandbox in its annotations")
    return kind, sandbox_id


def annotations_of(data: bytes, path: str) -> dict[str, str]:
    """Return the annotations of an OCI spec; raises `InvalidArgument` for what isn't one."""
    try:
        spec = parse_json(data.decode("utf-8"))
    except ValueError as error:
        raise InvalidArgument(f"{path} is not valid JSON: {error}") from error
    if not isinstance(spec, dict):
        raise InvalidArgument(f"{path} is not a JSON object")
    annotations = spec.get("annotations")
    if annotations is None:
        return {}
    if not isinstance(annotations, dict):
        raise InvalidArgument(f"{path}: annotations is not an object")
    return {key: value for key, value in annotations.items() if isinstance(value, str)}


class _ScannerContext:
    """What `_json`'s scanner asks of a json.JSONDecoder, so that `json` (and `re`) stay out."""

    strict = True
    object_hook = None
    object_pairs_hook = None
    parse_float = float
    parse_int = int

    def __init__(self) -> None:
        self.memo: dict[str, str] = {}

    @staticmethod
    def parse_constant(name: str) -> float:
        raise ValueError(f"{name} is not JSON")


def parse_json(text: str) -> object:
    """Parse one JSON document. Raises ValueError."""
    from _json import make_scanner

    scan = make_scanner(_ScannerContext())  # type: ignore[arg-type]  # C looks at attributes only
    blank = " \t\n\r"
    stripped = text.lstrip(blank)
    try:
        value, end = scan(stripped, 0)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except (StopIteration, SystemError) as error:
        # The scanner takes its exception out of the loaded `json`, and fails without one.
        import json

        json.loads(text)
        raise ValueError("not JSON") from error
    if stripped[end:].strip(blank):
        raise ValueError(f"more text after its end, at character {end}")
    return value  # type: ignore[no-any-return,unused-ignore]


def read_stdin(descriptor: int = 0) -> bytes:
    """Return what containerd wrote, or nothing: never waits for a terminal or a silent pipe."""
    try:
        mode = posix.fstat(descriptor).st_mode & 0o170000
    except OSError:
        return b""
    if mode == 0o020000:  # /dev/null or a terminal
        return b""
    chunks: list[bytes] = []
    total = 0
    poller = select.poll()
    poller.register(descriptor, select.POLLIN | select.POLLHUP)
    while total < _MAX_STDIN_BYTES and poller.poll(_STDIN_DEADLINE_MS):
        chunk = posix.read(descriptor, 65536)
        if not chunk:
            break
        chunks.append(chunk)
        total += len(chunk)
    return b"".join(chunks)


def bootstrap_params(data: bytes, instance: str, namespace: str) -> dict[int, str]:
    """Return the string fields of a BootstrapParams by number; none if `data` is anything else.

    A BootstrapParams also decodes as the Any of older containerds (id as type URL), so what tells
    them apart is that it repeats the command line. Source: containerd pkg/shim/compat.go.
    """
    texts: dict[int, str] = {}
    try:
        for number, value in _fields(data):
            if isinstance(value, bytes):
                if number in (1, 2, 4, 5, 6, 7, 9):
                    texts[number] = value.decode("utf-8")
            elif number == 3:
                # An enumeration is sign-extended to 64 bits: DEBUG is -4, TRACE is -8.
                texts[3] = "debug" if value >= 1 << 63 else ""
    except ValueError:
        return {}
    if texts.get(1) != instance or texts.get(2) != namespace:
        return {}
    return texts


def extension(data: bytes) -> bytes:
    """Return the first extension of a BootstrapParams: the runtime options, as an Any."""
    for number, value in _fields(data):
        if number == 8 and isinstance(value, bytes):
            return next((v for n, v in _fields(value) if n == 1 and isinstance(v, bytes)), b"")
    return b""


def offers_version_3(containerd_version: str) -> bool:
    """Tell whether containerd surely takes a bootstrap of Task API version 3: from 2.3 on.

    1.7 and 2.0 to 2.2 look the same at `start`, where they don't say their version, and 1.7 refuses
    it. Source: containerd pkg/shim/compat.go, core/runtime/v2/binary.go.
    """
    major, _, rest = containerd_version.removeprefix("v").partition(".")
    minor = rest.partition(".")[0].partition("-")[0]
    if not (major.isdecimal() and minor.isdecimal()) or len(major) > 3 or len(minor) > 3:
        return False
    return (int(major), int(minor)) >= (2, 3)


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Walk the top level of a protobuf message; raises ValueError where it isn't one."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        wire = key & 7
        if wire == 0:
            value, position = _varint(data, position)
            yield key >> 3, value
            continue
        if wire == 2:
            length, position = _varint(data, position)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError("not a protobuf message")
        if position + length > len(data):
            raise ValueError("truncated")
        yield key >> 3, data[position : position + length]
        position += length


def _varint(data: bytes, position: int) -> tuple[int, int]:
    result = 0
    for shift in range(0, 70, 7):
        if position >= len(data):
            raise ValueError("truncated")
        byte = data[position]
        position += 1
        result |= (byte & 0x7F) << shift
        if byte < 0x80:
            return result, position
    raise ValueError("varint too long")


def _read_file(path: str) -> bytes:
    descriptor = posix.open(path, posix.O_RDONLY | posix.O_CLOEXEC | posix.O_NONBLOCK)
    try:
        size = posix.fstat(descriptor).st_size
        if size > _MAX_CONFIG_BYTES:
            raise InvalidArgument(f"{path}: {size} bytes are more than any OCI spec needs")
        chunks: list[bytes] = []
        while chunk := posix.read(descriptor, 1 << 20):
            chunks.append(chunk)
        return b"".join(chunks)
    finally:
        posix.close(descriptor)


__all__ = [
    "CONTAINER",
    "RUNTIME_NAME",
    "SANDBOX",
    "SINGLE",
    "Flags",
    "ShimError",
    "ShimInvocation",
    "annotations_of",
    "bootstrap_params",
    "classify",
    "extension",
    "kind_of",
    "offers_version_3",
    "parse_flags",
    "parse_json",
    "read_invocation",
    "read_stdin",
    "variant_of",
]
