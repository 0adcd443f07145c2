"""The real program: `start`, the daemon behind it, `delete`; everything but containerd.

Sockets go to a directory of the test (BootstrapParams.socket_dir), bundles to tmp_path; the daemons
that a test started are ended by it.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import stat
import struct
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest

from shimv2 import host_process
from shimv2.journal import Journal
from shimv2.pb import containerd_task_pb2 as task
from shimv2.pb.containerd_bootstrap_pb2 import BootstrapParams
from shimv2.pb.containerd_runtime_info_pb2 import RuntimeInfo
from shimv2.state_dir import StateDir
from ttrpc.pb.ttrpc_pb2 import Request, Response

ROOT = Path(__file__).resolve().parents[2]
PURELIB = sysconfig.get_path("purelib")
NAMESPACE = "test"

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="the shim runs as root"),
]


class Shim:
    """One shim program and what it was told; `close` ends the daemon if there is one."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.program = directory / "containerd-shim-kata-v2"
        template = (ROOT / "packaging" / "containerd-shim-kata-v2.in").read_text()
        libraries = f"{str(ROOT)!r}, {PURELIB!r}"
        python = os.path.realpath(sys.executable)
        self.program.write_text(
            template.replace("@PYTHON@", python).replace("@LIBRARY_DIRS@", libraries)
        )
        self.program.chmod(0o755)
        # Short: a path of a socket ends at 107 bytes.
        self.sockets = Path(f"/run/kata-test-{os.getpid()}")
        self.address = f"{directory}/containerd.sock"
        self.pids: list[int] = []

    def bundle(self, name: str, config: str | None = '{"annotations": {}}') -> Path:
        path = self.directory / name
        path.mkdir(exist_ok=True)
        if config is not None:
            (path / "config.json").write_text(config)
        return path

    def run(
        self, bundle: Path, *words: str, container: str | None = None, stdin: bytes | None = None
    ) -> subprocess.CompletedProcess[bytes]:
        name = container or bundle.name
        if stdin is None:
            params = BootstrapParams(
                instance_id=name, namespace=NAMESPACE, socket_dir=str(self.sockets)
            )
            stdin = params.SerializeToString()
        flags = ["-namespace", NAMESPACE, "-address", self.address, "-id", name]
        done = subprocess.run(
            [self.program, *flags, *words], cwd=bundle, input=stdin, capture_output=True,
            timeout=30, check=False,
        )  # fmt: skip
        with contextlib.suppress(OSError, ValueError):
            self.pids.append(int((bundle / "shim.pid").read_text()))
        return done

    def start(self, bundle: Path, **more: str) -> str:
        done = self.run(bundle, "start", **more)
        assert (done.returncode, done.stderr) == (0, b"")
        return done.stdout.decode()

    def close(self) -> None:
        for pid in set(self.pids):
            start = host_process.start_time_ticks(pid)
            if start is not None and _is_shim(pid):
                host_process.kill_and_wait(pid, start, "shim", 5)
        for left in self.sockets.glob("*"):
            left.unlink()
        with contextlib.suppress(FileNotFoundError):
            self.sockets.rmdir()


def _is_shim(pid: int) -> bool:
    try:
        return b"containerd-shim-kata-v2" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


@pytest.fixture
def shim(tmp_path):
    made = Shim(tmp_path)
    yield made
    made.close()


def connect(address: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(20)
    connection.connect(address.removeprefix("unix://"))
    return connection


def call(
    connection: socket.socket,
    method: str,
    request,
    stream: int = 1,
    service: str = "containerd.task.v2.Task",
) -> Response:
    payload = request.SerializeToString()
    data = Request(service=service, method=method, payload=payload).SerializeToString()
    connection.sendall(struct.pack(">IIBB", len(data), stream, 1, 0) + data)
    length = struct.unpack(">I", _exactly(connection, 10)[:4])[0]
    return Response.FromString(_exactly(connection, length))


def _exactly(connection: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        chunk = connection.recv(length - len(data))
        if not chunk:
            raise EOFError
        data += chunk
    return data


def wait_gone(pid: int, deadline_s: float = 10) -> bool:
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    poller = select.poll()
    poller.register(descriptor, select.POLLIN)
    ended = bool(poller.poll(deadline_s * 1000))
    os.close(descriptor)
    return ended


def shim_pid(bundle: Path) -> int:
    return int((bundle / "shim.pid").read_text())


def state_of(shim: Shim, name: str) -> StateDir:
    return StateDir.of_sandbox(shim.address, NAMESPACE, name)


def test_start_prints_the_address_of_a_daemon_that_serves(shim):
    bundle = shim.bundle("one")
    address = shim.start(bundle)
    assert (bundle / "address").read_text() == address
    with connect(address) as connection:
        answer = call(connection, "Connect", task.ConnectRequest(id="one"))
    connected = task.ConnectResponse.FromString(answer.payload)
    assert connected.shim_pid == shim_pid(bundle)


def test_shutdown_ends_the_daemon_and_its_socket(shim):
    bundle = shim.bundle("one")
    address = shim.start(bundle)
    with connect(address) as connection:
        call(connection, "Shutdown", task.ShutdownRequest(id="one"))
        assert wait_gone(shim_pid(bundle))
    assert list(shim.sockets.glob("*")) == []
    assert not state_of(shim, "one").exists()


def test_the_daemon_holds_nothing_of_start(shim):
    bundle = shim.bundle("one")
    reader, writer = os.pipe()
    os.set_inheritable(writer, True)
    flags = ["-namespace", NAMESPACE, "-address", shim.address, "-id", "one", "start"]
    params = BootstrapParams(
        instance_id="one", namespace=NAMESPACE, socket_dir=str(shim.sockets)
    ).SerializeToString()
    child = subprocess.Popen(
        [shim.program, *flags], cwd=bundle, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, pass_fds=[writer],
    )  # fmt: skip
    os.close(writer)
    out, _ = child.communicate(params, timeout=20)
    assert out.startswith(b"unix:///")
    shim.pids.append(shim_pid(bundle))
    # communicate() saw the end of stdout; the inherited pipe has to end, too.
    assert select.select([reader], [], [], 10)[0] == [reader]
    assert os.read(reader, 1) == b""
    os.close(reader)
    fds = f"/proc/{shim_pid(bundle)}/fd"
    assert {os.readlink(f"{fds}/{n}") for n in "01"} == {"/dev/null"}


def test_the_daemon_has_its_own_session_namespace_and_directory(shim):
    bundle = shim.bundle("one")
    address = shim.start(bundle)
    with connect(address) as connection:
        call(connection, "Connect", task.ConnectRequest(id="one"))
    pid = shim_pid(bundle)
    assert os.getsid(pid) == pid
    assert os.readlink(f"/proc/{pid}/cwd") == str(bundle)
    assert os.readlink(f"/proc/{pid}/ns/mnt") != os.readlink("/proc/self/ns/mnt")
    assert len(os.listdir(f"/proc/{pid}/task")) == 1
    own = int(Path("/proc/self/oom_score_adj").read_text())
    assert int(Path(f"/proc/{pid}/oom_score_adj").read_text()) == min(own + 1, 1000)


@pytest.mark.parametrize("mask", [0o000, 0o022])
def test_socket_and_files_have_their_modes_under_every_umask(shim, mask):
    bundle = shim.bundle("one")
    before = os.umask(mask)
    try:
        address = shim.start(bundle)
    finally:
        os.umask(before)
    path = Path(address.removeprefix("unix://"))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE((bundle / "address").stat().st_mode) & 0o022 == 0o022 & ~mask & 0o644


def test_a_second_start_finds_the_living_shim(shim):
    bundle = shim.bundle("one")
    first = shim.start(bundle)
    pid = shim_pid(bundle)
    assert shim.start(bundle) == first
    assert shim_pid(bundle) == pid


def test_a_dead_shims_socket_is_replaced(shim):
    bundle = shim.bundle("one")
    first = shim.start(bundle)
    os.kill(shim_pid(bundle), signal.SIGKILL)
    assert wait_gone(shim_pid(bundle))
    assert shim.start(bundle) == first
    with connect(first) as connection:
        call(connection, "Connect", task.ConnectRequest(id="one"))


def test_a_pods_container_gets_the_sandboxs_address_and_no_process(shim):
    sandbox = shim.bundle("pod", '{"annotations": {"io.kubernetes.cri.container-type": "sandbox"}}')
    member = shim.bundle(
        "member",
        '{"annotations": {"io.kubernetes.cri.container-type": "container",'
        ' "io.kubernetes.cri.sandbox-id": "pod"}}',
    )
    address = shim.start(sandbox)
    assert shim.start(member) == address
    assert (member / "address").read_text() == address
    assert not (member / "shim.pid").exists()


@pytest.mark.parametrize(
    ("config", "words", "said"),
    [
        ("{", ["start"], "config.json is not valid JSON"),
        ("{}", ["stop"], "unknown command 'stop'"),
        ("{}", [], "no command"),
        ("{}", ["-nonsense", "start"], "flag provided but not defined"),
    ],
)
def test_a_failing_start_says_why_in_one_line_and_leaves_nothing(shim, config, words, said):
    done = shim.run(shim.bundle("one", config), *words)
    assert done.returncode == 1
    assert done.stdout == b""
    text = done.stderr.decode()
    assert text.startswith("io.containerd.kata.v2: ")
    assert said in text
    assert "\n" not in text
    assert not shim.sockets.exists() or list(shim.sockets.glob("*")) == []


def test_start_without_a_bundle_to_write_to_leaves_no_socket(shim):
    bundle = shim.bundle("one")
    (bundle / ".address").mkdir()
    done = shim.run(bundle, "start")
    assert done.returncode == 1
    assert b".address" in done.stderr or b"address" in done.stderr
    assert list(shim.sockets.glob("*")) == []


def shims_of(shim: Shim) -> list[int]:
    """Pids of all processes that run this test's copy of the program."""
    program = os.fsencode(shim.program)
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if program in Path(f"/proc/{entry}/cmdline").read_bytes():
                found.append(int(entry))
    return found


def test_a_start_that_cannot_print_leaves_no_daemon(shim):
    bundle = shim.bundle("one")
    flags = ["-namespace", NAMESPACE, "-address", shim.address, "-id", "one", "start"]
    params = BootstrapParams(
        instance_id="one", namespace=NAMESPACE, socket_dir=str(shim.sockets)
    ).SerializeToString()
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [shim.program, *flags], cwd=bundle, input=params, stdout=full,
            stderr=subprocess.PIPE, timeout=20, check=False,
        )  # fmt: skip
    assert done.returncode == 1
    assert all(wait_gone(pid) for pid in shims_of(shim))
    assert list(shim.sockets.glob("*")) == []


def test_a_hangup_does_not_end_the_daemon(shim):
    bundle = shim.bundle("one")
    with connect(shim.start(bundle)) as connection:
        call(connection, "Connect", task.ConnectRequest(id="one"))
        os.kill(shim_pid(bundle), signal.SIGHUP)
        call(connection, "Connect", task.ConnectRequest(id="one"), stream=3)


def test_version_and_info_are_answered(shim):
    version = subprocess.run([shim.program, "-v"], capture_output=True, check=True)
    assert b'id: "io.containerd.kata.v2"' in version.stdout
    info = subprocess.run([shim.program, "-info"], input=b"", capture_output=True, check=True)
    assert RuntimeInfo.FromString(info.stdout).name == "io.containerd.kata.v2"
    assert info.stderr == b""


def deleted(shim: Shim, bundle: Path, **more: str) -> task.DeleteResponse:
    done = shim.run(bundle, "-bundle", str(bundle), "delete", **more)
    assert (done.returncode, done.stderr) == (0, b"")
    return task.DeleteResponse.FromString(done.stdout)


def test_delete_with_nothing_to_do_answers_137(shim):
    answer = deleted(shim, shim.bundle("one", None))
    assert answer.exit_status == 137
    assert abs(answer.exited_at.seconds - time.time()) < 60


def test_delete_cleans_after_a_killed_shim(shim):
    bundle = shim.bundle("one", None)
    state = state_of(shim, "one")
    state.create()
    book = Journal.open(state.journal, namespace=NAMESPACE, sandbox_id="one")
    with subprocess.Popen(["sleep", "60"]) as helper:
        start = host_process.start_time_ticks(helper.pid)
        assert start is not None
        book.take("process", name="qemu", pid=helper.pid, start_time=start)
        share = str(state.directory / "share")
        book.take("directory", path=share)
        os.mkdir(share)
        book.close()
        assert deleted(shim, bundle).exit_status == 137
        assert helper.wait(30) == -signal.SIGKILL
    assert not state.exists()
    assert deleted(shim, bundle).exit_status == 137


def test_delete_ends_a_shim_that_containerd_has_given_up(shim):
    bundle = shim.bundle("one")
    shim.start(bundle)
    pid = shim_pid(bundle)
    deleted(shim, bundle)
    assert wait_gone(pid, 1)


def test_delete_of_a_pods_container_leaves_the_pod_alone(shim):
    sandbox = shim.bundle("pod", '{"annotations": {"io.kubernetes.cri.container-type": "sandbox"}}')
    member = shim.bundle(
        "member",
        '{"annotations": {"io.kubernetes.cri.container-type": "container",'
        ' "io.kubernetes.cri.sandbox-id": "pod"}}',
    )
    address = shim.start(sandbox)
    deleted(shim, member)
    with connect(address) as connection:
        call(connection, "Connect", task.ConnectRequest(id="pod"))


def test_delete_believes_no_foreign_pid_file(shim):
    bundle = shim.bundle("one")
    with subprocess.Popen(["sleep", "60"]) as bystander:
        (bundle / "shim.pid").write_text(str(bystander.pid))
        deleted(shim, bundle)
        assert bystander.poll() is None
        bystander.kill()
    shim.pids.clear()


def test_sigterm_ends_the_shim_and_leaves_nothing(shim):
    bundle = shim.bundle("one")
    address = shim.start(bundle)
    with connect(address) as connection:
        call(connection, "Connect", task.ConnectRequest(id="one"))
    os.kill(shim_pid(bundle), signal.SIGTERM)
    assert wait_gone(shim_pid(bundle))
    assert list(shim.sockets.glob("*")) == []


def test_sigusr1_writes_every_task_to_the_log(shim):
    bundle = shim.bundle("one")
    os.mkfifo(bundle / "log")
    log = os.open(bundle / "log", os.O_RDWR | os.O_NONBLOCK)
    address = shim.start(bundle)
    with connect(address) as connection:
        call(connection, "Connect", task.ConnectRequest(id="one"))
        os.kill(shim_pid(bundle), signal.SIGUSR1)
        text = ""
        while '"event":"task"' not in text:
            assert select.select([log], [], [], 10)[0] == [log], text
            text += os.read(log, 1 << 16).decode()
    os.close(log)
    assert '"event":"shim serves"' in text


FORBIDDEN = {
    "asyncio", "argparse", "structlog", "prometheus_client", "grpc", "pyroute2", "h11", "tomllib",
    "multiprocessing", "concurrent.futures", "unittest", "http.client", "xml", "difflib",
    "google.protobuf.internal.builder", "google.protobuf.text_format",
    "ssl", "idna", "ctypes.util",
}  # fmt: skip


def test_the_serving_process_keeps_its_diet(tmp_path):
    script = (
        "import sys\n"
        f"sys.path += [{str(ROOT)!r}, {PURELIB!r}]\n"
        "def audit(name, args):\n"
        "    assert name not in ('subprocess.Popen', 'os.fork', 'os.posix_spawn'), name\n"
        "sys.addaudithook(audit)\n"
        "from shimv2 import daemon\n"
        "daemon.load()\n"
        "import posix\n"
        "print(len(posix.listdir('/proc/self/fd')), len(posix.listdir('/proc/self/task')))\n"
        "print(*sys.modules)\n"
    )
    done = subprocess.run(
        [os.path.realpath(sys.executable), "-IS", "-c", script],
        capture_output=True, text=True, check=True, cwd=tmp_path,
    )  # fmt: skip
    counts, modules = done.stdout.splitlines()
    assert FORBIDDEN & set(modules.split()) == set()
    # 0, 1, 2 and the listing itself; one thread: importing leaves nothing that a fork would break.
    assert counts == "4 1"


START_ALLOWED = {"shimv2", "shimv2.bootstrap", "shimv2.errors", "shimv2.naming", "shimv2.start"}


def test_start_imports_nothing_but_built_in_modules(tmp_path):
    script = (
        "import sys\n"
        "before = set(sys.modules)\n"
        f"sys.path += [{str(ROOT)!r}]\n"
        "from shimv2 import __main__, start, bootstrap\n"
        "bootstrap.parse_json('{}')\n"
        "print(*(set(sys.modules) - before - set(sys.builtin_module_names)))\n"
    )
    done = subprocess.run(
        [os.path.realpath(sys.executable), "-IS", "-c", script],
        capture_output=True, text=True, check=True, cwd=tmp_path,
    )  # fmt: skip
    extra = set(done.stdout.split()) - START_ALLOWED - {"shimv2.__main__", "__future__", "_json"}
    assert extra == set()
