"""What the runtime kata-microvm must be able to do: tests of other files, run once more with it.

Nothing but the runtime's name differs, so its link and its configuration are tested as well. A
whole run with microvm is `KATA_TEST_MACHINE_TYPE=microvm`, or `make test-kvm VMM=qemu:microvm`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.harness import vmm
from tests.harness.ctr import KATA, RUNTIME, Ctr
from tests.integration import (
    test_exec,
    test_faults,
    test_network,
    test_pause_stats_update,
    test_pod,
    test_run,
    test_terminal,
)

if TYPE_CHECKING:
    from tests.harness.node import Node

_MICROVM = "io.containerd.kata-microvm.v2"

# Fixtures.
pod = test_pod.pod
tasks = test_faults.tasks
network = test_network.pod

test_run_has_a_kernel_of_its_own = (
    test_run.test_output_and_exit_status_7_come_from_a_kernel_of_its_own
)
test_exec_statuses_streams_and_stdin = test_exec.test_exec_statuses_streams_and_stdin
test_terminal_has_size_and_sees_resize = test_terminal.test_terminal_of_run_has_size_and_sees_resize
test_pod_of_two_shares_one_vm = test_pod.test_pod_shares_one_vm_one_shim_ipc_and_uts_but_no_root
test_paused_container_stands_still = (
    test_pause_stats_update.test_paused_container_stands_still_and_goes_on
)
test_killed_vmm_means_137 = test_faults.test_killed_vmm_means_137_and_a_reason
test_guest_that_ends_itself_means_137 = (
    test_faults.test_guest_that_ends_itself_means_137_and_says_how
)


@pytest.fixture(autouse=True)
def microvm() -> None:
    """Skip where the machine can't, or where microvm is what all tests run with already."""
    if RUNTIME != KATA or vmm.SETUP != "qemu":
        pytest.skip("about another VMM")
    if why := vmm.missing("qemu:microvm"):
        pytest.skip(why)


@pytest.fixture
def ctr(node: Node) -> Ctr:
    """`ctr` with this runtime."""
    return Ctr(node, _MICROVM)


@pytest.mark.usefixtures("network")
def test_guest_has_the_pod_s_network_and_reaches_its_peer(ctr: Ctr) -> None:
    shown = test_network.inside(
        ctr, "ip addr show eth0; ping -c 2 -W 5 10.77.0.1; ping -c 2 fd77::1"
    )
    assert "10.77.0.2/24" in shown
    assert "mtu 1420" in shown
    assert shown.count(" 0% packet loss") == 2
