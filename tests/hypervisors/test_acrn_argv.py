"""The command line of acrn-dm, word by word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hypervisors import acrn_argv
from hypervisors.acrn import vm_name
from hypervisors.acrn_check import processors
from hypervisors.machine import BlockDevice, KernelVsock, MachineSpec, NetDevice, Rng

HOST = acrn_argv.HostSide(
    directory="/proc/self/fd/3",
    kernel="/proc/self/fd/4",
    initrd="/proc/self/fd/5",
    images={"d0": "/proc/self/fd/6"},
    taps={"n0": "tap0"},
    processors=(2, 4),
)


def make_spec(**changes: Any) -> MachineSpec:
    fields: dict[str, Any] = {
        "id": "a" * 64, "kernel": Path("/k"), "initrd": Path("/i"), "cmdline": "kata.ready_port=1",
        "vcpus": 2, "max_vcpus": 2, "memory_mib": 257, "max_memory_mib": 1024,
        "binary": Path("/usr/bin/acrn-dm"), "run_dir": Path("/run/x"), "hotplug_ports": 2,
        "devices": (
            KernelVsock(id="v", cid=77, vhost_fd=9),
            Rng(),
            BlockDevice(id="d0", path=Path("/d,ro"), read_only=True),
            NetDevice(id="n0", mac="02:00:00:00:00:01", tap_fds=(8,), mtu=1500),
        ),
    }  # fmt: skip
    return MachineSpec(**(fields | changes))


def test_whole_command_line() -> None:
    spec = make_spec()
    assert acrn_argv.command_line(spec, "kata-1", HOST) == [
        "/usr/bin/acrn-dm",
        "-m", "258M",
        "--cpu_affinity", "2,4",
        "--cmd_monitor", "/proc/self/fd/3/monitor.sock",
        "--logger_setting", "console,level=1",
        "-k", "/proc/self/fd/4",
        "-B", f"{acrn_argv.BASE_CMDLINE} kata.ready_port=1",
        "-s", "0:0,hostbridge",
        "-s", "1:0,lpc",
        "-l", "com1,stdio",
        "-r", "/proc/self/fd/5",
        "-s", "3,vhost-vsock,cid=77",
        "-s", "4,virtio-rnd",
        "-s", "5,virtio-blk,/proc/self/fd/6,ro",
        "-s", "6,virtio-net,tap=tap0,mac=02:00:00:00:00:01",
        "-s", "7,virtio-blk,nodisk",
        "-s", "8,virtio-blk,nodisk",
        "-s", "31,virtio-console,socket:ready=/proc/self/fd/3/ready.sock:client",
        "kata-1",
    ]  # fmt: skip
    found = {name: one.pci_path for name, one in acrn_argv.addresses(spec).items()}
    assert found == {"v": "03", "rng": "04", "d0": "05", "n0": "06"}


def test_guest_without_an_initrd_and_without_room_has_neither() -> None:
    argv = acrn_argv.command_line(make_spec(hotplug_ports=0), "n", HOST)
    assert not [word for word in argv if word.endswith("nodisk")]
    without = acrn_argv.HostSide(
        directory="/d", kernel="/k", initrd=None, images=HOST.images, taps=HOST.taps,
        processors=(0,),
    )  # fmt: skip
    assert "-r" not in acrn_argv.command_line(make_spec(), "n", without)


def test_machine_has_a_short_name_of_its_own() -> None:
    assert vm_name("a" * 64) != vm_name("a" * 63)
    assert len(vm_name("a" * 64)) == 15


def test_vcpus_get_processors_by_their_apic_ids(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("".join(f"processor\t: {n}\napicid\t\t: {2 * n}\n\n" for n in range(4)))
    assert processors("x", 4, cpuinfo) == (0, 2, 4, 6)
    one = processors("x", 2, cpuinfo)
    assert one == processors("x", 2, cpuinfo)
    assert set(one) <= {0, 2, 4, 6}
    # Machines do not all begin with the first one.
    assert len({processors(f"m{n}", 1, cpuinfo) for n in range(32)}) == 4
