"""How a sandbox ends: once, for one reason, whoever notices first.

    (lives) ──fail, take_down──> ended: every process has its exit ──> VM killed ──> all given back

What the guest has not written out yet is asked for before a VM that still answers is killed.
`reset` begins anew, after a first Create that was undone.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

import trio

from agent_proto.errors import AgentError
from shimv2.container import Container, Log, loggers_left
from shimv2.errors import FailedPrecondition, ShimError, Unavailable
from shimv2.process import DRAIN_DEADLINE_S

if TYPE_CHECKING:
    from agent_proto.client import AgentClient
    from shimv2.host_resources import HostResources

EXPLAIN_DEADLINE_S: Final = 1.0
REMOVE_DEADLINE_S: Final = 10


class SandboxEnd:
    """Whether the sandbox has ended and why; takes down what `host` holds."""

    def __init__(
        self,
        sandbox_id: str,
        host: HostResources,
        containers: Mapping[str, Container],
        log: Log,
        start_job: Callable[[Callable[..., Awaitable[Any]]], None],
    ) -> None:
        self.ended = trio.Event()
        self.reason = ""
        self._sandbox_id = sandbox_id
        self._host = host
        self._containers = containers
        self._log = log
        self._start_job = start_job
        self._unmounting = trio.Lock()
        self._closing = trio.Lock()  # guards the one teardown; the second caller finds it done

    @property
    def agent(self) -> AgentClient:
        """The agent, while there is one.

        Raises:
            Unavailable: the sandbox has ended, with the reason.
            FailedPrecondition: no VM is up.
        """
        if self.ended.is_set():
            raise Unavailable(self.reason)
        if self._host.machine is None or self._host.machine.agent is None:
            raise FailedPrecondition(f"sandbox {self._sandbox_id} has no VM")
        return self._host.machine.agent

    async def explain(self) -> str:
        """Why the sandbox has ended; waits a moment for whoever finds out."""
        with trio.move_on_after(EXPLAIN_DEADLINE_S):
            await self.ended.wait()
        return self.reason or "the agent in the guest does not answer"

    def fail(self, reason: str) -> None:
        """The VM can't go on: end every process with the reason, then take the VM down."""
        if self.ended.is_set():
            return
        self._log.error("sandbox failed", sandbox_id=self._sandbox_id, reason=reason)
        self._tell_all(reason)
        self._start_job(self._host.stop_machine)

    async def take_down(self, reason: str) -> None:
        """Kill the VM and give everything back. Idempotent; concurrent callers wait for it."""
        if not self.ended.is_set():
            self._tell_all(reason)
        async with self._closing:
            await self._host.stop_machine()  # no more is written: loggers flush and leave
            await loggers_left(self._containers.values())
            await self._host.give_back()

    async def in_order(self, reason: str) -> None:
        """Take down a VM that answers: what outlives it is written out first."""
        await self.unmount_disks()
        await self.take_down(reason)

    async def with_container(self, container: Container) -> None:
        """Take down with the container that the VM was made for, which has ended."""
        # What was written before the end is still in the guest: its readers get it first.
        if container.init.relay is not None:
            await container.init.relay.outputs_ended.wait()
        with trio.move_on_after(DRAIN_DEADLINE_S):
            for process in list(container.execs.values()):
                if process.relay is not None:
                    await process.relay.outputs_ended.wait()
        await self._host.poststart_over(container.id)
        await self.in_order(f"container {container.id} ended")

    async def unmount_disks(self) -> None:
        """Have the guest write out what outlives the VM, which is killed next."""
        async with self._unmounting:
            for container_id in self._host.writers():
                container = self._containers.get(container_id)
                if container is not None and not self.ended.is_set():
                    await self.remove_in_guest(container)
                    self._host.files.unmounted(container_id)

    async def remove_in_guest(self, container: Container) -> None:
        """Have a living guest forget a container; what goes wrong is logged. Shielded, bounded."""
        if self._host.machine is None or self.ended.is_set():
            return
        with trio.move_on_after(REMOVE_DEADLINE_S, shield=True):
            try:
                files, agent = self._host.files, self.agent
                await files.bring_back(container.id, container.bundle.spec, agent)
            except (AgentError, ShimError, OSError) as exc:
                self._log.warning("termination log", container_id=container.id, error=str(exc))
            try:
                await self.agent.remove_container(container.id)
            except (AgentError, ShimError) as exc:
                self._log.warning("remove container", container_id=container.id, error=str(exc))

    def reset(self) -> None:
        """Nothing is left of an attempt; another may follow."""
        self.ended = trio.Event()
        self.reason = ""

    def _tell_all(self, reason: str) -> None:
        self.reason = reason
        self.ended.set()
        for container in self._containers.values():
            container.end_all(reason)
