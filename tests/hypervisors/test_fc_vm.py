"""Real machines under Firecracker: what only it does. The rest is the contract's.

Needs its program and KVM (`python -m tests.kvm_node`).
"""

from __future__ import annotations

import pytest
import trio

from hypervisors import fc_room
from hypervisors.machine import ExitKind, HybridVsock, Rng
from tests.harness import vmm

from . import machines
from .machines import BOOT_DEADLINE_S, says

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.root,
    pytest.mark.kvm,
    pytest.mark.skipif(bool(vmm.missing("firecracker")), reason=vmm.missing("firecracker") or "-"),
]


async def test_vmm_owns_no_directory_that_the_shim_works_in_once_it_runs(make_spec, records):
    spec = make_spec(binary=vmm.find_program("firecracker"))
    vsock = HybridVsock(id="vsock", uds_path=spec.run_dir / "uds")
    spec = make_spec(binary=spec.binary, devices=(Rng(), vsock))
    account = fc_room.account_of(spec)
    if account is None:
        pytest.skip("only root may use KVM here")
    async with machines.running("firecracker", spec, records):
        places = [spec.run_dir / "fc", *spec.run_dir.glob("fc*/**/disks")]
        assert len(places) == 2
        for place in places:
            status = place.stat()
            assert (status.st_uid, status.st_gid) == (0, account.gid), place
            assert status.st_mode & 0o7777 == 0o710, place


async def test_guest_that_is_asked_to_end_does_so(make_spec, records):
    spec = make_spec(binary=vmm.find_program("firecracker"))
    async with machines.running("firecracker", spec, records) as machine:
        await says(machine, "GUEST-READY")
        with trio.fail_after(BOOT_DEADLINE_S):
            ending = await machine.shutdown(BOOT_DEADLINE_S)
    assert ending.kind is ExitKind.CLEAN
    assert any("Restarting system" in line for line in machine.console.tail(50))
