"""Real machines under Cloud Hypervisor: what only it does. The rest is the contract's.

Needs its program and KVM (`python -m tests.kvm_node`).
"""

from __future__ import annotations

from pathlib import Path

import pytest

from hypervisors.accel import KVM_DEVICE
from hypervisors.errors import HttpRejected
from hypervisors.isolation import has_landlock, machine_account
from tests.harness import vmm

from . import machines
from .machines import find, says

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.root,
    pytest.mark.kvm,
    pytest.mark.skipif(
        bool(vmm.missing("cloud-hypervisor")), reason=vmm.missing("cloud-hypervisor") or "-"
    ),
]


def running(spec, records):
    return machines.running("cloud-hypervisor", spec, records)


@pytest.fixture
def make_spec(make_spec):
    def make(*args, **changes):
        return make_spec(*args, **{"binary": vmm.find_program("cloud-hypervisor"), **changes})

    return make


async def test_threads_have_their_own_filters(make_spec, records):
    async with running(make_spec(), records) as machine:
        tasks = Path(f"/proc/{machine.pid}/task")
        threads = [path.read_text() for path in tasks.glob("*/status")]  # noqa: ASYNC240
        confined = [find(text, "Name:")[0] for text in threads if "Seccomp:\t2" in text]
        assert {"vmm", "vcpu0", "http-server"} <= set(confined)
        assert machine_account("test", "kvm"), f"only root may open this host's {KVM_DEVICE}"


async def test_shutdown_lets_it_flush_its_disks(make_spec, records):
    async with running(make_spec(), records) as machine:
        ending = await machine.shutdown(0.1)
    assert "quit" in ending.reason


async def test_guest_keeps_the_memory_it_has(make_spec, records):
    async with running(make_spec(), records) as machine:
        await says(machine, "GUEST-READY")
        assert await machine.resize_memory(500) == 512
        assert await machine.resize_memory(256) == 512
        await machine.pause()
        with pytest.raises(HttpRejected):
            await machine.pause()
        await machine.resume()


async def test_vmm_owns_no_directory_once_it_runs(make_spec, records):
    spec = make_spec()
    if machine_account(spec.id, "kvm") is None:
        pytest.skip("only root may use KVM here")
    async with running(spec, records):
        status = (spec.run_dir / "clh").stat()
        assert (status.st_uid, status.st_mode & 0o7777) == (0, 0o710)


@pytest.mark.skipif(not has_landlock(), reason="this kernel has no Landlock of version 3")
async def test_vmm_sees_no_file_that_it_was_not_told_of(make_spec, records, disk):
    async with running(make_spec(), records) as machine:
        with pytest.raises(HttpRejected):
            await machine._devices._plug(
                "vm.add-disk", "d", {"id": "d", "path": str(disk), "image_type": "Raw"}, ()
            )
