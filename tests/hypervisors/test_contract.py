"""What `hypervisors/base.py` promises, checked on every backend that can run here.

A backend of another distribution is tested when it is installed and KATA_TEST_<NAME> names its
program; nothing below knows which one it talks to. Machines are ended long before their guest is
up, so a test takes tenths of a second; test_contract_guest.py, the other half, waits for it.
"""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing

from hypervisors import accel
from hypervisors.errors import (
    ControlError,
    HypervisorError,
    LaunchFailed,
    PreconditionFailed,
    SpawnFailed,
    Unsupported,
)
from hypervisors.machine import BlockDevice, ExitKind, Rng, SharedDirectory, VmEventKind
from hypervisors.registry import find_hypervisor
from tests.fakes import fake_acrn, fake_clh, fake_fc
from tests.harness import vmm
from tests.harness.own_process import open_descriptors

from .machines import running

pytestmark = [pytest.mark.e2e, pytest.mark.root, pytest.mark.smoke]


# Those that need what a machine may lack are also tested with a program that only talks like them.
SCRIPTED = {
    "acrn": fake_acrn.write_program,
    "cloud-hypervisor": fake_clh.write_program,
    "firecracker": fake_fc.write_program,
}
# Those that want another kernel than the guest's.
KERNELS = {"acrn": fake_acrn.write_kernel}


@pytest.fixture(params=[*vmm.SETUPS, *(f"{name} (scripted)" for name in SCRIPTED)])
def backend(request, monkeypatch):
    setup, _, scripted = request.param.partition(" ")
    if scripted:
        monkeypatch.setattr(accel, "kvm_problem", lambda: None)
        monkeypatch.setattr(accel, "acrn_problem", lambda: None)
    elif why := vmm.missing(setup):
        pytest.skip(why)
    return find_hypervisor(setup.partition(":")[0])


@pytest.fixture
def make_spec(backend, make_spec, request, tmp_path_factory):
    """As the other tests' one, for this backend's program and machine type."""
    setup = request.node.callspec.params["backend"]
    fields = vmm.fields_of(setup)
    if "scripted" in setup:
        # Privileged: pytest's directory is closed to other users.
        directory = tmp_path_factory.mktemp("vmm")
        fields = {"binary": SCRIPTED[backend.name](directory), "unprivileged": False}
        if backend.name in KERNELS:
            fields["kernel"] = KERNELS[backend.name](directory)

    def make(*args, **changes):
        return make_spec(*args, **{**fields, **changes})

    return make


@pytest.fixture
def no_descriptor_left():
    before = open_descriptors()
    yield
    assert open_descriptors() <= before


async def test_backend_is_found_by_its_own_name(backend):
    assert type(find_hypervisor(backend.name)) is type(backend)


@pytest.mark.parametrize("field", ["kernel", "initrd", "binary"])
async def test_missing_file_is_refused_before_anything_is_taken(
    backend, make_spec, field, no_descriptor_left
):
    spec = make_spec(**{field: Path("/nowhere/file")})
    records: list[object] = []
    with pytest.raises(PreconditionFailed, match="/nowhere/file"):
        backend.check(spec)
    with pytest.raises(PreconditionFailed, match="/nowhere/file"):
        await backend.launch(spec, record=records.append)
    assert records == []


async def test_exit_is_one_value_for_every_caller_and_the_last_event(
    backend, make_spec, records, no_descriptor_left
):
    seen = []
    async with running(backend, make_spec(), records) as machine:
        assert machine.exit is None
        assert machine.accelerator in ("kvm", "tcg", backend.name)
        assert machine.pid == records[0].pid
        assert sorted(machine.addresses) == ["rng"]

        async def wait():
            seen.append(await machine.wait_exited())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked(0.01)
            machine.kill()
            machine.kill()
    ending = await machine.wait_exited()
    assert [machine.exit, *seen] == [ending] * 3
    assert ending.kind is ExitKind.KILLED
    assert ending.signal == signal.SIGKILL
    events = [event async for event in machine.events]
    assert events[-1].kind is VmEventKind.EXITED
    assert events[-1].detail == ending.reason
    machine.kill()


async def test_ended_machine_refuses_every_verb(backend, make_spec, records, disk):
    async with running(backend, make_spec(), records) as machine:
        machine.kill()
    for verb in (
        machine.pause,
        machine.resume,
        lambda: machine.attach(BlockDevice(id="d", path=disk, read_only=True)),
        lambda: machine.resize_vcpus(2),
        lambda: machine.resize_memory(512),
    ):
        # Or it never could.
        with pytest.raises((ControlError, Unsupported)):
            await verb()
    assert await machine.shutdown(1) == machine.exit
    await machine.aclose()


async def test_cancelled_supervision_takes_the_vmm_along(
    backend, make_spec, records, no_descriptor_left
):
    machine = await backend.launch(make_spec(), record=records.append)
    async with trio.open_nursery() as nursery:
        await nursery.start(machine.run)
        nursery.cancel_scope.cancel()
    assert machine.exit.kind is ExitKind.KILLED
    assert await machine.wait_exited() == machine.exit


@pytest.mark.parametrize("moment", ["at once", "when it is forked", "while it is mute"])
async def test_cancelled_launch_leaves_nothing(
    backend, make_spec, records, tmp_path, moment, no_descriptor_left
):
    mute = tmp_path / "bin" / "mute"
    mute.parent.mkdir()
    mute.write_text("#!/bin/sh\nexec sleep 1000\n")
    mute.chmod(0o755)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    # Privileged: pytest's directory is closed to other users.
    spec = make_spec(binary=mute, run_dir=run_dir, unprivileged=False)

    def record(entry):
        records.append(entry)
        if moment == "when it is forked":
            scope.cancel()

    with trio.CancelScope() as scope:
        if moment == "at once":
            scope.cancel()
        elif moment == "while it is mute":
            scope.deadline = trio.current_time() + 0.3
        await backend.launch(spec, record=record)
    assert scope.cancelled_caught
    assert list(run_dir.iterdir()) == []


async def test_machine_that_was_never_supervised_can_be_closed(
    backend, make_spec, records, no_descriptor_left
):
    machine = await backend.launch(make_spec(), record=records.append)
    await machine.aclose()
    await machine.aclose()
    assert machine.exit.kind is ExitKind.KILLED


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("#!/bin/sh\necho 'no such feature' >&2\nexit 3\n", "exited with 3.*no such feature"),
        ("#!/bin/sh\nkill -SEGV $$\n", "SIGSEGV"),
        ("#!/nowhere/interpreter\n", "No such file"),
    ],
)
async def test_vmm_that_does_not_start_is_reported_with_its_last_words(
    backend, make_spec, records, tmp_path, program, words, no_descriptor_left
):
    binary = tmp_path / "vmm"
    binary.write_text(program)
    binary.chmod(0o755)
    # Privileged: pytest's directory is closed to other users.
    spec = make_spec(binary=binary, unprivileged=False)
    with pytest.raises((LaunchFailed, SpawnFailed), match=words), trio.fail_after(30):
        await backend.launch(spec, record=records.append)


async def test_missing_daemon_of_a_device_is_reported(backend, make_spec, records, tmp_path):
    share = SharedDirectory(id="fs", tag="t", socket=tmp_path / "nobody.sock")
    spec = make_spec(devices=(share,))
    # Where there is no such device, the refusal is of the device itself.
    refused = LaunchFailed if backend.capabilities(spec).shared_directory else Unsupported
    with pytest.raises(refused, match=r"nobody\.sock"):
        await backend.launch(spec, record=records.append)
    assert records == []


async def test_failing_journal_stops_the_launch(backend, make_spec, no_descriptor_left):
    pids = []

    def record(entry):
        pids.append(entry.pid)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        await backend.launch(make_spec(), record=record)
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


async def test_what_the_specification_left_no_room_for_is_unsupported(
    backend, make_spec, records, tmp_path, disk
):
    spec = make_spec(hotplug_ports=0, max_vcpus=1, max_memory_mib=256)
    can = backend.capabilities(spec)
    assert not any((can.block_hotplug, can.vcpu_hotplug, can.memory_hotplug))
    async with running(backend, spec, records) as machine:
        for verb in (
            lambda: machine.attach(BlockDevice(id="d", path=disk, read_only=True)),
            lambda: machine.attach(Rng(id="second")),
            lambda: machine.resize_vcpus(2),
            lambda: machine.resize_memory(512),
        ):
            with pytest.raises(Unsupported) as caught:
                await verb()
            assert caught.value.hint
        with pytest.raises(KeyError):
            await machine.detach("never attached")
        with pytest.raises((PreconditionFailed, Unsupported)):
            await machine.attach(BlockDevice(id="d", path=tmp_path / "no", read_only=True))
        assert await machine.resize_vcpus(1) == 1
        assert await machine.resize_memory(256) == 256


async def test_refused_attach_leaves_no_trace_and_the_name_free(backend, make_spec, records, disk):
    empty = disk.with_name("empty")
    empty.touch()
    spec = make_spec(hotplug_ports=2)
    if not backend.capabilities(spec).block_hotplug:
        pytest.skip(f"{backend.name} takes no disks while it runs")
    async with running(backend, spec, records) as machine:
        # A writable disk that is in use is locked by the VMM itself.
        await machine.attach(BlockDevice(id="first", path=disk, read_only=False))
        with pytest.raises(HypervisorError):
            await machine.attach(BlockDevice(id="second", path=disk, read_only=False))
        with pytest.raises(HypervisorError):
            await machine.attach(BlockDevice(id="first", path=empty, read_only=True))
        assert sorted(machine.addresses) == ["first", "rng"]


async def test_stopped_vmm_answers_nothing_but_dies_when_told(backend, make_spec, records, disk):
    spec = make_spec()
    async with running(backend, spec, records) as machine:
        if backend.capabilities(spec).pause:
            await machine.pause()
            ask = machine.resume
        else:
            block = BlockDevice(id="d", path=disk, read_only=True)
            ask = partial(machine.attach, block)
        os.kill(machine.pid, signal.SIGSTOP)
        with pytest.raises(ControlError, match="no answer within"), trio.fail_after(10):
            await ask()
        machine.kill()
        with trio.fail_after(30):
            assert (await machine.wait_exited()).kind is ExitKind.KILLED
