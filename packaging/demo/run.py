"""`make run`: a real containerd, our shim, and one container in a virtual machine of its own.

The containerd is private: it lives in namespaces with its own /run, /tmp and network, so nothing of
the machine changes and one that runs here already is left alone. The default image is made on the
spot; `--image` is pulled from its registry over the host's network.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

REPOSITORY: Final = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from tests.harness import vmm  # noqa: E402
from tests.harness.configuration import runtimes  # noqa: E402
from tests.harness.containerd_daemon import ContainerdMissing, find_containerd  # noqa: E402
from tests.harness.node import Node  # noqa: E402
from tests.harness.oci_image import BUSYBOX_IMAGE, BusyboxMissing  # noqa: E402

# Where `make shim` puts a configuration for each runtime that is called after a VMM.
CONFIGURATIONS: Final = REPOSITORY / "build/etc"
MACHINES: Final = {
    "acrn": "ACRN",
    "cloud-hypervisor": "Cloud Hypervisor",
    "firecracker": "Firecracker",
    "qemu": "QEMU",
    "qemu:microvm": "QEMU microvm",
}
TIMELINE_EVENT: Final = "sandbox timeline"
PULL_S: Final = 600
BAR_WIDTH: Final = 40
ACCELERATORS: Final = {
    "kvm": "accelerated by KVM",
    "tcg": "emulated, because this host has no KVM that runs ordinary kernels",
}
# The shim's marks (shimv2/boot.py, sandbox.py, container.py) in words.
PHASES: Final = {
    "prepared": "configuration and parts checked",
    "helpers": "virtiofsd and vsock device up",
    "rootfs": "root file system mounted",
    "launch": "about to launch the VMM",
    "launched": "VMM launched",
    "kernel": "guest kernel booted",
    "agent_ready": "agent ready",
    "agent_connected": "agent connected",
    "sandbox": "sandbox made in the guest",
    "created": "container created",
    "started": "container started",
    "exited": "container exited",
}
DEFAULT_COMMAND: Final = (
    "/bin/sh",
    "-c",
    'echo "kernel $(uname -r), $(grep -c ^processor /proc/cpuinfo) CPU,'
    " $(awk '/MemTotal/ {print int($2/1024)}' /proc/meminfo) MiB of memory\";"
    ' echo "I am process $$ of a container named $(hostname)";'
    ' echo "root file system: $(awk \'$2 == "/" {print $1, $3}\' /proc/mounts)"',
)


class DemoFailed(Exception):
    """The demonstration can't go on; the text says why and what to do."""


@dataclass(frozen=True, slots=True)
class Run:
    """What one `ctr run` gave."""

    output: str
    status: int
    wall_s: float


def prerequisites() -> None:
    """Fail with the fix when something is missing that a build can't bring."""
    if os.geteuid() != 0:
        raise DemoFailed("needs root, for namespaces and mounts: sudo make run")
    for path, fix in (
        (REPOSITORY / "build/bin/containerd-shim-kata-v2", "make shim"),
        (REPOSITORY / "build/guest/vmlinux", "make guest"),
    ):
        if not path.exists():
            raise DemoFailed(f"{path} is missing: {fix}")


def choose(name: str) -> tuple[str, str]:
    """Return runtime and setup of a VMM, "" for the usual one; DemoFailed if it can't run here."""
    known = {"": ("io.containerd.kata.v2", vmm.SETUP)}
    for setup, runtime in runtimes(CONFIGURATIONS).items():
        variant = runtime.split(".")[2].removeprefix("kata-")
        for each in (setup.partition(":")[2] or setup, variant):  # its own name, the runtime's
            known[each] = (runtime, setup)
    if name not in known:
        names = ", ".join(sorted(filter(None, known)))
        raise DemoFailed(f"VMM={name} is not known; choose one of {names}")
    if why := vmm.missing(known[name][1]):
        raise DemoFailed(why)
    return known[name]


def pull(node: Node, image: str) -> None:
    """Pull `image` into the node's containerd by a ctr that has the host's network."""
    print(f"pulling {image} …", flush=True)
    inside = node.argv(["ctr", "images", "pull", *_client_side(node), image])
    inside.remove("-n")  # every namespace of the node but the network
    done = subprocess.run(
        inside, env=node.environment(), timeout=PULL_S, check=False, capture_output=True, text=True
    )
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or ["no reason given"]
        raise DemoFailed(
            f"{image} could not be pulled: {reason[0]}\n"
            "  the name must be complete (docker.io/library/alpine:latest), and its registry must"
            " answer from here; `make run` alone needs none"
        )


def _client_side(node: Node) -> list[str]:
    # Since 2.0 the daemon pulls, and it is in the node's network; --local leaves it to ctr.
    help_text = node.run(["ctr", "images", "pull", "--help"], check=False).stdout
    return ["--local"] if "--local" in help_text else []


def run_container(node: Node, image: str, command: Sequence[str], runtime: str) -> Run:
    """Run `command` in its own virtual machine, passing its output on as it comes."""
    argv = ["ctr", "run", "--rm", "--runtime", runtime, image, "hello", *command]
    print(f"$ {shlex.join(argv[:7])} …\n", flush=True)
    started = time.monotonic()
    lines = []
    process = node.popen(
        argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    with process, process.stdout as output:  # type: ignore[union-attr]  # PIPE was asked for
        for line in output:
            text = line.decode(errors="replace")
            lines.append(text)
            print(f"  | {text}", end="", flush=True)
    return Run("".join(lines), process.returncode, time.monotonic() - started)


def timeline_record(log: str) -> dict[str, object]:
    """Return the last timeline line of the shim in containerd's log."""
    records = map(_json_object, reversed(log.splitlines()))
    return next((found for found in records if found.get("event") == TIMELINE_EVENT), {})


def phases(record: Mapping[str, object]) -> dict[str, float]:
    """Return the ends of the phases in a timeline record, in milliseconds."""
    marks = ((name, at) for name, at in record.items() if isinstance(at, float))
    return {PHASES.get(name, name): at for name, at in marks}


def _json_object(line: str) -> dict[str, object]:
    start = line.find("{")
    with contextlib.suppress(ValueError):
        record = json.loads(line[start:]) if start >= 0 else None
        if isinstance(record, dict):
            return record
    return {}


def timeline_lines(ends: Mapping[str, float]) -> Iterator[str]:
    """Draw each phase from the end of the one before it to its own end."""
    ordered = sorted(ends.items(), key=lambda item: item[1])
    total = max((at for _, at in ordered), default=0.0) or 1.0
    width = max((len(name) for name, _ in ordered), default=0)
    previous = 0.0
    for name, at in ordered:
        begin = round(previous / total * BAR_WIDTH)
        length = max(1, round(at / total * BAR_WIDTH) - begin)
        bar = (" " * begin + "█" * length)[:BAR_WIDTH].ljust(BAR_WIDTH)
        yield f"  {name:<{width}}  {bar} {at:8.0f} ms  (+{at - previous:.0f})"
        previous = at


def guest_kernel(result: Run, *, is_default: bool) -> str:
    """Return the guest's kernel version as the container saw it, else as it was built."""
    words = result.output.split()
    if is_default and "kernel" in words[:-1]:
        return words[words.index("kernel") + 1].rstrip(",")
    manifest = json.loads((REPOSITORY / "build/guest/manifest.json").read_text())
    return str(manifest["kernel"]["release"])


def report(result: Run, log: str, *, is_default: bool, setup: str = "qemu") -> None:
    """Print what happened."""
    print(f"\nexit status    {result.status}")
    print(f"host kernel    {platform.release()}")
    print(f"guest kernel   {guest_kernel(result, is_default=is_default)}")
    record = timeline_record(log)
    accelerator = ACCELERATORS.get(str(record.get("accelerator")))
    if accelerator:
        print(f"machine        {MACHINES.get(setup, setup)}, {accelerator}")
    if record:
        print("timeline, from the first request for the container to the shim:")
        for line in timeline_lines(phases(record)):
            print(line)
    print(f"`ctr run` took {result.wall_s:.2f} s from start to end.")


def demonstrate(image: str | None, command: Sequence[str], name: str = "") -> int:
    """Run the container and print the report; return the exit status of the program."""
    prerequisites()
    runtime, setup = choose(name)
    is_default = image is None and not command
    with tempfile.TemporaryDirectory(prefix="kata-demo-") as logs:
        node = Node(find_containerd(1), log_directory=Path(logs))
        print("starting a private containerd …", flush=True)
        with _started(node):
            if image is not None:
                pull(node, image)
            arguments = command or (() if image is not None else DEFAULT_COMMAND)
            result = run_container(node, image or BUSYBOX_IMAGE, arguments, runtime)
            log = node.containerd.log_path.read_text(errors="replace")
            report(result, log, is_default=is_default, setup=setup)
        if is_default and result.status != 0:
            _print_failure(log)
    return result.status


@contextlib.contextmanager
def _started(node: Node) -> Iterator[None]:
    """Start the node and stop it at the end; a failed start says what its first process said."""
    try:
        node.start()
    except RuntimeError as error:
        texts = (path.read_text().strip() for path in node.log_directory.glob("*-holder.log"))
        raise DemoFailed("\n".join((str(error), *texts))) from error
    try:
        yield
    finally:
        node.stop()


def _print_failure(log: str) -> None:
    interesting = [line for line in log.splitlines() if "kata" in line or "level=error" in line]
    print("\nlast lines of containerd's log:", file=sys.stderr)
    for line in interesting[-15:]:
        print(f"  {line[:300]}", file=sys.stderr)


def main() -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="make run", description=__doc__)
    parser.add_argument("--image", help="complete image name, pulled from its registry")
    parser.add_argument("--vmm", default="", help="a VMM, as make run VMM= takes it")
    parser.add_argument("command", nargs="*", help="what to run in it; the image's own if none")
    options = parser.parse_args()
    try:
        return demonstrate(options.image, options.command, options.vmm)
    except (DemoFailed, ContainerdMissing, BusyboxMissing, AssertionError, RuntimeError) as error:
        print(f"make run: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
