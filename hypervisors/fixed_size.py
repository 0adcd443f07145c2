"""What a machine does that keeps the vCPUs and the memory it was made with."""

from __future__ import annotations

from typing import NoReturn

import trio

from .errors import ControlLost, Unsupported


class FixedSize:
    """Part of a backend's devices: sizes that are as they are, and verbs that end with the VMM."""

    def __init__(self, backend: str, vcpus: int, memory_mib: int) -> None:
        self._backend = backend
        self._vcpus = vcpus
        self._memory_mib = memory_mib
        self._has_ended = False

    def on_end(self) -> None:
        """The machine has ended."""
        self._has_ended = True

    async def resize_vcpus(self, count: int) -> int:
        """See `VirtualMachine.resize_vcpus`."""
        await trio.lowlevel.checkpoint()
        self._refuse_the_dead("resize")
        if count != self._vcpus:
            self._refuse_size(f"run with {count} vCPUs", self._vcpus, "default_vcpus")
        return count

    async def resize_memory(self, mib: int) -> int:
        """See `VirtualMachine.resize_memory`."""
        await trio.lowlevel.checkpoint()
        self._refuse_the_dead("resize")
        if mib > self._memory_mib:
            self._refuse_size(f"have {mib} MiB", self._memory_mib, "default_memory")
        return self._memory_mib

    def _refuse_the_dead(self, command: str) -> None:
        if self._has_ended:
            raise ControlLost(command)

    def _refuse_size(self, operation: str, present: int, key: str) -> NoReturn:
        raise Unsupported(
            self._backend,
            operation,
            f"the machine was made with {present}",
            f"raise {key}, or let the pod's limits be there when it is created "
            "(static_sandbox_resource_mgmt = true)",
        )
