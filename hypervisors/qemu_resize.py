"""Changes the number of vCPUs and the amount of memory of a running QEMU.

QEMU is asked each time what there is: the guest decides about removals, so what was ordered is not
what is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, cast

from . import qemu_argv
from .errors import CommandRejected, DetachRefused, Unsupported
from .qemu_board import INSTEAD, find_board
from .qemu_removal import PERIPHERAL

if TYPE_CHECKING:
    from .machine import MachineSpec
    from .qemu_removal import Removals
    from .qmp_client import QmpClient
    from .qmp_protocol import JsonValue

CPU_PREFIX: Final = "cpu-"
DIMM_PREFIX: Final = "dimm"
# The order in which vCPUs are added: by their place in the topology.
# Source: QEMU qapi/machine.json CpuInstanceProperties; cluster and module are 7.1's and 9.1's.
CPU_PLACES: Final = (
    "node-id", "socket-id", "die-id", "cluster-id", "module-id", "core-id", "thread-id",
)  # fmt: skip


class QemuResize:
    """vCPU and memory hot-plug of one machine; the caller serialises."""

    def __init__(
        self, spec: MachineSpec, accelerator: str, qmp: QmpClient, removals: Removals
    ) -> None:
        self._spec = spec
        self._takes_devices = find_board(spec.machine_type).takes_devices
        self._accelerator = accelerator
        self._qmp = qmp
        self._removals = removals

    async def vcpus(self, count: int) -> int:
        """See `VirtualMachine.resize_vcpus`."""
        if not self._takes_devices:
            return _unchanged(f"run with {count} vCPUs", count, self._spec.vcpus)
        if not 1 <= count <= self._spec.max_vcpus:
            raise Unsupported(
                "qemu",
                f"run with {count} vCPUs",
                f"the machine was made for 1 to {self._spec.max_vcpus}",
                "raise default_maxvcpus",
            )
        present, absent = await self._cpu_slots()
        for slot in absent[: max(0, count - len(present))]:
            props = cast("dict[str, JsonValue]", slot["props"])
            name = CPU_PREFIX + "-".join(str(props[key]) for key in CPU_PLACES if key in props)
            self._removals.forget(name)
            await self._qmp.execute("device_add", {"driver": slot["type"], "id": name, **props})
        if self._accelerator == "tcg":
            # Observed: QEMU 7.2.22 aborts when a vCPU is added after one was removed under TCG
            # (tcg_register_thread: n < tcg_max_ctxs, or heap corruption). The number says so.
            present = present[:count]
        for slot in reversed(present[count:]):
            name = str(slot["qom-path"]).removeprefix(PERIPHERAL)
            if not name.startswith(CPU_PREFIX) or not await self._try_remove(name):
                break
        return len((await self._cpu_slots())[0])

    async def memory(self, mib: int) -> int:
        """See `VirtualMachine.resize_memory`."""
        if not self._takes_devices:
            return _unchanged(f"have {mib} MiB", mib, self._spec.memory_mib)
        if mib > self._spec.max_memory_mib:
            raise Unsupported(
                "qemu",
                f"have {mib} MiB",
                f"the machine was made for up to {self._spec.max_memory_mib}",
                "raise default_maxmemory",
            )
        now = await self._memory_mib()
        if mib > now:
            await self._add_dimm(mib - now)
        elif mib < now:
            await self._remove_dimms(now - mib)
        return await self._memory_mib()

    async def _cpu_slots(self) -> tuple[list[dict[str, JsonValue]], list[dict[str, JsonValue]]]:
        answer = await self._qmp.execute("query-hotpluggable-cpus")
        slots = cast("list[dict[str, JsonValue]]", answer)

        def place(slot: dict[str, JsonValue]) -> tuple[int, ...]:
            props = cast("dict[str, int]", slot["props"])
            return tuple(props.get(key, 0) for key in CPU_PLACES)

        slots = sorted(slots, key=place)
        present = [slot for slot in slots if "qom-path" in slot]
        # The machine's own first: those are never removed.
        present.sort(key=lambda slot: str(slot["qom-path"]).startswith(PERIPHERAL))
        return present, [slot for slot in slots if "qom-path" not in slot]

    async def _memory_mib(self) -> int:
        answer = await self._qmp.execute("query-memory-size-summary")
        summary = cast("dict[str, int]", answer)
        return (summary["base-memory"] + summary.get("plugged-memory", 0)) // qemu_argv.MIB

    async def _dimms(self) -> dict[str, int]:
        """Sizes in MiB by id, of those we added."""
        answer = cast("list[dict[str, JsonValue]]", await self._qmp.execute("query-memory-devices"))
        sizes: dict[str, int] = {}
        for entry in answer:
            match entry:
                case {"type": "dimm", "data": {"id": str(name), "size": int(size)}}:
                    sizes[name] = size // qemu_argv.MIB
        return sizes

    async def _add_dimm(self, missing_mib: int) -> None:
        """Add one DIMM, rounded up to what the guest can take but not over the maximum."""
        step = qemu_argv.MEMORY_STEP_MIB
        dimms = await self._dimms()
        room = self._spec.max_memory_mib - self._spec.memory_mib - sum(dimms.values())
        size = min(-(-missing_mib // step) * step, room // step * step)
        free = [n for n in range(qemu_argv.MEMORY_SLOTS) if f"{DIMM_PREFIX}{n}" not in dimms]
        if size <= 0:
            return
        if not free:
            raise Unsupported(
                "qemu",
                "add memory once more",
                f"all {qemu_argv.MEMORY_SLOTS} memory slots are taken",
                "grow in fewer, larger steps",
            )
        name = f"{DIMM_PREFIX}{free[0]}"
        self._removals.forget(name)
        backend = qemu_argv.memory_backend(f"m-{name}", size, self._spec)
        await self._qmp.execute("object-add", backend)
        try:
            properties: dict[str, JsonValue] = {"driver": "pc-dimm", "id": name}
            await self._qmp.execute("device_add", properties | {"memdev": f"m-{name}"})
        except CommandRejected:
            await self._qmp.execute("object-del", {"id": f"m-{name}"})
            raise

    async def _remove_dimms(self, excess_mib: int) -> None:
        """Remove whole DIMMs, largest first, as far as they fit and the guest agrees."""
        dimms = await self._dimms()
        for name, size in sorted(dimms.items(), key=lambda item: -item[1]):
            if size <= excess_mib and await self._try_remove(name):
                await self._qmp.execute("object-del", {"id": f"m-{name}"})
                excess_mib -= size

    async def _try_remove(self, device_id: str) -> bool:
        try:
            await self._removals.remove(device_id)
        except DetachRefused:
            return False
        return True


def _unchanged(what: str, wanted: int, present: int) -> int:
    """What there is, of a machine that can't grow; one that is too big stays so."""
    if wanted > present:
        raise Unsupported(
            "qemu",
            what,
            f"a microvm keeps what it was started with, {present}",
            f"set {INSTEAD}",
        )
    return present
