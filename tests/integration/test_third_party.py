"""A container in a machine of a VMM that another distribution brings, by one word of configuration.

The VMM plays its guest, and the agent in it is a scripted one in this process.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trio

from tests.fakes.fake_agent import FakeAgent
from tests.fakes.fake_process import Program
from tests.harness import vmm
from tests.harness.configuration import changed_configuration, for_hypervisor, with_value
from tests.harness.ctr import Ctr, fresh_id
from tests.hypervisors import third_party

if TYPE_CHECKING:
    from tests.harness.node import Node

SITE = "/opt/kata-shimv2"
AGENT = "/run/toy-agent.sock"


@pytest.fixture
def toy(node: Node) -> Iterator[str]:
    """The distribution, installed on the node; what has to be said in the configuration."""
    node.run(["mount", "-t", "tmpfs", "tmpfs", "/opt"])
    site = node.path(SITE)
    site.mkdir()
    program = third_party.put(site)
    yield f"{SITE}/{program.name}"
    node.run(["umount", "/opt"])


def configured(text: str, program: str) -> str:
    text = with_value(for_hypervisor(text, "toy"), "path", f'"{program}"')
    return with_value(text, "kernel_params", f'"toy.agent={AGENT}"')


@pytest.mark.skipif(vmm.NAME != "qemu", reason="the same with each VMM")
async def test_container_runs_in_a_machine_that_only_its_backend_knows(
    node: Node, ctr: Ctr, toy: str
) -> None:
    socket = node.path(AGENT)
    agent = FakeAgent(socket)
    agent.program(Program(stdout=b"from a toy\n", exit_status=7))
    with changed_configuration(node, partial(configured, program=toy)):
        async with trio.open_nursery() as nursery:
            await nursery.start(agent.serve)
            # The VMM is a user of its own.
            Path(socket).chmod(0o666)  # noqa: ASYNC240
            run = partial(ctr.run, fresh_id("toy"), "true")
            done = await trio.to_thread.run_sync(run)
            nursery.cancel_scope.cancel()
    assert (done.returncode, done.stdout) == (7, "from a toy\n"), done.stderr
    (request,) = agent.called("CreateContainer")
    # The container's root is a disk of its machine: the backend has no shared directory.
    assert [storage.driver for storage in request.storages] == ["mmioblk"]
