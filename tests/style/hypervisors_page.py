"""The table of docs/hypervisors.md, made from what the backends say of themselves.

python -m tests.style.hypervisors_page        prints the table, with all that are installed
python -m tests.style.hypervisors_page -w     puts it into the page, with ours
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final
from unittest import mock

from hypervisors import accel
from hypervisors.machine import Capabilities, MachineSpec
from hypervisors.qemu_board import BOARDS
from hypervisors.registry import BUILT_IN, find_hypervisor, installed
from tests.style import source

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

PAGE: Final = source.ROOT / "docs" / "hypervisors.md"
BEGIN: Final = "<!-- table: made by tests/style/hypervisors_page.py -->"
END: Final = "<!-- end of table -->"
WORDS: Final = {
    "shared_directory": "directories by virtio-fs",
    "block_hotplug": "disks come while it runs",
    "net_hotplug": "interfaces come and go while it runs",
    "vcpu_hotplug": "vCPUs come while it runs",
    "vcpu_unplug": "vCPUs go while it runs",
    "memory_hotplug": "memory comes while it runs",
    "pause": "pause and resume",
    "panic_event": "tells a guest's panic from a reboot",
    "hybrid_vsock": "vsock device of its own",
    "kernel_vsock": "vsock of the host's kernel",
    "unix_vsock": "vsock of a daemon",
    "max_vcpus": "vCPUs at most",
    "memory_step_mib": "memory comes in steps of, MiB",
    "power_off": "ends when its guest switches itself off",
    "instead": "for what it can't, set",
    "block_unplug": "disks go while it runs",
    "opens_taps": "opens taps by their names",
}


def specification() -> MachineSpec:
    """A machine with room for all that may come."""
    nowhere = Path("/nonexistent")
    return MachineSpec(
        id="page", kernel=nowhere, initrd=None, cmdline="", vcpus=1, max_vcpus=4, memory_mib=512,
        max_memory_mib=4096, binary=nowhere, run_dir=nowhere, accelerator="kvm", hotplug_ports=8,
    )  # fmt: skip


def capabilities(names: Sequence[str]) -> dict[str, Capabilities]:
    """What each of these, with each machine type, says on a host with KVM and vhost-vsock."""
    with (
        mock.patch.object(accel, "kvm_problem", return_value=None),
        mock.patch.object(accel, "kernel_vsock_usable", return_value=True),
    ):
        found = {name: find_hypervisor(name).capabilities(specification()) for name in names}
        for board in BOARDS.values() if "qemu" in names else ():
            spec = replace(specification(), machine_type=board.name)
            if spec != specification():
                found[f"qemu {board.name}"] = find_hypervisor("qemu").capabilities(spec)
        return found


def table(names: Sequence[str] = BUILT_IN) -> str:
    """Return the table of these backends as Markdown."""
    return "\n".join(_lines(capabilities(names)))


def _lines(found: dict[str, Capabilities]) -> Iterator[str]:
    yield "| | " + " | ".join(found) + " |"
    yield "|---" * (len(found) + 1) + "|"
    for field in dataclasses.fields(Capabilities):
        cells = [_cell(getattr(one, field.name)) for one in found.values()]
        yield f"| {WORDS[field.name]} | " + " | ".join(cells) + " |"


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value) if isinstance(value, int) or not value else f"`{value}`"


def page() -> str:
    """Return the page as it should be."""
    text = PAGE.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}"


def main(arguments: list[str]) -> int:
    """Print the table, or write it into the page."""
    if arguments == ["-w"]:
        PAGE.write_text(page())
    else:
        print(table(installed()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
