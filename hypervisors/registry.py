"""Backends by name: ours, then what other distributions offer as entry points."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from .errors import Unsupported

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    from .base import Hypervisor

# An entry point of this group names a callable without arguments that returns a `Hypervisor`.
ENTRY_POINT_GROUP: Final = "kata.hypervisors"
BUILT_IN: Final = ("acrn", "cloud-hypervisor", "firecracker", "qemu")
# How Kata's configuration files call them.
ALIASES: Final = {"clh": "cloud-hypervisor", "fc": "firecracker"}
# Where their programs are by default.
DEFAULT_PROGRAMS: Final = {
    "acrn": "/usr/bin/acrn-dm",
    "cloud-hypervisor": "/usr/bin/cloud-hypervisor",
    "firecracker": "/usr/bin/firecracker",
    "qemu": "/usr/bin/qemu-system-x86_64",
}


def canonical_name(name: str) -> str:
    """The one name of a backend that has several."""
    return ALIASES.get(name, name)


def find_hypervisor(name: str) -> Hypervisor:
    """Return the backend called `name`.

    Raises:
        Unsupported: there is none; the hint lists those there are.
    """
    name = canonical_name(name)
    if name == "qemu":
        from .qemu import Qemu

        return Qemu()
    if name == "acrn":
        from .acrn import Acrn

        return Acrn()
    if name == "cloud-hypervisor":
        from .cloud_hypervisor import CloudHypervisor

        return CloudHypervisor()
    if name == "firecracker":
        from .firecracker import Firecracker

        return Firecracker()
    offered = _offered()
    if name in offered:
        backend: Hypervisor = offered[name].load()()
        return backend
    known = ", ".join(sorted({*BUILT_IN, *offered}))
    raise Unsupported(name, "be used", "no such hypervisor is installed", f"choose one of: {known}")


def installed() -> tuple[str, ...]:
    """Return the names of all backends: ours, then those of other distributions."""
    return (*BUILT_IN, *sorted(set(_offered()) - set(BUILT_IN)))


def _offered() -> dict[str, EntryPoint]:
    # Reading the installed distributions costs tens of milliseconds: only for foreign names.
    from importlib.metadata import entry_points

    return {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)}
