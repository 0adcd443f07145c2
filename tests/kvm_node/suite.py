"""The end-to-end tests on the KVM node, for every VMM that is found: `make test-kvm`.

One boot runs pytest once for each setup (`vmm.SETUPS`): a VMM, or one with another machine type.
The tests are the ordinary ones, with containerd 2.x; those of the backends themselves belong to the
first run.
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
_SMOKE_DEADLINE_S = 1500.0
_FULL_DEADLINE_S = 4 * 3600.0
_PASSED_ON = ("HOME", "LANG", "XDG_CACHE_HOME", "KATA_TEST_SPECS")
# On the node's own file system: what pytest has said, for the summary.
_SAID = "/tmp/said."


def job(setups: Sequence[str], *, smoke: bool, arguments: Sequence[str] = ()) -> Job:
    """Return what runs pytest on a node for each of `setups`; its status is 0 if all passed.

    The last lines of its output say for each how many tests passed and how many were skipped.
    """
    script = ["status=0"]
    for number, setup in enumerate(setups):
        words = shlex.join(_pytest(setup, setups, smoke=smoke, arguments=arguments))
        name, _, machine_type = setup.partition(":")
        variables = f"KATA_TEST_HYPERVISOR={name}"
        variables += f" KATA_TEST_MACHINE_TYPE={machine_type}" if machine_type else ""
        said = f"{_SAID}{number}"
        script += [
            f"echo; echo 'with {setup}:'",
            f"{variables} {words} | tee {said}",
            "test ${PIPESTATUS[0]} = 0 || status=1",
        ]
    script.append("echo; echo 'on the node with KVM:'")
    for number, setup in enumerate(setups):
        script.append(f"echo '{setup}:' $(tail -n 1 {_SAID}{number} | tr -d =)")
    script.append("exit $status")
    names = {setup.partition(":")[0] for setup in setups}
    programs = {vmm.variable(name): str(vmm.find_program(name)) for name in names}
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
        deadline_s=_SMOKE_DEADLINE_S if smoke else _FULL_DEADLINE_S * len(setups),
    )


def _pytest(
    setup: str, setups: Sequence[str], *, smoke: bool, arguments: Sequence[str]
) -> list[str]:
    # The contract suite has a parameter for each backend.
    present = {one.partition(":")[0] for one in setups}
    others = [f"[{other}" for other in vmm.PROGRAMS if other not in present]
    files = [_END_TO_END]
    if setup == setups[0]:
        files.append(_CONTRACT if smoke else _BACKENDS)
    deselected = " and ".join(f"not {word}" for word in (*_SKIPPED, *others))
    # Of the set that is a part of `make test`, few failures run once more, as there.
    program = ["tests.second_run"] if smoke else ["pytest", "-v"]
    command = [sys.executable, "-m", *program, "-p", "no:cacheprovider"]
    limit_s = _SMOKE_TEST_LIMIT_S if smoke else _TEST_LIMIT_S
    command += ["-o", f"timeout={limit_s}", "-o", f"faulthandler_timeout={limit_s}"]
    if smoke:  # one boot of a microvm is enough, and it takes no disks that could be refused
        deselected += " and not (test_microvm.py and not kernel_of_its_own)"
        deselected += " and not (refused_attach and microvm)"
    command += ["-k", deselected]
    command += ["-m", "smoke or kvm"] if smoke else []
    return [*command, *(arguments or files)]


def main() -> int:
    """Say which VMMs are left out and why, boot a node, run the tests of the others."""
    parser = argparse.ArgumentParser(prog="python -m tests.kvm_node.suite", description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="only the tests marked so")
    parser.add_argument("--vmm", action="append", choices=vmm.SETUPS, help="only with this one")
    parser.add_argument("arguments", nargs="*", help="pytest's, instead of the usual files")
    options = parser.parse_args()
    wanted = options.vmm or vmm.SETUPS
    left_out = {setup: why for setup in wanted if (why := vmm.missing(setup, has_kvm=True))}
    found = [setup for setup in wanted if setup not in left_out]
    if found:
        print(f"booting a node with KVM for {', '.join(found)}", flush=True)
    status = 1
    try:
        if found:
            status = run(
                job(found, smoke=options.smoke, arguments=options.arguments),
                lambda data: os.write(sys.stdout.fileno(), data),
            )
    except NodeFailed as failure:
        print(failure, file=sys.stderr)
    for why in left_out.values():
        print(f"left out: {why}", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
