"""A guest image with another agent than ours: the one that `KATA_TEST_AGENT` names.

Kata's own agent is in no package registry, and its images have the drivers in the kernel. So it is
built outside of the project, as a static program, and started by a script that loads the modules of
our image before.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Final

from guest.image import cpio
from guest.image.build import MODULE_LIST

if TYPE_CHECKING:
    from tests.harness.node import Node

VARIABLE: Final = "KATA_TEST_AGENT"
IMAGE: Final = "/run/foreign-agent.img"
_BUSYBOX: Final = Path("/bin/busybox")
_INIT: Final = f"""#!/bin/busybox sh
while read -r module; do busybox insmod "$module"; done <{MODULE_LIST}
exec /usr/bin/kata-agent
"""


def find_agent() -> Path | None:
    """The program that the tests are to use, if one is named.

    Raises:
        AssertionError: it isn't there.
    """
    name = os.environ.get(VARIABLE)
    if not name:
        return None
    path = Path(name).resolve()
    assert path.is_file(), f"{VARIABLE}={name} is not there"
    return path


def version(agent: Path) -> str:
    """What the program says of itself."""
    done = subprocess.run([agent, "--version"], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def write_image(node: Node, guest: Path, agent: Path) -> str:
    """Put an initrd with the agent on the node; return the settings that make the shim use it.

    The kernel unpacks archives one after the other, and the later one's files win.
    """
    tree = cpio.Tree()
    tree.file("/init", _INIT.encode(), 0o755)
    tree.file("/bin/busybox", _BUSYBOX.read_bytes(), 0o755)
    tree.file("/usr/bin/kata-agent", agent.read_bytes(), 0o755)
    initrd = (guest / "initrd.img").read_bytes() + cpio.archive(tree)
    node.path(IMAGE).write_bytes(initrd)
    return f'initrd = "{IMAGE}"\nkernel_params = "systemd.unified_cgroup_hierarchy=1"\n'
