"""The end-to-end tests on the KVM node, for every VMM that is found: `make test-kvm`.

One boot runs pytest once for each VMM. The tests are the ordinary ones, with containerd 2.x; those
of the backends themselves belong to the first run.
`--smoke` takes those that bear the marker `smoke`, which is what `make test` runs with QEMU.
Arguments behind `--` are pytest's and take the place of the files.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence

from tests.harness import vmm
from tests.harness.containerd_daemon import tool_cache
from tests.harness.node import REPOSITORY
from tests.kvm_node.node import Job, NodeFailed, run

_END_TO_END = "tests/integration"
_BACKENDS = "tests/hypervisors"
_CONTRACT = "tests/hypervisors/test_contract.py"
# What is about machines that are slow already, or about speed itself.
_SKIPPED = ("containerd1", "200_execs", "100_mb")
#: All deadlines become so many times longer: a pod that takes a second under KVM takes ten here.
_PATIENCE = 6
#: A VM with less memory has fewer pages that an emulated page table must be filled with.
_MEMORY_MIB = 512
_TEST_LIMIT_S = 900
_SMOKE_TEST_LIMIT_S = 300
_SMOKE_DEADLINE_S = 1200.0
_FULL_DEADLINE_S = 4 * 3600.0
_PASSED_ON = ("HOME", "LANG", "XDG_CACHE_HOME")


def job(vmms: Sequence[str], *, smoke: bool, arguments: Sequence[str] = ()) -> Job:
    """Return what runs pytest on a node for each of `vmms`; its status is 0 if all passed."""
    script = ["status=0"]
    for name in vmms:
        words = shlex.join(_pytest(name, vmms, smoke=smoke, arguments=arguments))
        script += [f"echo; echo 'with {name}:'", f"KATA_TEST_HYPERVISOR={name} {words} || status=1"]
    script.append("exit $status")
    programs = {vmm.variable(name): str(vmm.find_program(name)) for name in vmms}
    kept = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    return Job(
        command=["bash", "-c", "\n".join(script)],
        environment={
            **kept,
            **programs,
            "KATA_CACHE": str(tool_cache()),
            "KATA_TEST_PATIENCE": str(_PATIENCE),
            "KATA_TEST_MEMORY": str(_MEMORY_MIB),
        },
        directory=REPOSITORY,
        deadline_s=_SMOKE_DEADLINE_S if smoke else _FULL_DEADLINE_S * len(vmms),
    )


def _pytest(name: str, vmms: Sequence[str], *, smoke: bool, arguments: Sequence[str]) -> list[str]:
    # The contract suite has a parameter for each backend.
    others = [f"[{other}" for other in vmm.PROGRAMS if other not in vmms]
    files = [_END_TO_END]
    if name == vmms[0]:
        files.append(_CONTRACT if smoke else _BACKENDS)
    deselected = " and ".join(f"not {word}" for word in (*_SKIPPED, *others))
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider"]
    limit_s = _SMOKE_TEST_LIMIT_S if smoke else _TEST_LIMIT_S
    command += ["-o", f"timeout={limit_s}", "-o", f"faulthandler_timeout={limit_s}"]
    command += ["-k", deselected]
    # One that stands still shall not take the time of a second run on a new node.
    command += ["-x", "-m", "smoke or kvm"] if smoke else []
    return [*command, *(arguments or files)]


def main() -> int:
    """Say which VMMs are left out and why, boot a node, run the tests of the others."""
    parser = argparse.ArgumentParser(prog="python -m tests.kvm_node.suite", description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="only the tests marked so")
    parser.add_argument("arguments", nargs="*", help="pytest's, instead of the usual files")
    options = parser.parse_args()
    found = [name for name in vmm.PROGRAMS if vmm.find_program(name) is not None]
    for name in vmm.PROGRAMS:
        if name not in found:
            print(f"left out: {vmm.missing(name)}", flush=True)
    if not found:
        return 1
    print(f"booting a node with KVM for {', '.join(found)}", flush=True)
    try:
        return run(
            job(found, smoke=options.smoke, arguments=options.arguments),
            lambda data: os.write(sys.stdout.fileno(), data),
        )
    except NodeFailed as failure:
        print(failure, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
