"""A machine whose places are taken says so; QEMU is a recorded answer here."""

from __future__ import annotations

import socket
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import pytest
import trio

from hypervisors import qemu_argv
from hypervisors.errors import Unsupported
from hypervisors.machine import NetDevice
from hypervisors.qemu_devices import QemuDevices
from tests.harness.limitations import documented
from tests.hypervisors.test_qemu_argv import SPEC

if TYPE_CHECKING:
    from hypervisors.qmp_client import QmpClient

MIB = qemu_argv.MIB


class Full:
    """Says that every memory slot has a module."""

    async def execute(self, command: str, _arguments: object = None) -> Any:
        await trio.lowlevel.checkpoint()
        if command == "query-memory-size-summary":
            return {"base-memory": SPEC.memory_mib * MIB, "plugged-memory": 0}
        assert command == "query-memory-devices"
        return [
            {"type": "dimm", "data": {"id": f"dimm{slot}", "size": 0}}
            for slot in range(qemu_argv.MEMORY_SLOTS)
        ]


def devices(**changes: Any) -> QemuDevices:
    return QemuDevices(replace(SPEC, **changes), "tcg", cast("QmpClient", Full()), {})


async def test_a_machine_without_a_free_port_names_the_key_to_raise() -> None:
    text = documented(
        "qemu cannot attach another device: all … hot-plug ports are taken; raise hotplug_ports in "
        "the configuration"
    )
    full = devices(hotplug_ports=0)
    with socket.socket() as tap:
        device = NetDevice(id="n", mac="02:00:00:00:00:01", tap_fds=(tap.fileno(),), mtu=1500)
        with pytest.raises(Unsupported, match=text):
            await full.attach(device)


async def test_memory_grows_in_as_many_steps_as_there_are_slots() -> None:
    full = devices(max_memory_mib=SPEC.memory_mib + 1024)
    with pytest.raises(Unsupported, match="all 4 memory slots are taken"):
        await full.resize_memory(SPEC.memory_mib + 256)
