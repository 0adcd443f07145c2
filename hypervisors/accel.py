"""Which accelerators and vsock transports this host really has."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final, Literal

from .errors import PreconditionFailed, Unsupported

KVM_DEVICE: Final = Path("/dev/kvm")
ACRN_DEVICE: Final = Path("/dev/acrn_hsm")
VHOST_VSOCK_DEVICE: Final = Path("/dev/vhost-vsock")
CPUINFO: Final = Path("/proc/cpuinfo")
# One processor's block is below 4 KiB; a 256-CPU host would make the whole file half a megabyte.
CPUINFO_HEAD_BYTES: Final = 8192


def kvm_problem(device: Path = KVM_DEVICE, cpuinfo: Path = CPUINFO) -> str | None:
    """Say why KVM cannot run an ordinary kernel here, or None when it can.

    A device that opens is not enough: there are hosts whose paravirtual KVM opens and then hangs
    every ordinary kernel. Such a host's CPU shows neither vmx nor svm.
    """
    try:
        os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return f"{device} does not open: {error.strerror}"
    with open(cpuinfo, "rb") as stream:
        head = stream.read(CPUINFO_HEAD_BYTES)
    for line in head.splitlines():
        if line.startswith(b"flags") and {b"vmx", b"svm"} & set(line.split()):
            return None
    return f"{device} opens, but the CPU shows neither vmx nor svm"


def tsc_khz(cpuinfo: Path = CPUINFO) -> int | None:
    """Say how fast this host's time stamp counter runs, or None where nothing tells it surely.

    An emulated CPU has the host's counter. "cpu MHz" is the counter's frequency where a hypervisor
    has told it to the host's kernel and nothing measures the CPU's changing one (aperfmperf).
    """
    with open(cpuinfo, "rb") as stream:
        head = stream.read(CPUINFO_HEAD_BYTES)
    rows: dict[bytes, bytes] = {}
    for line in head.splitlines():
        name, _, value = line.partition(b":")
        rows.setdefault(name.strip(), value.strip())
    flags = set(rows.get(b"flags", b"").split())
    if not {b"hypervisor", b"constant_tsc", b"tsc_known_freq"} <= flags or b"aperfmperf" in flags:
        return None
    try:
        return round(float(rows[b"cpu MHz"]) * 1000)
    except (KeyError, ValueError):
        return None


def choose_accelerator(wanted: str) -> Literal["kvm", "tcg"]:
    """Resolve "auto", "kvm" or "tcg" to what will be used.

    Raises:
        PreconditionFailed: "kvm" was asked for and does not work here.
    """
    if wanted == "tcg":
        return "tcg"
    problem = kvm_problem()
    if problem is None:
        return "kvm"
    if wanted == "auto":
        return "tcg"
    raise PreconditionFailed(
        "KVM",
        path=None,
        why=problem,
        fix='load kvm_intel or kvm_amd, or set the accelerator to "auto"',
    )


def acrn_problem(device: Path = ACRN_DEVICE) -> str | None:
    """Say why this host can ask no ACRN hypervisor for machines, or None when it can."""
    try:
        os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return f"{device} does not open: {error.strerror}"
    return None


def require_kvm(backend: str, title: str, wanted: str) -> None:
    """Refuse a machine of a VMM that runs guests on KVM only.

    Raises:
        Unsupported: another accelerator was asked for.
        PreconditionFailed: KVM does not work here.
    """
    if wanted == "tcg":
        raise Unsupported(
            backend,
            "emulate a processor",
            "it runs guests on KVM only",
            'set accelerator to "auto", or use QEMU ([hypervisor.qemu])',
        )
    problem = kvm_problem()
    if problem is not None:
        raise PreconditionFailed(
            f"KVM, without which {title} runs nothing",
            path=None,
            why=problem,
            fix="load kvm_intel or kvm_amd, or use QEMU, which emulates ([hypervisor.qemu])",
        )


def kernel_vsock_usable(device: Path = VHOST_VSOCK_DEVICE) -> bool:
    """Whether the host kernel offers AF_VSOCK to its guests."""
    try:
        os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC))
    except OSError:
        return False
    return True
