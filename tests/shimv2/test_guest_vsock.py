"""Which vsock device a machine gets, by what its VMM and the host can."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from agent_proto.vsock import HybridVsock as HybridEndpoint
from agent_proto.vsock import KernelVsock as KernelEndpoint
from hypervisors.machine import Capabilities, HybridVsock, KernelVsock, UnixVsock
from shimv2.errors import FailedPrecondition
from shimv2.guest_vsock import GuestVsock
from shimv2.kernel_vsock import KernelVsockDescriptor
from shimv2.state_dir import StateDir
from tests.harness.limitations import documented

if TYPE_CHECKING:
    from collections.abc import Callable

STATE = StateDir("key")
NONE = Capabilities(
    shared_directory=False, block_hotplug=True, net_hotplug=False, vcpu_hotplug=False,
    vcpu_unplug=False, memory_hotplug=False, pause=False, panic_event=False, hybrid_vsock=False,
    kernel_vsock=False, unix_vsock=False, max_vcpus=1, memory_step_mib=1,
)  # fmt: skip
HYBRID = replace(NONE, hybrid_vsock=True, kernel_vsock=True, unix_vsock=True)
KERNEL_OR_DAEMON = replace(NONE, kernel_vsock=True, unix_vsock=True)
KERNEL_ALONE = replace(NONE, kernel_vsock=True)


def kernel() -> KernelVsockDescriptor:
    return KernelVsockDescriptor(-1, 77)


def nothing() -> None:
    return None


@pytest.mark.parametrize(
    ("can", "offered", "device", "endpoint"),
    [
        (HYBRID, kernel, HybridVsock, HybridEndpoint),
        (KERNEL_OR_DAEMON, kernel, KernelVsock, KernelEndpoint),
        (KERNEL_OR_DAEMON, nothing, UnixVsock, HybridEndpoint),
        (KERNEL_ALONE, kernel, KernelVsock, KernelEndpoint),
    ],
)
def test_first_of_vmm_kernel_and_daemon_is_taken(
    can: Capabilities,
    offered: Callable[[], KernelVsockDescriptor | None],
    device: type,
    endpoint: type,
) -> None:
    vsock = GuestVsock.open(STATE, can, offered)
    assert type(vsock.device()) is device
    assert type(vsock.endpoint(1024)) is endpoint
    assert vsock.needs_daemon == (device is UnixVsock)
    assert vsock.has_socket == (device is not KernelVsock)


@pytest.mark.parametrize(
    ("can", "device"),
    [(HYBRID, HybridVsock), (KERNEL_OR_DAEMON, UnixVsock), (KERNEL_ALONE, KernelVsock)],
)
def test_machine_is_checked_with_a_device_that_it_may_get(can: Capabilities, device: type) -> None:
    assert type(GuestVsock.planned(STATE, can)) is device


def test_vmm_without_any_way_to_its_guest_is_refused() -> None:
    text = documented(
        "this VMM reaches its guest by the host kernel's vsock alone, and /dev/vhost-vsock gives "
        "no context id; load vhost_vsock, or use another VMM"
    )
    with pytest.raises(FailedPrecondition, match=text):
        GuestVsock.open(STATE, KERNEL_ALONE, nothing)
