"""The configuration, filled up with the host's size."""

from __future__ import annotations

import os

from shimv2.config import AgentConfig, HypervisorConfig, RuntimeConfig
from shimv2.machine_plan import host_memory_mib, plan_machine
from tests.fakes.fake_hypervisor import FakeHypervisor


def plan(**hypervisor: object):
    return plan_machine(RuntimeConfig(hypervisor=HypervisorConfig(**hypervisor)))  # type: ignore[arg-type]


def test_fractions_of_a_cpu_are_rounded_up() -> None:
    assert plan(default_vcpus=1.5).vcpus == 2
    assert plan(default_vcpus=0.1).vcpus == 1


def test_a_backends_limit_holds_on_a_host_with_more_cpus() -> None:
    can = FakeHypervisor(max_vcpus=255).capabilities(None)  # type: ignore[arg-type]  # not looked at
    made = plan(default_vcpus=300.0, default_maxvcpus=512).within(can)
    assert (made.vcpus, made.max_vcpus) == (255, 255)


def test_debugging_goes_to_the_kernel_and_the_agent_before_the_operators_own() -> None:
    config = RuntimeConfig(
        hypervisor=HypervisorConfig(enable_debug=True, kernel_params="loglevel=3"),
        agent=AgentConfig(enable_debug=True),
    )
    assert plan_machine(config).kernel_params == "loglevel=7 agent.log=debug loglevel=3"


def test_the_vmm_has_a_user_of_its_own_unless_that_is_turned_off() -> None:
    assert plan().unprivileged
    assert not plan(rootless=False).unprivileged


def test_a_negative_count_means_all_cpus_of_the_host() -> None:
    assert plan(default_vcpus=-1.0).vcpus == os.cpu_count()


def test_zero_maxima_are_the_hosts_own() -> None:
    made = plan(default_maxvcpus=0, default_maxmemory_mib=0)
    assert made.max_vcpus == max(1, os.cpu_count() or 1)
    assert made.max_memory_mib == host_memory_mib()


def test_a_maximum_is_never_below_what_the_machine_starts_with() -> None:
    made = plan(
        default_vcpus=4.0, default_maxvcpus=2, default_memory_mib=512, default_maxmemory_mib=256
    )
    assert (made.max_vcpus, made.max_memory_mib) == (4, 512)
