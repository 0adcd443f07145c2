"""The KVM node's kernel: the guest's package with all of its modules, unpacked below build/."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from guest.image.kernel import KernelPackage, fetch, module_order
from tests.harness.containerd_daemon import tool_cache
from tests.harness.node import BUILD

_DIRECTORY = BUILD / "kvm-node"
_MANIFEST = BUILD / "guest" / "manifest.json"


def unpacked_kernel() -> KernelPackage:
    """Return the kernel package that `make guest` took, unpacked once for each version.

    Raises KernelError or FileNotFoundError, the latter when `make guest` hasn't run.
    """
    wanted = json.loads(_MANIFEST.read_text())["kernel"]
    stamp = _DIRECTORY / "kernel.json"
    if stamp.exists():
        found: dict[str, Any] = json.loads(stamp.read_text())
        root = Path(found["root"])
        if found.pop("wanted", None) == wanted["version"] and root.is_dir():
            return KernelPackage(**{**found, "root": root})
    shutil.rmtree(_DIRECTORY, ignore_errors=True)
    _DIRECTORY.mkdir(parents=True)
    package = fetch(tool_cache(), _DIRECTORY)
    module_order(package, ("virtiofs",))  # writes modules.dep, which modprobe needs inside
    fields = {name: str(getattr(package, name)) for name in KernelPackage.__slots__}
    stamp.write_text(json.dumps({**fields, "wanted": wanted["version"]}))
    return package
