"""Which vCPUs stand for the host's CPUs that a pod's containers are pinned to. Pure.

Host CPU numbers mean nothing in a guest, what containers share of them does: two containers with
the same set share vCPUs, two with different ones don't, as long as there are enough; and a program
that counts its CPUs counts as many as it would on the host.
"""

from __future__ import annotations

from collections.abc import Iterable


class VcpuMap:
    """Gives each host CPU a vCPU at its first use, the same for all containers of a pod."""

    def __init__(self) -> None:
        self._places: dict[int, int] = {}

    def guest_cpus(self, host_cpus: Iterable[int], vcpus: int) -> str:
        """Return the guest's list for a set of host CPUs; with too few vCPUs, some are shared."""
        for number in host_cpus:
            if number not in self._places:
                taken = set(self._places.values())
                self._places[number] = next(
                    place for place in range(len(taken) + 1) if place not in taken
                )
        numbers = sorted({self._places[number] % vcpus for number in host_cpus})
        return ",".join(map(str, numbers))

    def keep(self, host_cpus: set[int]) -> None:
        """Forget the places of CPUs that no container is pinned to any more."""
        self._places = {cpu: place for cpu, place in self._places.items() if cpu in host_cpus}
