"""The KVM node's kernel: the guest's package with all of its modules, unpacked below build/.

`KATA_TEST_NODE_KERNEL=linux-image-6.12-cloud-amd64` takes that package instead, for what a host of
the guest's version doesn't have: Landlock for a VMM needs 6.2.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from guest.image.kernel import METAPACKAGES, KernelPackage, fetch, module_order
from tests.harness.containerd_daemon import tool_cache
from tests.harness.node import BUILD

VARIABLE = "KATA_TEST_NODE_KERNEL"
_MANIFEST = BUILD / "guest" / "manifest.json"


def unpacked_kernel() -> KernelPackage:
    """Return the kernel package that `make guest` took, unpacked once for each version.

    Raises KernelError or FileNotFoundError, the latter when `make guest` hasn't run.
    """
    chosen = os.environ.get(VARIABLE, "")
    directory = BUILD / "kvm-node" / chosen
    wanted = chosen or json.loads(_MANIFEST.read_text())["kernel"]["version"]
    stamp = directory / "kernel.json"
    if stamp.exists():
        found: dict[str, Any] = json.loads(stamp.read_text())
        root = Path(found["root"])
        if found.pop("wanted", None) == wanted and root.is_dir():
            return KernelPackage(**{**found, "root": root})
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    package = fetch(tool_cache(), directory, (chosen,) if chosen else METAPACKAGES)
    module_order(package, ("virtiofs",))  # writes modules.dep, which modprobe needs inside
    fields = {name: str(getattr(package, name)) for name in KernelPackage.__slots__}
    stamp.write_text(json.dumps({**fields, "wanted": wanted}))
    return package
